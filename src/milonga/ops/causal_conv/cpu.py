"""Numba kernels of `causal_conv`. A job is a block of rows of the batch laid flat; the last job serves the states.

Every row is computed by the same sequence of operations wherever its block, its sequence or its piece begins, so that
results do not depend on how a text was cut or packed.
"""

import numba as nb
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows
from milonga.segments import sequence_bounds

# Rows a job: fixed, so that the partial sums of the weight's gradient do not depend on the number of threads.
ROWS = 64
# Channels at a time: the taps, the rows they read and the sums stay in the first-level cache.
TILE = 512
# No nnan or ninf: a NaN that goes in comes out. No reassoc: it would fold the rounding in `_sigmoid` away. Divisions as
# in numpy: a test for zero before each would keep the loops from vectors.
_MATH = {"nsz", "arcp", "contract", "afn"}
_f = np.float32


@intrinsic
def _exponent(typing, value):
    """The fp32 number whose sign and exponent are the low nine bits of `value`."""

    def lower(context, builder, sig, args):
        bits = builder.shl(builder.bitcast(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 23))
        return builder.bitcast(bits, ir.FloatType())

    return nb.float32(nb.float32), lower


@nb.njit(fastmath=_MATH, error_model="numpy")
def _sigmoid(v):
    v = v * _f(-1.4426950408889634)
    if v < _f(-127.0):
        v = _f(-127.0)
    if v > _f(128.0):
        v = _f(128.0)
    s = v + _f(12582912.0 + 127)  # 1.5 * 2^23 rounds to an integer, then in the low bits
    r = v - (s - _f(12582912.0 + 127))
    p = _f(0.00133006158) * r + _f(0.00966969412)  # 2^r on [-1/2, 1/2], relative error 1.05e-7
    p = p * r + _f(0.05550558493)
    p = p * r + _f(0.2402228266)
    p = p * r + _f(0.69314718056)
    p = p * r + _f(1.0)
    return _f(1.0) / (_f(1.0) + p * _exponent(s))


@nb.njit(fastmath=_MATH, error_model="numpy")
def _sum_row(out, x, step, weight, bias, initial, row, first_row, sequence, left, count, width, taps):
    """out[:count] = the sum before the activation of channels `left ..`, at `row` of the sequence from `first_row`."""
    if bias.shape[0]:
        out[:count] = bias[left : left + count]
    else:
        out[:count] = _f(0.0)
    for k in range(taps):
        source_row = row - (taps - 1) + k
        if source_row >= first_row:
            start = source_row * step + left
            source = x[start : start + count]
        else:
            start = (sequence * (taps - 1) + source_row - first_row + taps - 1) * width + left
            source = initial[start : start + count]
        factors = weight[k * width + left : k * width + left + count]
        for e in range(count):
            out[e] += source[e] * factors[e]


@nb.njit(fastmath=_MATH, error_model="numpy")
def _to_sum(out, grad, start, count):
    """Turn the sums of a row into gradients of these sums, given the upstream gradient at `grad[start:]`."""
    upstream = grad[start : start + count]
    for e in range(count):
        s = _sigmoid(out[e])
        out[e] = upstream[e] * s * (_f(1.0) + out[e] * (_f(1.0) - s))


