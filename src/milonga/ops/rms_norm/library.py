"""`rms_norm` as PyTorch operators: shapes for compilers, derivatives, and a kernel per device."""

import torch
from torch import Tensor

from milonga.ops.backend import kernels


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scale(x: Tensor) -> Tensor:
    return x.new_empty(x[..., 0].numel(), dtype=torch.float32)


@torch.library.custom_op("milonga::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (y like x, 1/rms of each row, fp32 `[R]`)."""
    return kernels("rms_norm", "cpu").forward(x, weight, eps)


@rms_norm_op.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return kernels("rms_norm", "triton").forward(x, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), _scale(x)


@torch.library.custom_op("milonga::rms_norm_backward", mutates_args=(), device_types="cpu")
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


@torch.library.custom_op("milonga::rms_norm_add", mutates_args=(), device_types="cuda")
def rms_norm_add_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> (y, x + residual rounded to the dtype of x, 1/rms of each row of that, fp32 `[R]`); on a GPU alone."""
    return kernels("rms_norm", "triton").forward_add(x, residual, weight, eps)


@rms_norm_add_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _scale(x)


@torch.library.custom_op("milonga::rms_norm_add_backward", mutates_args=(), device_types="cuda")
def rms_norm_add_backward_op(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (gradient of x, which is also that of residual; gradient of weight `[D]` fp32)."""
    return kernels("rms_norm", "triton").backward_add(grad, grad_total, total, weight, scale)


@rms_norm_add_backward_op.register_fake
def _(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _like(total), _like(weight)


def _setup_add(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward_add(ctx, grad, grad_total, _):
    if grad is None:
        return grad_total, grad_total, None, None
    grad_x, grad_weight = rms_norm_add_backward_op(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x, grad_weight, None


rms_norm_add_op.register_autograd(_backward_add, setup_context=_setup_add)
