"""`rotary` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

from typing import Any

from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


@custom_op("rotary", "cpu")
def rotary_op(x: Tensor, positions: Tensor, base: float, sign: float) -> Tensor:
    """-> x turned by `sign` (1 or -1) times the angles, contiguous."""
    return kernels("rotary", "cpu").rotate(x, positions, base, sign)


@rotary_op.register_kernel("cuda")
def _(x: Tensor, positions: Tensor, base: float, sign: float) -> Tensor:
    return kernels("rotary", "triton").rotate(x, positions, base, sign)


@rotary_op.register_fake
def _(x: Tensor, positions: Tensor, base: float, sign: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: Tensor) -> None:
    _, positions, ctx.base, ctx.sign = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return rotary_op(grad, ctx.saved_tensors[0], ctx.base, -ctx.sign), None, None, None


rotary_op.register_autograd(_backward, setup_context=_setup)
