"""`layer_norm`: the definition, a residual, what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from milonga.ops.layer_norm import ERROR_BOUND, layer_norm, layer_norm_reference
from tests.ops.helpers import assert_matches


@given(st.integers(0, 9), st.integers(8, 70), st.integers(0, 2**31))
def test_matches_float64(rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(2, rows, width), torch.randn(width), torch.randn(width)]
    assert_matches(
        lambda *v: [layer_norm(*v)], lambda *v: [layer_norm_reference(*v, 1e-5)], inputs, ERROR_BOUND
    )  # fmt: skip


def test_the_definition_is_pytorch_s() -> None:
    x, w, b = torch.randn(3, 40).double(), torch.randn(40).double(), torch.randn(40).double()
    torch.testing.assert_close(layer_norm_reference(x, w, b, 1e-5), F.layer_norm(x, (40,), w, b, 1e-5))


def test_residual_and_dtype() -> None:
    branch, stream, w, b = torch.randn(3, 40).bfloat16(), torch.randn(3, 40), torch.randn(40), torch.randn(40)
    y, total = layer_norm(branch, w, b, residual=stream, dtype=torch.bfloat16)
    assert total.dtype == torch.float32 and torch.equal(total, stream + branch)
    assert torch.equal(y, layer_norm(total, w, b).bfloat16())


def test_bad_input() -> None:
    x, w = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="layer_norm: bias must be \\[D\\], expected \\[8\\], got \\[7\\]"):
        layer_norm(x, w, torch.ones(7))
    with pytest.raises(ValueError, match="layer_norm: residual"):
        layer_norm(x, w, w, residual=torch.randn(3, 7))
    with pytest.raises(ValueError, match="layer_norm: weight must be float32"):
        layer_norm(x, w.bfloat16(), w)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., D\], expected 1 dimension or more"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must be float32, .* or float64, got int64"),
        ({"x": torch.ones(3, 8, dtype=torch.bool)}, "x must be float32, .* or float64, got bool"),
        ({"x": torch.ones(3, 8, dtype=torch.complex64)}, "x must be float32, .* or float64, got complex64"),
        ({"x": torch.ones(3, 8, device="meta")}, "weight must be on meta as x is, got cpu"),
        ({"weight": torch.ones(8, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"weight": torch.ones(8, dtype=torch.complex64)}, "weight must be float32, got complex64"),
        ({"bias": torch.ones(8, device="meta")}, "bias must be on cpu as x is, got meta"),
        ({"bias": torch.ones(8, dtype=torch.int64)}, "bias must be float32, got int64"),
        ({"residual": torch.ones(3, 8, device="meta")}, "residual must be on cpu as x is, got meta"),
    ],
)
def test_dtypes_and_devices_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.randn(3, 8), "weight": torch.ones(8), "bias": torch.zeros(8)}
    layer_norm(**arguments)
    with pytest.raises(ValueError, match=f"layer_norm: {message}"):
        layer_norm(**(arguments | changes))
