"""A product whose outputs go different ways, with a backward pass that never joins their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from milonga.ops.autocast import autocast_dtype


class Split(torch.autograd.Function):
    """`(x @ weight^T).split(sizes, -1)`. Each gradient is multiplied where it lies, into one sum.

    PyTorch's own derivative first copies the gradients side by side: for the input projections of a Samba layer that
    is as much traffic as the layer's norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return F.linear(x, weight).split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = None
        grad_weight = torch.empty_like(weight) if need_weight else None
        first = 0
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            part = slice(first, first + size)
            first += size
            if gradient is None:
                if grad_weight is not None:
                    grad_weight[part].zero_()
                continue
            upstream = gradient.reshape(-1, size)
            if need_x:
                grad_x = upstream @ weight[part] if grad_x is None else grad_x.addmm_(upstream, weight[part])
            if grad_weight is not None:
                torch.mm(upstream.t(), rows, out=grad_weight[part])
        if need_x and grad_x is None:
            grad_x = torch.zeros_like(rows)
        return None if grad_x is None else grad_x.view(x.shape), grad_weight, None


def split_product(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`x [..., D]`, `weight [F, D]` -> views `[..., size]` of one product, in autocast's dtype where it is on."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    return Split.apply(x, weight, tuple(sizes))
