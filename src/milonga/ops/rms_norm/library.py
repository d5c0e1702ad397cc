"""`rms_norm` as PyTorch operators: shapes for compilers, derivatives, and a kernel per device."""

import torch
from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scale(x: Tensor) -> Tensor:
    return x.new_empty(x[..., 0].numel(), dtype=torch.float32)


@custom_op("rms_norm", "cpu")
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (y like x, 1/rms of each row, fp32 `[R]`)."""
    return kernels("rms_norm", "cpu").forward(x, weight, eps)


@rms_norm_op.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return kernels("rms_norm", "triton").forward(x, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _scale(x)


@custom_op("rms_norm_backward", "cpu")
def rms_norm_backward_op(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> (gradient of x, gradient of weight `[D]` fp32)."""
    return kernels("rms_norm", "cpu").backward(grad, x, weight, scale)


@rms_norm_backward_op.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return kernels("rms_norm", "triton").backward(grad, x, weight, scale)


@rms_norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(weight)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    return *rms_norm_backward_op(grad, *ctx.saved_tensors), None


rms_norm_op.register_autograd(_backward, setup_context=_setup)


@custom_op("norm", "cuda")
def norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centre: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """On a GPU alone: -> (y in `dtype`, x + residual in the wider dtype of the two, the normalised rows in `dtype`,
    means, 1/deviations, fp32 `[R]`).

    With `centre` the mean of each row is taken off first. Without `keep_sum` the backward pass reads y, or where there
    is a mean or a bias the normalised rows, which are made then. What is absent comes back empty.
    """
    return kernels("rms_norm", "triton").forward_norm(x, residual, weight, bias, eps, dtype, centre, keep_sum)


@norm_op.register_fake
def _(x, residual, weight, bias, eps, dtype, centre, keep_sum):
    total = x.new_empty(0)
    if residual is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    scale = _scale(x)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    normal = torch.empty_like(y) if not keep_sum and (centre or bias is not None) else y.new_empty(0)
    return y, total, normal, torch.empty_like(scale) if centre else scale.new_empty(0), scale


@custom_op("norm_backward", "cuda")
def norm_backward_op(
    grad: Tensor,
    grad_total: Tensor | None,
    kept: Tensor,
    weight: Tensor,
    biased: bool,
    mean: Tensor,
    scale: Tensor,
    wide: torch.dtype,
    narrow: torch.dtype,
    centre: bool,
    kept_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of the sum in `wide` and, where it is another dtype, in `narrow`; of weight; of bias.

    `kept` is the sum or, without `kept_sum`, what became of it.
    """
    return kernels("rms_norm", "triton").backward_norm(
        grad, grad_total, kept, weight, biased, mean, scale, wide, narrow, centre, kept_sum
    )


@norm_backward_op.register_fake
def _(grad, grad_total, kept, weight, biased, mean, scale, wide, narrow, centre, kept_sum):
    first = torch.empty(kept.shape, dtype=wide, device=kept.device)
    second = torch.empty(kept.shape if narrow != wide else (0,), dtype=narrow, device=kept.device)
    return first, second, _like(weight), torch.empty_like(weight) if biased else weight.new_empty(0)


def _setup_norm(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, _, ctx.centre, ctx.keep_sum = inputs
    y, total, normal, mean, scale = output
    ctx.set_materialize_grads(False)
    ctx.biased, ctx.added = bias is not None, residual is not None
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    ctx.wide = total.dtype if ctx.added else x.dtype
    total = total if ctx.added else x
    kept = total if ctx.keep_sum else normal if ctx.centre or ctx.biased else y
    ctx.save_for_backward(kept, weight, mean, scale)


def _backward_norm(ctx, grad, grad_total, *_):
    kept, weight, mean, scale = ctx.saved_tensors
    (own, other), wide = ctx.dtypes, ctx.wide
    narrow_dtype = own if own != wide or other is None else other
    if grad is None:
        grad_wide, grad_weight, grad_bias = grad_total, None, None
        grad_narrow = None if grad_total is None else grad_total.to(narrow_dtype)
    else:
        grad_total = grad_total if ctx.added else None
        grad_wide, grad_narrow, grad_weight, grad_bias = norm_backward_op(
            grad, grad_total, kept, weight, ctx.biased, mean, scale, wide, narrow_dtype, ctx.centre, ctx.keep_sum
        )
        if narrow_dtype == wide:
            grad_narrow = grad_wide
    grad_x = grad_wide if own == wide else grad_narrow
    grad_residual = None if not ctx.added else grad_wide if other == wide else grad_narrow
    return grad_x, grad_residual, grad_weight, grad_bias if ctx.biased else None, None, None, None, None


norm_op.register_autograd(_backward_norm, setup_context=_setup_norm)
