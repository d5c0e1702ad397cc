"""`swiglu` as PyTorch operators: shapes for compilers, derivatives, and a kernel per device."""

from typing import Any

from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


@custom_op("swiglu", "cpu")
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """-> silu(gate) * up, contiguous."""
    return kernels("swiglu", "cpu").forward(gate, up)


@swiglu_op.register_kernel("cuda")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return kernels("swiglu", "triton").forward(gate, up)


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op("swiglu_backward", "cpu")
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of gate and up, contiguous."""
    return kernels("swiglu", "cpu").backward(grad, gate, up)


@swiglu_backward_op.register_kernel("cuda")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return kernels("swiglu", "triton").backward(grad, gate, up)


@swiglu_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(grad, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_setup)


@custom_op("swiglu_fused", "cuda")
def swiglu_fused_op(both: Tensor) -> Tensor:
    """-> silu(gate) * up of `both` `[..., 2F]`, contiguous; on a GPU alone."""
    return kernels("swiglu", "triton").forward_fused(both)


@swiglu_fused_op.register_fake
def _(both: Tensor) -> Tensor:
    return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))


@custom_op("swiglu_fused_backward", "cuda")
def swiglu_fused_backward_op(grad: Tensor, both: Tensor) -> Tensor:
    """-> gradient of `both`, contiguous."""
    return kernels("swiglu", "triton").backward_fused(grad, both)


@swiglu_fused_backward_op.register_fake
def _(grad: Tensor, both: Tensor) -> Tensor:
    return both.new_empty(both.shape)


def _setup_fused(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_fused(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_fused_backward_op(grad, *ctx.saved_tensors)


swiglu_fused_op.register_autograd(_backward_fused, setup_context=_setup_fused)
