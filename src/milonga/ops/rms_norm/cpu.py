"""Numba kernels of `rms_norm`. A job is a block of rows; the weight's gradient is summed per block in fixed order."""

import numba as nb
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows

# Rows a job: fixed, so that the partial sums of the weight's gradient do not depend on the number of threads.
ROWS = 64
_WORK = 2  # elementary operations per element, for the pool's estimate
# No nnan or ninf: a NaN that goes in comes out.
_MATH = {"nsz", "arcp", "contract", "afn", "reassoc"}


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _forward(x, stride, weight, eps, y, scale, first, last):
    width = weight.shape[0]
    count = scale.shape[0]
    for job in range(first, last):
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            source = x[row * stride : row * stride + width]
            target = y[row * width : (row + 1) * width]
            total = np.float32(0.0)
            for d in range(width):
                total += source[d] * source[d]
            factor = np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)
            scale[row] = factor
            for d in range(width):
                target[d] = source[d] * factor * weight[d]


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _backward(grad, grad_stride, x, stride, weight, scale, grad_x, partial, first, last):
    width = weight.shape[0]
    count = scale.shape[0]
    for job in range(first, last):
        sums = partial[job * width : (job + 1) * width]
        for d in range(width):
            sums[d] = np.float32(0.0)
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            source = x[row * stride : row * stride + width]
            upstream = grad[row * grad_stride : row * grad_stride + width]
            target = grad_x[row * width : (row + 1) * width]
            factor = scale[row]
            dot = np.float32(0.0)
            for d in range(width):
                dot += upstream[d] * weight[d] * source[d]
            shift = dot * factor * factor * factor / np.float32(width)
            for d in range(width):
                target[d] = upstream[d] * weight[d] * factor - source[d] * shift
                sums[d] += upstream[d] * source[d] * factor


@intrinsic
def _floats(typing, address):
    """An address as a pointer to fp32 numbers."""

    def lower(context, builder, sig, args):
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return nb.types.CPointer(nb.float32)(nb.int64), lower


@nb.njit(nogil=True, cache=True, fastmath=_MATH)
def _few(x, residual, weight, y, total, eps, count, width):
    """The norm of a few rows, of x or, unless its address is 0, of x + residual; all but the last three are addresses.

    To unpack seven tensors for Numba takes longer than to read a row.
    """
    factors = nb.carray(_floats(weight), width)
    for row in range(count):
        source = nb.carray(_floats(x + 4 * width * row), width)
        target = nb.carray(_floats(y + 4 * width * row), width)
        if residual:
            added = nb.carray(_floats(residual + 4 * width * row), width)
            summed = nb.carray(_floats(total + 4 * width * row), width)
            for d in range(width):
                summed[d] = source[d] + added[d]
            source = summed
        squares = np.float32(0.0)
        for d in range(width):
            squares += source[d] * source[d]
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for d in range(width):
            target[d] = source[d] * factor * factors[d]


def few(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (norm of `x` or of `x + residual`, that sum or x): fp32, contiguous, and for the calling thread alone."""
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    added = 0 if residual is None else residual.data_ptr()
    count = x.numel() // width if width else 0
    _few(x.data_ptr(), added, weight.data_ptr(), y.data_ptr(), total.data_ptr(), np.float32(eps), count, width)
    return y, total


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm` on the CPU."""
    width = weight.numel()
    count = x.numel() // width if width else 0
    y = torch.empty(x.shape, dtype=torch.float32)
    scale = torch.empty(count, dtype=torch.float32)
    source, stride = rows(x, width)
    jobs = -(-count // ROWS)
    cpu_pool.run(_forward, jobs, x.numel() * _WORK, source, stride, flat(weight), np.float32(eps), flat(y), flat(scale))
    return y.to(x.dtype), scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm_backward` on the CPU."""
    width = weight.numel()
    jobs = -(-scale.numel() // ROWS)
    grad_x = torch.empty(x.shape, dtype=torch.float32)
    partial = torch.empty(jobs, width, dtype=torch.float32)
    source, stride = rows(x, width)
    upstream, grad_stride = rows(grad, width)
    arguments = (upstream, grad_stride, source, stride, flat(weight), flat(scale), flat(grad_x), flat(partial))
    cpu_pool.run(_backward, jobs, x.numel() * _WORK * 2, *arguments)
    return grad_x.to(x.dtype), partial.sum(0)


def compile_kernels() -> None:
    """Compile both passes, for the cache."""
    x, weight = torch.zeros(1, 2), torch.zeros(2)
    _, scale = forward(x, weight, 1e-5)
    backward(x, x, weight, scale)
    few(x, x, weight, 1e-5)
