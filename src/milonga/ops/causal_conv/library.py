"""`causal_conv` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

import torch
from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


@custom_op("causal_conv", "cpu")
def causal_conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """-> (y like x, final `[S W-1 E]`)."""
    return kernels("causal_conv", "cpu").forward(x, weight, bias, initial, offsets, silu)


@causal_conv_op.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return kernels("causal_conv", "triton").forward(x, weight, bias, initial, offsets, silu)


@causal_conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


@custom_op("causal_conv_backward", "cpu")
def causal_conv_backward_op(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias and initial; empty where the argument was absent."""
    return kernels("causal_conv", "cpu").backward(grad_y, grad_final, x, weight, bias, initial, offsets, silu)


@causal_conv_backward_op.register_kernel("cuda")
def _(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels("causal_conv", "triton").backward(grad_y, grad_final, x, weight, bias, initial, offsets, silu)


@causal_conv_backward_op.register_fake
def _(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    grad_bias = x.new_empty(0, dtype=torch.float32) if bias is None else like(bias)
    return like(x), like(weight), grad_bias, like(initial)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, initial, offsets, silu = inputs
    ctx.set_materialize_grads(False)
    ctx.silu = silu
    ctx.save_for_backward(x, weight, bias, initial, offsets)


def _backward(ctx, grad_y, grad_final):
    x, weight, bias, initial, offsets = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_initial = causal_conv_backward_op(
        grad_y, grad_final, x, weight, bias, initial, offsets, ctx.silu
    )
    grad_bias = None if bias is None else grad_bias
    return grad_x, grad_weight, grad_bias, None if initial is None else grad_initial, None, None


causal_conv_op.register_autograd(_backward, setup_context=_setup)
