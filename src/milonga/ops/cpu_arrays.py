"""Tensors as the flat fp32 arrays that the Numba kernels take.

A kernel sees every input as a one-dimensional contiguous array and a row stride, so that a slice of a wider tensor
(the halves of a projection) needs no copy and each kernel is compiled once. Lower precisions are widened to fp32 at
this door.
"""

import numpy as np
import torch
from torch import Tensor

# What a kernel gets for an argument that is absent.
EMPTY = np.empty(0, np.float32)


def flat(tensor: Tensor | None) -> np.ndarray:
    """All of `tensor` as a contiguous fp32 array `[numel]` (no copy where it is one already); empty if it is None."""
    if tensor is None:
        return EMPTY
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().view(-1).numpy()


def rows(tensor: Tensor | None, width: int) -> tuple[np.ndarray, int]:
    """`[..., width]` as (flat fp32 array, stride between rows); element (r, e) is at `r * stride + e`.

    No copy is made where the rows are evenly spaced and the last dimension is contiguous. None gives an empty array.
    """
    if tensor is None:
        return EMPTY, width
    values = tensor.detach() if tensor.requires_grad else tensor
    if values.dtype != torch.float32:
        values = values.to(torch.float32)
    if values.is_contiguous():
        return values.view(-1).numpy(), width
    stride = row_stride(values)
    if stride is None:
        values = values.contiguous()
        stride = width
    count = values.numel() // width if width else 0
    if count == 0:
        return EMPTY, width
    return values.as_strided(((count - 1) * stride + width,), (1,)).numpy(), stride


def row_stride(tensor: Tensor) -> int | None:
    """The one distance between consecutive rows of `[..., width]`, or None where the rows are not evenly spaced."""
    if tensor.ndim < 2:
        return tensor.shape[-1] if tensor.is_contiguous() else None
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return None
    stride = None
    span = 1
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step // span if step % span == 0 else None
            if stride is None:
                return None
        if step != stride * span:
            return None
        span *= size
    return tensor.shape[-1] if stride is None else (stride if stride >= tensor.shape[-1] else None)
