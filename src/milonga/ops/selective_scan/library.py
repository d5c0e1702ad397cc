"""`selective_scan` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

import torch
from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op
from milonga.ops.selective_scan.checkpoints import checkpoint_shape


@custom_op("selective_scan", "cpu")
def selective_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (y like x, final `[S E N]` fp32, checkpoints). With `save` false there are none and no derivative."""
    return kernels("selective_scan", "cpu").forward(x, dt, A, B, C, D, z, dt_bias, initial, offsets, save)


@selective_scan_op.register_kernel("cuda")
def _(x, dt, A, B, C, D, z, dt_bias, initial, offsets, save):
    return kernels("selective_scan", "triton").forward(x, dt, A, B, C, D, z, dt_bias, initial, offsets, save)


@selective_scan_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial, offsets, save):
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1
    width, states = A.shape
    kept = checkpoint_shape(x.shape[0] * x.shape[1], sequences, width, states, save)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        A.new_empty(sequences, width, states),
        A.new_empty(kept),
    )


@custom_op("selective_scan_backward", "cpu")
def selective_scan_backward_op(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: bool,
    offsets: Tensor | None,
    kept: Tensor,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, dt, A, B, C, D, z, dt_bias and initial, empty where the argument was absent; y again.

    The last is empty unless `gated`. It is the y of the forward pass, after D and the gate, in the dtype of x, up to
    rounding: for who did not keep it and needs it for the gradient of what comes after.
    """
    return kernels("selective_scan", "cpu").backward(
        grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept, gated
    )


@selective_scan_backward_op.register_kernel("cuda")
def _(grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept, gated):
    return kernels("selective_scan", "triton").backward(
        grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept, gated
    )


@selective_scan_backward_op.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept, gated):
    sequences = x.shape[0] if offsets is None else offsets.shape[0] - 1

    def like(tensor):
        return A.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)

    state = A.new_empty((sequences, *A.shape) if initial else (0,))
    grad_z = x.new_empty(0) if z is None else like(z)
    y = like(x) if gated else x.new_empty(0)
    return like(x), like(dt), like(A), like(B), like(C), like(D), grad_z, like(dt_bias), state, y


def _setup(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, initial, offsets, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.initial = initial is not None
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, offsets, output[2])


def _backward(ctx, grad_y, grad_final, _):
    x, dt, A, B, C, D, z, dt_bias, offsets, kept = ctx.saved_tensors
    gradients = selective_scan_backward_op(
        grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, ctx.initial, offsets, kept, False
    )[:-1]
    present = (True, True, True, True, True, D is not None, z is not None, dt_bias is not None, ctx.initial)
    return *(gradient if there else None for gradient, there in zip(gradients, present, strict=True)), None, None


selective_scan_op.register_autograd(_backward, setup_context=_setup)
