"""`rms_norm` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

import torch
from torch import Tensor

from milonga.ops.backend import kernels


@torch.library.custom_op("milonga::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (y like x, 1/rms of each row, fp32 `[R]`)."""
    return kernels("rms_norm", "cpu").forward(x, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x[..., 0].numel(), dtype=torch.float32
    )


@torch.library.custom_op("milonga::rms_norm_backward", mutates_args=(), device_types="cpu")
def rms_norm_backward_op(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> (gradient of x, gradient of weight `[D]` fp32)."""
    return kernels("rms_norm", "cpu").backward(grad, x, weight, scale)


@rms_norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad, _):
    return *rms_norm_backward_op(grad, *ctx.saved_tensors), None


rms_norm_op.register_autograd(_backward, setup_context=_setup)