@nb.njit
def _sequence_of(bounds, row):
    """The sequence that row belongs to (the one that is not empty)."""
    low, high = 0, bounds.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        if bounds[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _forward(x, step, weight, bias, initial, bounds, width, taps, silu, y, final, first, last):
    total, kept = bounds[bounds.shape[0] - 1], taps - 1
    blocks = (total + ROWS - 1) // ROWS
    out = np.empty(TILE, np.float32)
    for job in range(first, last):
        if job == blocks:
            for sequence in range(bounds.shape[0] - 1):
                for i in range(kept):
                    target = final[(sequence * kept + i) * width : (sequence * kept + i + 1) * width]
                    row = bounds[sequence + 1] - kept + i
                    if row >= bounds[sequence]:
                        target[:] = x[row * step : row * step + width]
                    else:
                        start = (sequence * kept + row - bounds[sequence] + kept) * width
                        target[:] = initial[start : start + width]
            continue
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            sequence = _sequence_of(bounds, job * ROWS)
            for row in range(job * ROWS, min(total, (job + 1) * ROWS)):
                while row >= bounds[sequence + 1]:
                    sequence += 1
                _sum_row(out, x, step, weight, bias, initial, row, bounds[sequence], sequence, left, count, width, taps)
                target = y[row * width + left : row * width + left + count]
                if silu:
                    for e in range(count):
                        target[e] = out[e] * _sigmoid(out[e])
                else:
                    target[:] = out[:count]


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _backward(
    grad, grad_step, grad_final, x, step, weight, bias, initial, bounds, width, taps, silu,
    grad_x, grad_weight, grad_bias, grad_initial, first, last,
):  # fmt: skip
    total, kept = bounds[bounds.shape[0] - 1], taps - 1
    blocks = (total + ROWS - 1) // ROWS
    # Gradients of the sums of a block's rows and of the rows after it that read the block.
    slopes = np.empty((ROWS + kept, TILE), np.float32)
    for job in range(first, last):
        if job == blocks:
            _initial(
                grad, grad_step, grad_final, x, step, weight, bias, initial, bounds, width, taps, silu, slopes,
                grad_initial,
            )  # fmt: skip
            continue
        top, bottom = job * ROWS, min(total, (job + 1) * ROWS)
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            sequence = _sequence_of(bounds, top)
            end = min(total, bottom + kept)
            for row in range(top, end):
                while row >= bounds[sequence + 1]:
                    sequence += 1
                slope = slopes[row - top]
                if silu:
                    _sum_row(
                        slope, x, step, weight, bias, initial, row, bounds[sequence], sequence, left, count, width, taps
                    )
                    _to_sum(slope, grad, row * grad_step + left, count)
                else:
                    slope[:count] = grad[row * grad_step + left : row * grad_step + left + count]
            for k in range(taps):
                start = (job * taps + k) * width + left
                grad_weight[start : start + count] = _f(0.0)
            grad_bias[job * width + left : job * width + left + count] = _f(0.0)
            sequence = _sequence_of(bounds, top)
            for row in range(top, bottom):
                while row >= bounds[sequence + 1]:
                    sequence += 1
                slope = slopes[row - top]
                sums = grad_bias[job * width + left : job * width + left + count]
                for e in range(count):
                    sums[e] += slope[e]
                target = grad_x[row * width + left : row * width + left + count]
                i = row - bounds[sequence + 1] + kept
                if i >= 0 and grad_final.shape[0]:
                    start = (sequence * kept + i) * width + left
                    target[:] = grad_final[start : start + count]
                else:
                    target[:] = _f(0.0)
                for k in range(taps):
                    source_row = row - kept + k
                    if source_row >= bounds[sequence]:
                        start = source_row * step + left
                        source = x[start : start + count]
                    else:
                        start = (sequence * kept + source_row - bounds[sequence] + kept) * width + left
                        source = initial[start : start + count]
                    start = (job * taps + k) * width + left
                    sums = grad_weight[start : start + count]
                    for e in range(count):
                        sums[e] += slope[e] * source[e]
                    reader = row + kept - k
                    if reader < bounds[sequence + 1]:
                        later = slopes[reader - top]
                        factors = weight[k * width + left : k * width + left + count]
                        for e in range(count):
                            target[e] += later[e] * factors[e]


@nb.njit(fastmath=_MATH, error_model="numpy")
def _initial(
    grad, grad_step, grad_final, x, step, weight, bias, initial, bounds, width, taps, silu, slopes, grad_initial
):
    """Gradients of the columns before each sequence."""
    kept = taps - 1
    for sequence in range(bounds.shape[0] - 1 if grad_initial.shape[0] else 0):
        top = bounds[sequence]
        length = bounds[sequence + 1] - top
        for left in range(0, width, TILE):
            count = min(TILE, width - left)
            for p in range(min(kept, length)):
                slope, row = slopes[p], top + p
                if silu:
                    _sum_row(slope, x, step, weight, bias, initial, row, top, sequence, left, count, width, taps)
                    _to_sum(slope, grad, row * grad_step + left, count)
                else:
                    slope[:count] = grad[row * grad_step + left : row * grad_step + left + count]
            for i in range(kept):
                start = (sequence * kept + i) * width + left
                target = grad_initial[start : start + count]
                if i >= length and grad_final.shape[0]:
                    start = (sequence * kept + i - length) * width + left
                    target[:] = grad_final[start : start + count]
                else:
                    target[:] = _f(0.0)
                for k in range(i + 1):
                    if i - k < length:
                        slope = slopes[i - k]
                        factors = weight[k * width + left : k * width + left + count]
                        for e in range(count):
                            target[e] += slope[e] * factors[e]


def _bounds(x: Tensor, offsets: Tensor | None) -> Tensor:
    return sequence_bounds(x.shape[0], x.shape[1], None) if offsets is None else offsets


def _columns(x: Tensor, initial: Tensor | None, sequences: int, kept: int) -> Tensor:
    if initial is not None:
        return initial
    return torch.zeros((sequences, kept, x.shape[2]), dtype=torch.float32)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::causal_conv` on the CPU."""
    bounds = _bounds(x, offsets)
    width, taps = weight.shape
    sequences = bounds.numel() - 1
    before = _columns(x, initial, sequences, taps - 1)
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty((sequences, taps - 1, width), dtype=torch.float32)
    inputs = (*rows(x, width), flat(weight.t()), flat(bias), flat(before), bounds.numpy(), width, taps, silu)
    jobs = -(-x.shape[0] * x.shape[1] // ROWS) + 1
    cpu_pool.run(_forward, jobs, x.numel() * (taps + 4) // 4, *inputs, flat(y), flat(final))
    return y.to(x.dtype), final.to(x.dtype)


def backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `milonga::causal_conv_backward` on the CPU: gradients of x, weight, bias, initial.

    That of an absent argument is an empty tensor.
    """
    bounds = _bounds(x, offsets)
    width, taps = weight.shape
    sequences = bounds.numel() - 1
    before = _columns(x, initial, sequences, taps - 1)
    blocks = -(-x.shape[0] * x.shape[1] // ROWS)
    grad_x = torch.empty(x.shape, dtype=torch.float32)
    grad_weight = torch.empty((blocks, taps, width), dtype=torch.float32)
    grad_bias = torch.empty((blocks, width), dtype=torch.float32)
    grad_initial = torch.empty(before.shape if initial is not None else (0,), dtype=torch.float32)
    upstream = torch.zeros(x.shape, dtype=torch.float32) if grad_y is None else grad_y
    inputs = (*rows(upstream, width), flat(grad_final), *rows(x, width), flat(weight.t()), flat(bias), flat(before))
    outputs = (grad_x, grad_weight, grad_bias, grad_initial)
    work = x.numel() * (taps + 4) // 2
    cpu_pool.run(_backward, blocks + 1, work, *inputs, bounds.numpy(), width, taps, silu, *map(flat, outputs))
    return (
        grad_x.to(x.dtype),
        grad_weight.sum(0).t().contiguous().to(weight.dtype),
        grad_x.new_empty(0) if bias is None else grad_bias.sum(0).to(bias.dtype),
        grad_initial.to(x.dtype),
    )


def compile_kernels() -> None:
    """Compile both kernels (or load them from Numba's cache) by running them on a few numbers."""
    x, weight = torch.zeros(1, 1, 1), torch.zeros(1, 2)
    _, final = forward(x, weight, None, None, None, True)
    backward(x, final, x, weight, None, None, None, True)
