"""The Triton kernels of `rms_norm` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from milonga.ops.layer_norm import layer_norm_reference
from milonga.ops.rms_norm import ERROR_BOUND, rms_norm, rms_norm_reference, triton
from tests.ops.helpers import assert_matches, assert_strides_change_nothing, relative_rms
from tests.ops.interpreter import prepare

prepare()


class Norm(torch.autograd.Function):
    """The kernels as the operator ties them together on a GPU."""

    @staticmethod
    def forward(ctx, x, weight):
        y, scale = triton.forward(x, weight, 1e-5)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        return triton.backward(grad, *ctx.saved_tensors)


class NormOfSum(torch.autograd.Function):
    """The same with a residual, with or without mean and bias."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias=None):
        ctx.set_materialize_grads(False)
        y, total, _, mean, scale = triton.forward_norm(x, residual, weight, bias, 1e-5, x.dtype, bias is not None)
        ctx.save_for_backward(total, weight, mean, scale)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        total, weight, mean, scale = ctx.saved_tensors
        biased = mean.numel() > 0 or (len(ctx.needs_input_grad) == 4 and ctx.needs_input_grad[3])
        dtypes = total.dtype, total.dtype
        made = triton.backward_norm(grad, grad_total, total, weight, biased, mean, scale, *dtypes, biased)
        return made[0], made[0], made[2], made[3] if biased else None


def of_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, residual=residual, backend="reference")


def layer_of_sum(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm_reference(total, weight, bias, 1e-5), total


# Widths of one part and of several, of one row a tile and of many; more rows than programs.
SHAPES = [(0, 5), (3, 0), (1, 3), (7, 3), (2, 5, 70), (3, 256), (2, 257), (5, 1100), (2, 2100), (30, 40), (9, 300)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns in a program of the backward pass."""
    monkeypatch.setattr(triton, "_WARPS", 8)


class NotFromSum(torch.autograd.Function):
    """The norm of a sum whose backward pass reads y, or with a mean and a bias the normalised rows, not the sum."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias=None):
        ctx.centre = bias is not None
        y, total, normal, mean, scale = triton.forward_norm(
            x, residual, weight, bias, 1e-5, x.dtype, ctx.centre, keep_sum=False
        )
        if ctx.centre:
            assert relative_rms(triton.affine(normal, weight, bias), y.double()) <= ERROR_BOUND
        ctx.save_for_backward(normal if ctx.centre else y, weight, mean, scale)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        kept, weight, mean, scale = ctx.saved_tensors
        dtypes = kept.dtype, kept.dtype
        made = triton.backward_norm(
            grad, grad_total, kept, weight, ctx.centre, mean, scale, *dtypes, ctx.centre, kept_sum=False
        )
        return made[0], made[0], made[2], made[3] if ctx.centre else None


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    assert_matches(
        lambda x, w: [Norm.apply(x, w)], lambda x, w: [rms_norm_reference(x, w, 1e-5)], [x, weight], ERROR_BOUND
    )
    assert_matches(NormOfSum.apply, of_sum, [x, torch.randn(shape), weight], ERROR_BOUND)
    if shape[-1] > 1:  # the deviation of one number is that of rounding
        values = [x + 3, torch.randn(shape), weight, torch.randn(shape[-1])]
        assert_matches(NormOfSum.apply, layer_of_sum, values, ERROR_BOUND)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_from_the_output(shape: tuple[int, ...]) -> None:
    """In fp32, where y says as much as the sum does."""
    values = [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])]
    assert_matches(NotFromSum.apply, of_sum, values, ERROR_BOUND)
    if shape[-1] > 1:
        assert_matches(NotFromSum.apply, layer_of_sum, [*values, torch.randn(shape[-1])], ERROR_BOUND)


def test_gradients_from_the_output_where_weights_are_zero() -> None:
    weight = torch.randn(40)
    weight[::3] = 0.0
    weight[1::3] *= torch.logspace(-25, 0, 13)
    values = [torch.randn(9, 40), torch.randn(9, 40), weight]
    assert_matches(NotFromSum.apply, of_sum, values, ERROR_BOUND)
    assert_matches(NotFromSum.apply, layer_of_sum, [*values, 100 * torch.randn(40)], ERROR_BOUND)


def test_sum_that_nobody_reads() -> None:
    values = [torch.randn(5, 40), torch.randn(5, 40), torch.randn(40)]
    assert_matches(lambda *v: NormOfSum.apply(*v)[:1], lambda *v: of_sum(*v)[:1], values, ERROR_BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_is_the_norm_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 700).to(dtype), torch.randn(5, 700).to(dtype), torch.randn(700)
    y, total, _, _, scale = triton.forward_norm(x, residual, weight, None, 1e-5, dtype, False)
    eps = torch.finfo(dtype).eps
    if dtype == torch.bfloat16:  # the interpreter cuts bits off where the GPU rounds
        assert relative_rms(total, x.double() + residual.double()) <= eps
    else:
        assert torch.equal(total, x + residual)
    plain, plain_scale = triton.forward(total, weight, 1e-5)
    assert torch.equal(y, plain) and torch.equal(scale, plain_scale)
    assert relative_rms(y, rms_norm_reference(total.double(), weight, 1e-5)) <= ERROR_BOUND + eps
    kept = y, total, total, weight, False, scale, scale
    grad_x, narrow, grad_weight, _ = triton.backward_norm(*kept, dtype, dtype, False)
    assert grad_x.dtype == dtype and grad_weight.dtype == torch.float32 and narrow.numel() == 0


def test_stream_in_fp32_beside_layers_in_bf16() -> None:
    branch, stream, weight = torch.randn(5, 700).bfloat16(), torch.randn(5, 700), torch.randn(700)
    y, total, _, _, scale = triton.forward_norm(branch, stream, weight, None, 1e-5, torch.bfloat16, False)
    assert total.dtype == torch.float32 and torch.equal(total, stream + branch)
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_rms(y, rms_norm_reference(total.double(), weight, 1e-5)) <= eps
    kept = y, total, total, weight, False, scale, scale
    wide, narrow, _, _ = triton.backward_norm(*kept, torch.float32, torch.bfloat16, False)
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    assert relative_rms(narrow, wide.double()) <= eps


def test_slices_and_transposes() -> None:
    wide = torch.randn(3, 5, 64)
    weight = torch.randn(32)
    for x in (wide[..., 16:48], wide.transpose(0, 1)[..., :32], wide[:, ::2, :32]):
        y, scale = triton.forward(x, weight, 1e-5)
        assert torch.equal(y, triton.forward(x.contiguous(), weight, 1e-5)[0])
        grad = triton.backward(x, x, weight, scale)
        dense = triton.backward(x.contiguous(), x.contiguous(), weight, scale)
        assert all(torch.equal(a, b) for a, b in zip(grad, dense, strict=True))


def test_strides_change_nothing() -> None:
    values = [torch.randn(5, 40), torch.randn(5, 40), torch.randn(40), torch.randn(40)]
    assert_strides_change_nothing(NormOfSum.apply, values)
    for op in (NormOfSum.apply, NotFromSum.apply):
        assert_strides_change_nothing(lambda *v, op=op: op(*v), values[:3])
    assert_strides_change_nothing(NotFromSum.apply, values)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(40, 8)
    x[2, 3] = float("nan")
    y, scale = triton.forward(x, torch.ones(8), 1e-5)
    assert y[2].isnan().all() and int(y.isnan().sum()) == 8
    grad = triton.backward(torch.ones(40, 8), x, torch.ones(8), scale)[0]
    assert grad[2].isnan().all() and int(grad.isnan().sum()) == 8
