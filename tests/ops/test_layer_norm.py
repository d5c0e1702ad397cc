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
