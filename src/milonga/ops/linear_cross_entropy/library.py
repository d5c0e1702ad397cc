"""`linear_cross_entropy` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

from typing import Any

import torch
from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


@custom_op("linear_cross_entropy", "cpu")
def linear_cross_entropy_op(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int, sloped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (losses fp32, log of the sum of exponentials of each row's logits fp32), both shaped like targets.

    With `sloped` (on a GPU) also the gradients of x, weight and bias of the sum of all losses, while the logits are at
    hand; else empty.
    """
    losses, totals = kernels("linear_cross_entropy", "cpu").forward(x, weight, targets, bias, ignore_index, chunk)
    return losses, totals, x.new_empty(0), x.new_empty(0), x.new_empty(0)


@linear_cross_entropy_op.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int, sloped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = kernels("linear_cross_entropy", "triton")
    if sloped:
        return run.forward_sloped(x, weight, targets, bias, ignore_index, chunk)
    losses, totals = run.forward(x, weight, targets, bias, ignore_index, chunk)
    return losses, totals, x.new_empty(0), x.new_empty(0), x.new_empty(0)


@linear_cross_entropy_op.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int, sloped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses = x.new_empty(targets.shape, dtype=torch.float32)
    if not sloped:
        return losses, torch.empty_like(losses), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    bias_slope = weight.new_empty(0 if bias is None else weight.shape[0], dtype=torch.float32)
    slope_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    return losses, torch.empty_like(losses), x.new_empty(x.shape), slope_weight, bias_slope


@custom_op("linear_cross_entropy_backward", "cpu")
def linear_cross_entropy_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, weight and bias (zeros `[V]` where there is none)."""
    return kernels("linear_cross_entropy", "cpu").backward(grad, x, weight, targets, bias, totals, ignore_index, chunk)


@linear_cross_entropy_backward_op.register_kernel("cuda")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("linear_cross_entropy", "triton").backward(
        grad, x, weight, targets, bias, totals, ignore_index, chunk
    )


@linear_cross_entropy_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = torch.float32 if bias is None else bias.dtype
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(weight.shape[0], dtype=bias_dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, targets, bias, ctx.ignore_index, ctx.chunk, ctx.sloped = inputs
    ctx.save_for_backward(x, weight, targets, bias, *output[1:])


def _same_everywhere(grad: Tensor) -> bool:
    """Whether a gradient is one number expanded, as that of a sum or a mean is: seen from its strides."""
    return all(step == 0 for step, size in zip(grad.stride(), grad.shape, strict=True) if size > 1)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    x, weight, targets, bias, totals, slope_x, slope_weight, slope_bias = ctx.saved_tensors
    if ctx.sloped and grad.numel() and _same_everywhere(grad):
        factor, scaled = grad.flatten()[0], kernels("linear_cross_entropy", "triton").scaled
        grad_x, grad_weight = scaled(slope_x, factor, x.dtype), scaled(slope_weight, factor, weight.dtype)
        grad_bias = None if bias is None else scaled(slope_bias, factor, bias.dtype)
    else:
        grad_x, grad_weight, grad_bias = linear_cross_entropy_backward_op(
            grad, x, weight, targets, bias, totals, ctx.ignore_index, ctx.chunk
        )
    return grad_x, grad_weight, None, None if bias is None else grad_bias, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)
