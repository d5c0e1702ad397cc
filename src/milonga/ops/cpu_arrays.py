"""Tensors as the flat fp32 arrays that the Numba kernels take.

A kernel sees every input as a one-dimensional contiguous array and a row stride, so that a slice of a wider tensor (the
halves of a projection) needs no copy and each kernel is compiled once. Lower precisions are widened to fp32 at this door.
"""

import numpy as np
import torch
from torch import Tensor


def flat(tensor: Tensor) -> np.ndarray:
    """All of `tensor` as a contiguous fp32 array `[numel]` (no copy where it is one already)."""
    return tensor.detach().to(torch.float32).contiguous().view(-1).numpy()


def rows(tensor: Tensor, width: int) -> tuple[np.ndarray, int]:
    """`[..., width]` as (flat fp32 array, stride between rows); element (r, e) is at `r * stride + e`.

    No copy is made where the rows are evenly spaced and the last dimension is contiguous.
    """
    values = tensor.detach()
    if values.dtype != torch.float32:
        values = values.to(torch.float32)
    stride = _row_stride(values)
    if stride is None:
        values = values.contiguous()
        stride = width
    count = values.numel() // width if width else 0
    if count == 0:
        return np.empty(0, np.float32), width
    return values.as_strided(((count - 1) * stride + width,), (1,)).numpy(), stride


def _row_stride(tensor: Tensor) -> int | None:
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
