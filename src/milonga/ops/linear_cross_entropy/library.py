"""`linear_cross_entropy` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

from typing import Any

import torch
from torch import Tensor

from milonga.ops.backend import kernels


@torch.library.custom_op("milonga::linear_cross_entropy", mutates_args=(), device_types="cpu")
def linear_cross_entropy_op(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """-> (losses fp32, log of the sum of exponentials of each row's logits fp32), both shaped like targets."""
    return kernels("linear_cross_entropy", "cpu").forward(x, weight, targets, bias, ignore_index, chunk)


@linear_cross_entropy_op.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    return kernels("linear_cross_entropy", "triton").forward(x, weight, targets, bias, ignore_index, chunk)


@linear_cross_entropy_op.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(targets.shape, dtype=torch.float32), x.new_empty(targets.shape, dtype=torch.float32)


@torch.library.custom_op("milonga::linear_cross_entropy_backward", mutates_args=(), device_types="cpu")
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


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, targets, bias, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(x, weight, targets, bias, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    x, weight, targets, bias, totals = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = linear_cross_entropy_backward_op(
        grad, x, weight, targets, bias, totals, ctx.ignore_index, ctx.chunk
    )
    return grad_x, grad_weight, None, None if bias is None else grad_bias, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)
