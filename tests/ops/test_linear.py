import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from milonga.ops.linear import ERROR_BOUND, MIN_ROWS, linear
from milonga.ops.linear.library import AVAILABLE
from tests.ops.helpers import assert_matches, relative_rms


@given(st.integers(0, 70), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**31))
def test_matches_float64(rows: int, width: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(2, rows, width), torch.randn(out, width)]
    assert_matches(lambda x, w: [linear(x, w)], lambda x, w: [F.linear(x, w)], inputs, ERROR_BOUND)


def test_full_fp32_at_the_widest() -> None:
    x, w = torch.randn(300, 4096), torch.randn(257, 4096)
    assert relative_rms(linear(x, w), x.double() @ w.double().t()) <= ERROR_BOUND


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")
def test_takes_the_fast_product() -> None:
    x, w = torch.randn(MIN_ROWS, 6, requires_grad=True), torch.randn(5, 6)
    assert "milonga" in type(linear(x, w).grad_fn.next_functions[0][0]).__name__
    assert "milonga" not in type(linear(x[:1], w).grad_fn).__name__


def test_only_the_gradients_asked_for() -> None:
    x, w = torch.randn(20, 6), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and relative_rms(w.grad, x.sum(0).expand(5, 6)) < ERROR_BOUND


def test_strided_and_expanded_rows() -> None:
    wide = torch.randn(3, 40, 64)
    w = torch.randn(9, 32)
    for x in (wide[..., 16:48], wide[:1, :, :32].expand(3, 40, 32), wide[:, ::2, :32]):
        assert relative_rms(linear(x, w), F.linear(x.double(), w.double())) <= ERROR_BOUND


def test_autocast_and_other_dtypes_pass_through() -> None:
    x, w = torch.randn(20, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert linear(x.double(), w.double()).dtype == torch.float64


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(lambda x, w: linear(x, w).sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (12, 33):
        x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        expected = torch.autograd.grad(linear(x, w).sum(), (x, w))
        got = torch.autograd.grad(compiled(x, w), (x, w))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_nan_comes_out() -> None:
    x = torch.randn(20, 8)
    x[3, 2] = float("nan")
    y = linear(x, torch.randn(4, 8))
    assert y[3].isnan().all() and y.isnan().sum() == 4


def test_wrong_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        linear(torch.randn(20, 8), torch.randn(4, 7))
