"""`window_attention` as a PyTorch operator: shapes for compilers, its derivative, and a kernel per device."""

from typing import Any

import torch
from torch import Tensor

from milonga.ops.backend import kernels
from milonga.ops.custom_op import custom_op


@custom_op("window_attention", "cpu")
def window_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """-> (y `[B T H V]`; what the backward pass needs of each query's softmax, fp32 `[2 B T H]`, different per device).

    On a CPU the largest score in base 2, then one over the sum of exponentials.
    """
    return kernels("window_attention", "cpu").forward(q, k, v, past_k, past_v, position, offsets, window, scale)


@window_attention_op.register_kernel("cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return kernels("window_attention", "triton").forward(q, k, v, past_k, past_v, position, offsets, window, scale)


@window_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return y, q.new_empty(2, *q.shape[:3], dtype=torch.float32)


@custom_op("window_attention_backward", "cpu")
def window_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, v, past_k and past_v (the last two empty where there is no past)."""
    return kernels("window_attention", "cpu").backward(
        grad, q, k, v, past_k, past_v, position, offsets, window, scale, y, stats
    )


@window_attention_backward_op.register_kernel("cuda")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels("window_attention", "triton").backward(
        grad, q, k, v, past_k, past_v, position, offsets, window, scale, y, stats, deterministic
    )


@window_attention_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    deterministic: bool,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    past = [
        like.new_empty(0, 0, *like.shape[2:]) if given is None else given.new_empty(given.shape)
        for like, given in ((k, past_k), (v, past_v))
    ]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), past[0], past[1]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, past_k, past_v, position, offsets, ctx.window, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, past_k, past_v, position, offsets, *output)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    *inputs, y, stats = ctx.saved_tensors
    gradients = window_attention_backward_op(grad, *inputs, ctx.window, ctx.scale, ctx.deterministic, y, stats)
    past = (None, None) if inputs[3] is None else gradients[3:]
    return *gradients[:3], *past, None, None, None, None, None


window_attention_op.register_autograd(_backward, setup_context=_setup)
