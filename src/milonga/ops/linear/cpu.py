"""Numba kernels of `linear` for a few rows: what decoding spends its time on is reading the weights once.

A job is a block of output features; each weight row is read once for all rows of x, and every dot product is one
thread's, so results do not depend on the number of threads.
"""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import EMPTY, flat

FEATURES = 16  # a job's outputs
# No nnan or ninf: a NaN that goes in comes out.
_MATH = {"nsz", "contract", "reassoc"}
# Elementary operations a weight for the pool's estimate: a thread reads 10 to 25 GB/s, and computes in its shadow.
_WORK = {torch.float32: 0.5, torch.bfloat16: 0.3, torch.int8: 0.2}


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _full(x, weight, _, y, first, last):
    count, width = x.shape
    features = weight.shape[0]
    for f in range(first * FEATURES, min(features, last * FEATURES)):
        row = weight[f]
        for r in range(count):
            total = np.float32(0.0)
            for d in range(width):
                total += x[r, d] * row[d]
            y[r, f] = total


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _half(x, weight, _, y, first, last):
    """Weights are the upper halves of fp32 numbers."""
    count, width = x.shape
    features = weight.shape[0]
    for f in range(first * FEATURES, min(features, last * FEATURES)):
        row = weight[f]
        for r in range(count):
            total = np.float32(0.0)
            for d in range(width):
                total += x[r, d] * np.uint32(np.uint32(row[d]) << np.uint32(16)).view(np.float32)
            y[r, f] = total


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _whole(x, weight, scale, y, first, last):
    """Weights are whole numbers times the scale of their feature."""
    count, width = x.shape
    features = weight.shape[0]
    for f in range(first * FEATURES, min(features, last * FEATURES)):
        row = weight[f]
        for r in range(count):
            total = np.float32(0.0)
            for d in range(width):
                total += x[r, d] * np.float32(row[d])
            y[r, f] = total * scale[f]


_KERNELS = {torch.float32: _full, torch.bfloat16: _half, torch.int8: _whole}


def forward(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`x [R D]` fp32 times `weight [F D]` (fp32, bf16, or int8 with `scale [F]` fp32): -> `[R F]` fp32."""
    features = weight.shape[0]
    y = torch.empty(x.shape[0], features, dtype=torch.float32)
    stored = weight.detach().contiguous()
    array = stored.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else stored.numpy()
    jobs = -(-features // FEATURES)
    work = int(weight.numel() * (1 + 0.2 * x.shape[0]) * _WORK[weight.dtype])
    factors = EMPTY if scale is None else flat(scale)
    cpu_pool.run(_KERNELS[weight.dtype], jobs, work, x.detach().contiguous().numpy(), array, factors, y.numpy())
    return y


def compile_kernels() -> None:
    """Compile the product for all three kinds of weights, for the cache."""
    x, weight = torch.zeros(1, 2), torch.zeros(1, 2)
    forward(x, weight, None)
    forward(x, weight.bfloat16(), None)
    forward(x, weight.to(torch.int8), torch.ones(1))
