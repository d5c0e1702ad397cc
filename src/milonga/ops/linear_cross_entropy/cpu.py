"""`linear_cross_entropy` on the CPU: PyTorch's matrix product by chunks of rows, Numba for what follows each product.

A job of the kernels is a block of rows; the gradient of the weight is summed over chunks in order.
"""

from collections.abc import Iterator
from typing import Any

import numba as nb
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat

ROWS = 4
LANES = 64  # partial maxima and sums of a row, side by side so that they vectorise in a fixed order
_WORK = 2  # operations per logit for the pool's estimate
# No nnan or ninf: a NaN that goes in comes out. No reassoc: it would fold the rounding inside `_exp2` away.
_MATH = {"nsz", "arcp", "contract", "afn"}
_LOG2E = np.float32(1.4426950408889634)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, which then lies in the low bits


@intrinsic
def _bits(_: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""
    return nb.int32(nb.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(_: Any, value: Any) -> Any:
    """The float32 with these bits."""
    return nb.float32(nb.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@nb.njit(nogil=True, fastmath=_MATH, inline="always")
def _exp2(value):
    """2^value: 0 below -126.5, infinite above 127.5, NaN for NaN; else within 2e-7 of the value."""
    # Both comparisons are false for NaN, which so passes on.
    value = np.float32(-127.0) if value < np.float32(-127.0) else value
    value = np.float32(128.0) if value > np.float32(128.0) else value
    shifted = value + _MAGIC
    f = value - (shifted - _MAGIC)
    p = np.float32(1.535336206e-4) * f + np.float32(1.339887456e-3)
    p = p * f + np.float32(9.618437358e-3)
    p = p * f + np.float32(5.550332471e-2)
    p = p * f + np.float32(2.402264791e-1)
    p = p * f + np.float32(6.931472029e-1)
    p = p * f + np.float32(1.0)
    return p * _from_bits((_bits(shifted) + np.int32(127)) << np.int32(23))


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _forward(logits, width, targets, ignore, losses, totals, first, last):
    """Loss of each row, and the natural logarithm of its sum of exponentials, from logits `[count, width]`."""
    count = targets.shape[0]
    peaks = np.empty(LANES, np.float32)
    sums = np.empty(LANES, np.float32)
    whole = width - width % LANES
    for job in range(first, last):
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            values = logits[row * width : (row + 1) * width]
            for lane in range(LANES):
                peaks[lane] = np.float32(-np.inf)
                sums[lane] = np.float32(0.0)
            for at in range(0, whole, LANES):
                for lane in range(LANES):
                    peaks[lane] = values[at + lane] if values[at + lane] > peaks[lane] else peaks[lane]
            peak = np.float32(-np.inf)
            for lane in range(LANES):
                peak = peaks[lane] if peaks[lane] > peak else peak
            for at in range(whole, width):
                peak = values[at] if values[at] > peak else peak
            for at in range(0, whole, LANES):
                for lane in range(LANES):
                    sums[lane] += _exp2((values[at + lane] - peak) * _LOG2E)
            for at in range(whole, width):
                sums[at - whole] += _exp2((values[at] - peak) * _LOG2E)
            total = np.float64(0.0)
            for lane in range(LANES):
                total += sums[lane]
            totals[row] = peak + np.log(total)
            target = targets[row]
            losses[row] = np.float32(0.0) if target == ignore else np.log(total) - (values[target] - peak)


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _backward(logits, width, targets, ignore, grad, totals, first, last):
    """Logits `[count, width]` become their gradients in place."""
    count = targets.shape[0]
    for job in range(first, last):
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            values = logits[row * width : (row + 1) * width]
            target = targets[row]
            total = totals[row]
            upstream = grad[row]
            if target == ignore:
                for d in range(width):
                    values[d] = np.float32(0.0)
            else:
                for d in range(width):
                    values[d] = upstream * _exp2((values[d] - total) * _LOG2E)
                values[target] -= upstream


def _chunks(rows: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """-> (which rows, those rows of x in fp32, their logits in fp32) by turns; the logits share one buffer."""
    count, vocabulary = rows.shape[0], weight.shape[0]
    buffer = torch.empty(min(chunk, count), vocabulary, dtype=torch.float32)
    for start in range(0, count, chunk):
        part = rows[start : start + chunk].to(torch.float32)
        # Products with `out` are left alone by autocast, which would take them in half precision.
        logits = torch.mm(part, weight.T, out=buffer[: part.shape[0]])
        if bias is not None:
            logits += bias
        yield slice(start, start + part.shape[0]), part, logits


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::linear_cross_entropy` on the CPU."""
    rows, ids = x.reshape(-1, x.shape[-1]), targets.contiguous().view(-1).numpy()
    losses = torch.empty(targets.shape, dtype=torch.float32)
    totals = torch.empty(targets.shape, dtype=torch.float32)
    flat_losses, flat_totals = flat(losses), flat(totals)
    width = weight.shape[0]
    for part, _, logits in _chunks(rows, weight.to(torch.float32), bias, chunk):
        arguments = (flat(logits), width, ids[part], ignore_index, flat_losses[part], flat_totals[part])
        cpu_pool.run(_forward, -(-logits.shape[0] // ROWS), logits.numel() * _WORK, *arguments)
    return losses, totals


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `milonga::linear_cross_entropy_backward` on the CPU."""
    rows, ids = x.reshape(-1, x.shape[-1]), targets.contiguous().view(-1).numpy()
    wide_weight = weight.to(torch.float32)
    grad_x = torch.empty(rows.shape, dtype=torch.float32)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
    grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32)
    upstream, flat_totals = flat(grad), flat(totals)
    width = weight.shape[0]
    for part, values, logits in _chunks(rows, wide_weight, bias, chunk):
        arguments = (flat(logits), width, ids[part], ignore_index, upstream[part], flat_totals[part])
        cpu_pool.run(_backward, -(-logits.shape[0] // ROWS), logits.numel() * _WORK, *arguments)
        torch.mm(logits, wide_weight, out=grad_x[part])
        torch.addmm(grad_weight, logits.T, values, out=grad_weight)
        if bias is not None:
            grad_bias += logits.sum(0)
    bias_dtype = torch.float32 if bias is None else bias.dtype
    return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def compile_kernels() -> None:
    """Compile both passes, for the cache."""
    x, weight, targets = torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1, dtype=torch.int64)
    losses, totals = forward(x, weight, targets, None, -100, 1)
    backward(losses, x, weight, targets, None, totals, -100, 1)
