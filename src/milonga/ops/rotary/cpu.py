"""Numba kernel of `rotary`, for both passes: the gradient is turned back. A job is a block of rows."""

import math
from functools import lru_cache

import numba as nb
import numpy as np
import torch
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows

ROWS = 64
NEAR = 64  # positions whose turns are tabled: position = NEAR * far + near
_WORK = 2  # operations per element for the pool's estimate


@nb.njit(nogil=True, cache=True, fastmath={"nsz", "contract"})
def _rotate(x, stride, positions, frequencies, near_cos, near_sin, sign, heads, count, y, first, last):
    """A turn is a far times a near turn in float64: a function of the position alone, without a sine for each row."""
    half = frequencies.shape[0]
    width = 2 * half
    far_cos = np.empty(half, np.float64)
    far_sin = np.empty(half, np.float64)
    cos = np.empty(half, np.float32)
    sin = np.empty(half, np.float32)
    for job in range(first, last):
        far = 0
        known = False
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            position = positions[row % positions.shape[0]]
            if not known or position // NEAR != far:
                far = position // NEAR
                known = True
                for i in range(half):
                    angle = np.float64(far * NEAR) * frequencies[i]
                    far_cos[i] = math.cos(angle)
                    far_sin[i] = math.sin(angle)
            near = (position - far * NEAR) * half
            for i in range(half):
                cos[i] = far_cos[i] * near_cos[near + i] - far_sin[i] * near_sin[near + i]
                sin[i] = (far_sin[i] * near_cos[near + i] + far_cos[i] * near_sin[near + i]) * sign
            for head in range(heads):
                source = x[row * stride + head * width : row * stride + (head + 1) * width]
                target = y[(row * heads + head) * width : (row * heads + head + 1) * width]
                for i in range(half):
                    target[i] = source[i] * cos[i] - source[half + i] * sin[i]
                    target[half + i] = source[half + i] * cos[i] + source[i] * sin[i]


@lru_cache(maxsize=16)
def _tables(width: int, base: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies `[K / 2]`, and cosine and sine of the angles of positions below `NEAR`; float64, flat."""
    frequencies = np.power(float(base), -np.arange(0, width, 2, dtype=np.float64) / max(width, 1))
    angles = np.outer(np.arange(NEAR), frequencies)
    return frequencies, np.cos(angles).ravel(), np.sin(angles).ravel()


def rotate(x: Tensor, positions: Tensor, base: float, sign: float) -> Tensor:
    """Kernel of `milonga::rotary` on the CPU."""
    batch, time, heads, width = x.shape
    count = batch * time if x.numel() else 0
    y = torch.empty(x.shape, dtype=torch.float32)
    arguments = (*rows(x.flatten(2), heads * width), positions.contiguous().view(-1).numpy(), *_tables(width, base))
    cpu_pool.run(_rotate, -(-count // ROWS), x.numel() * _WORK, *arguments, float(sign), heads, count, flat(y))
    return y.to(x.dtype)


def compile_kernels() -> None:
    """Compile the kernel, for the cache."""
    rotate(torch.zeros(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64), 10000.0, 1.0)
