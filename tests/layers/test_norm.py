"""The two norms against their equations."""

import pytest
import torch

from milonga.layers import build_norm, norm_parameter_count


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_they_are_their_equations(kind):
    norm = build_norm(kind, 16, 1e-5).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    x = 2 + 3 * torch.randn(4, 7, 16, dtype=torch.float64)
    centred = x if kind == "rms_norm" else x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    if kind == "layer_norm":
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert norm_parameter_count(kind, 16) == sum(parameter.numel() for parameter in norm.parameters())


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_sums_of_half_precision_are_not_taken_in_it(kind):
    """300 squared is beyond fp16's range; the norm's weight stays fp32 when the module is converted."""
    norm = build_norm(kind, 8, 1e-5).half()
    assert norm.weight.dtype == torch.float32
    x = torch.tensor([300.0, -300.0] * 4).half()
    y = norm(x[None])
    assert y.dtype == torch.float16
    torch.testing.assert_close(y[0], torch.tensor([1.0, -1.0] * 4).half())
