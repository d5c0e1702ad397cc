"""Numba kernels of `window_attention`.

Thirty-two query rows (pairs of a step and one of the heads that share a key head) lie side by side in the lanes of
two vectors, so maxima, sums and exponentials need no work across lanes, and keys and values are read in place, one
scalar at a time, wherever they lie. Keys are taken in blocks that start at multiples of `KEYS` in absolute position, in
order, and every sum is one chain of multiply-adds: what a query gets does not depend on how the text was cut.
"""

from typing import Any

import numba as nb
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows
from milonga.segments import sequence_bounds

VECTOR = 16  # fp32 lanes of a vector: one register with AVX-512, two with AVX2, four with NEON
LANES = 2 * VECTOR  # query rows a chunk
KEYS = 64  # keys a block, at most
SPAN = 512  # least number of steps that one job of the backward pass takes
LOG2E = 1.4426950408889634
_NO_WINDOW = 1 << 40

# ---- vectors ---------------------------------------------------------------------------------------------------------


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="milonga_float32x16")


_vector = _Vector()
_LLVM_VECTOR = ir.VectorType(ir.FloatType(), VECTOR)
_LLVM_INTEGERS = ir.VectorType(ir.IntType(32), VECTOR)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _LLVM_VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_LLVM_VECTOR, [float(np.float32(value))] * VECTOR)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_LLVM_INTEGERS, [value] * VECTOR)


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to `array[index]` of a flat array, without bounds or sign checks."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _spread(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_LLVM_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_LLVM_VECTOR, ir.Undefined), _integers(0))


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_LLVM_VECTOR, [_LLVM_VECTOR] * 3)
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fma.v{VECTOR}f32"), [a, b, c])


@intrinsic
def _load(_, array, index):
    """`array[index : index + 16]`."""

    def generate(context, builder, signature, arguments):
        pointer = _element(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(pointer, _LLVM_VECTOR.as_pointer()), align=4)

    return _vector(array, types.intp), generate


@intrinsic
def _store(_, array, index, value):
    """`array[index : index + 16] = value`."""

    def generate(context, builder, signature, arguments):
        pointer = _element(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, _LLVM_VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), generate


@intrinsic
def _broadcast(_, array, index):
    """`array[index]` in every lane."""

    def generate(context, builder, signature, arguments):
        return _spread(builder, builder.load(_element(context, builder, signature.args[0], *arguments)))

    return _vector(array, types.intp), generate


@intrinsic
def _splat(_, value):
    """A scalar in every lane."""

    def generate(context, builder, signature, arguments):
        return _spread(builder, arguments[0])

    return _vector(types.float32), generate


@intrinsic
def _fma(_, a, b, c):
    """`a * b + c`, rounded once."""
    return _vector(_vector, _vector, _vector), lambda context, builder, signature, args: _fused(builder, *args)


@intrinsic
def _multiply(_, a, b):
    return _vector(_vector, _vector), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def _add(_, a, b):
    return _vector(_vector, _vector), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def _subtract(_, a, b):
    return _vector(_vector, _vector), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def _larger(_, a, b):
    """`b` where it is larger, else `a`: a NaN in b does not count as larger."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", arguments[1], arguments[0]), arguments[1], arguments[0])

    return _vector(_vector, _vector), generate


@intrinsic
def _finite_or_zero(_, a):
    """`a`, with 0 in place of minus infinity."""

    def generate(context, builder, signature, arguments):
        return builder.select(
            builder.fcmp_unordered("==", arguments[0], _constant(-np.inf)), _constant(0.0), arguments[0]
        )

    return _vector(_vector), generate


# 2^f for |f| <= 1/2, least relative error among degree 6 (2e-9, far below half a unit in the last place).
_EXP2 = (1.535336206303743e-4, 1.339887455720480e-3, 9.618437358234807e-3, 5.550332470783281e-2)
_EXP2 = (*_EXP2, 2.402264791361571e-1, 6.931472028552120e-1, 1.0)


@intrinsic
def _exp2(_, a):
    """`2 ** a` for a <= 127; exactly 0 below -126.5; NaN where a is NaN."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        # An ordered comparison is false for NaN, which so passes on; 2^-127 comes out as 0 because its bits are 0.
        value = builder.select(builder.fcmp_ordered("<", value, _constant(-127.0)), _constant(-127.0), value)
        # Adding 1.5 * 2^23 rounds to a whole number, which then lies in the low bits.
        magic = _constant(12582912.0)
        shifted = builder.fadd(value, magic)
        fraction = builder.fsub(value, builder.fsub(shifted, magic))
        result = _constant(_EXP2[0])
        for coefficient in _EXP2[1:]:
            result = _fused(builder, result, fraction, _constant(coefficient))
        exponent = builder.add(builder.bitcast(shifted, _LLVM_INTEGERS), _integers(127))
        power = builder.bitcast(builder.shl(exponent, _integers(23)), _LLVM_VECTOR)
        return builder.fmul(result, power)

    return _vector(_vector), generate


# ---- pieces of the kernels -------------------------------------------------------------------------------------------


@nb.njit(nogil=True)
def _panel(a, a0, a_row, a_step, count, steps, b, b0, b_step, c, c0, c_row):
    """`c[i, :32] += sum over n of a[i, n] * b[n, :32]` for i < count, n < steps, in order of n.

    Element (i, n) of a is at `a0 + i * a_row + n * a_step`; row n of b at `b0 + n * b_step`; row i of c at
    `c0 + i * c_row`. Four rows at a time keep eight sums in registers.
    """
    i = 0
    while i + 4 <= count:
        p0 = c0 + i * c_row
        p1 = p0 + c_row
        p2 = p1 + c_row
        p3 = p2 + c_row
        s00 = _load(c, p0)
        s01 = _load(c, p0 + VECTOR)
        s10 = _load(c, p1)
        s11 = _load(c, p1 + VECTOR)
        s20 = _load(c, p2)
        s21 = _load(c, p2 + VECTOR)
        s30 = _load(c, p3)
        s31 = _load(c, p3 + VECTOR)
        x = a0 + i * a_row
        y = b0
        for _ in range(steps):
            left = _load(b, y)
            right = _load(b, y + VECTOR)
            factor = _broadcast(a, x)
            s00 = _fma(factor, left, s00)
            s01 = _fma(factor, right, s01)
            factor = _broadcast(a, x + a_row)
            s10 = _fma(factor, left, s10)
            s11 = _fma(factor, right, s11)
            factor = _broadcast(a, x + 2 * a_row)
            s20 = _fma(factor, left, s20)
            s21 = _fma(factor, right, s21)
            factor = _broadcast(a, x + 3 * a_row)
            s30 = _fma(factor, left, s30)
            s31 = _fma(factor, right, s31)
            x += a_step
            y += b_step
        _store(c, p0, s00)
        _store(c, p0 + VECTOR, s01)
        _store(c, p1, s10)
        _store(c, p1 + VECTOR, s11)
        _store(c, p2, s20)
        _store(c, p2 + VECTOR, s21)
        _store(c, p3, s30)
        _store(c, p3 + VECTOR, s31)
        i += 4
    while i < count:
        p0 = c0 + i * c_row
        s00 = _load(c, p0)
        s01 = _load(c, p0 + VECTOR)
        x = a0 + i * a_row
        y = b0
        for _ in range(steps):
            factor = _broadcast(a, x)
            s00 = _fma(factor, _load(b, y), s00)
            s01 = _fma(factor, _load(b, y + VECTOR), s01)
            x += a_step
            y += b_step
        _store(c, p0, s00)
        _store(c, p0 + VECTOR, s01)
        i += 1


@nb.njit(nogil=True)
def _clear(c, start, count):
    """`c[start : start + count] = 0`, count a multiple of 16."""
    zero = _splat(np.float32(0.0))
    for i in range(start, start + count, VECTOR):
        _store(c, i, zero)


@nb.njit(nogil=True)
def _run_end(key, last, position, slots):
    """End of the run of keys from absolute position `key` on that lie one after the other in memory, at most `last`."""
    if key >= position:
        return last
    return min(last, position, key - key % slots + slots)


@nb.njit(nogil=True)
def _mask(scores, first_key, count, steps, window):
    """Minus infinity in place of the scores `[count, 32]` of keys that the query of a lane does not see."""
    for j in range(count):
        key = first_key + j
        for m in range(LANES):
            distance = steps[m] - key
            value = scores[j * LANES + m]
            scores[j * LANES + m] = value if distance >= 0 and distance < window else np.float32(-np.inf)


@nb.njit(nogil=True)
def _spoiled(values, start, stride, count, width):
    """How many elements of `values` `[count, width]` are not finite."""
    total = 0
    for j in range(count):
        row = values[start + j * stride : start + j * stride + width]
        for d in range(width):
            total += (row[d] - row[d]) != np.float32(0.0)
    return total


@nb.njit(nogil=True)
def _weigh_spoiled(values, start, stride, count, width, weights, first, key, steps, window, clean, sums):
    """As the panel of values and weights, where some values are not finite: those reach only queries that see them."""
    for j in range(count):
        for d in range(width):
            value = values[start + j * stride + d]
            clean[j * width + d] = value if value - value == np.float32(0.0) else np.float32(0.0)
    _panel(clean, 0, 1, width, width, count, weights, first * LANES, LANES, sums, 0, LANES)
    for j in range(count):
        for d in range(width):
            value = values[start + j * stride + d]
            if value - value != np.float32(0.0):
                for m in range(LANES):
                    if 0 <= steps[m] - key - j < window:
                        sums[d * LANES + m] += value


@nb.njit(nogil=True)
def _gather(source, stride, head_width, start, group, repeats, chunk, length, width, factor, across):
    """32 rows of `source`, times `factor`, into the lanes of `across` `[width, 32]`; zeros past the sequence's end."""
    for m in range(LANES):
        index = chunk * LANES + m
        if index < length * repeats:
            at = (start + index // repeats) * stride + (group * repeats + index % repeats) * head_width
            for d in range(width):
                across[d * LANES + m] = source[at + d] * factor
        else:
            for d in range(width):
                across[d * LANES + m] = np.float32(0.0)


@nb.njit(nogil=True)
def _turn(across, width, factor, along, along_width):
    """`across` `[width, 32]`, times `factor`, turned into rows `along` `[32, along_width]`, padded with zeros."""
    for m in range(LANES):
        for d in range(width):
            along[m * along_width + d] = across[d * LANES + m] * factor
        for d in range(width, along_width):
            along[m * along_width + d] = np.float32(0.0)


@nb.njit(nogil=True)
def _lane_steps(chunk, length, repeats, position, steps):
    """Absolute position of the query in each lane; lanes past the end repeat the last query."""
    for m in range(LANES):
        steps[m] = position + min(chunk * LANES + m, length * repeats - 1) // repeats


# ---- the kernels -----------------------------------------------------------------------------------------------------


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _forward(
    q, q_stride, k, k_stride, v, v_stride, past_k, past_k_stride, past_v, past_v_stride,
    bounds, positions, sizes, window, factor, y, stats, first, last,
):  # fmt: skip
    """A job is one chunk of one sequence for one key head.

    `stats` `[2, rows, H]` receives the largest score (base 2), then one over the sum of exponentials.
    """
    heads, groups, width, value_width, slots = sizes
    peaks = stats[: stats.shape[0] // 2]
    shares = stats[stats.shape[0] // 2 :]
    repeats = heads // groups
    across = np.empty(width * LANES, np.float32)
    scores = np.empty(KEYS * LANES, np.float32)
    sums = np.empty(value_width * LANES, np.float32)
    clean = np.empty(KEYS * value_width, np.float32)
    lane_peaks = np.empty(LANES, np.float32)
    lane_totals = np.empty(LANES, np.float32)
    steps = np.empty(LANES, np.int64)
    sequence = -1
    before = 0
    chunks = 0
    for job in range(first, last):
        group = job % groups
        while job // groups >= before + chunks:
            before += chunks
            sequence += 1
            chunks = -(-(bounds[sequence + 1] - bounds[sequence]) * repeats // LANES)
        # Chunks from both ends by turns: with no window the late ones cost more, and threads take runs of jobs.
        chunk = job // groups - before
        chunk = chunk // 2 if chunk % 2 == 0 else chunks - 1 - chunk // 2
        start = bounds[sequence]
        length = bounds[sequence + 1] - start
        position = positions[sequence]
        _gather(q, q_stride, width, start, group, repeats, chunk, length, width, factor, across)
        _lane_steps(chunk, length, repeats, position, steps)
        _clear(sums, 0, value_width * LANES)
        low_step = steps[0]
        end = steps[LANES - 1] + 1
        key = max(0, position - slots, low_step - window + 1)
        peak0 = _splat(np.float32(-np.inf))
        peak1 = peak0
        total0 = _splat(np.float32(0.0))
        total1 = total0
        while key < end:
            block_end = min(end, key - key % KEYS + KEYS)
            count = block_end - key
            _clear(scores, 0, count * LANES)
            at = key
            while at < block_end:
                run = _run_end(at, block_end, position, slots)
                target = (at - key) * LANES
                if at < position:
                    source = (sequence * slots + at % slots) * past_k_stride + group * width
                    _panel(past_k, source, past_k_stride, 1, run - at, width, across, 0, LANES, scores, target, LANES)
                else:
                    source = (start + at - position) * k_stride + group * width
                    _panel(k, source, k_stride, 1, run - at, width, across, 0, LANES, scores, target, LANES)
                at = run
            partial = block_end - 1 > low_step or end - 1 - key >= window
            if partial:
                _mask(scores, key, count, steps, window)
            old0 = peak0
            old1 = peak1
            for j in range(0, count * LANES, LANES):
                peak0 = _larger(peak0, _load(scores, j))
                peak1 = _larger(peak1, _load(scores, j + VECTOR))
            # Where nothing was seen yet the peak is minus infinity; it must not be subtracted from itself.
            base0 = _finite_or_zero(peak0)
            base1 = _finite_or_zero(peak1)
            shrink0 = _exp2(_subtract(old0, base0))
            shrink1 = _exp2(_subtract(old1, base1))
            total0 = _multiply(total0, shrink0)
            total1 = _multiply(total1, shrink1)
            for j in range(0, count * LANES, LANES):
                weight0 = _exp2(_subtract(_load(scores, j), base0))
                weight1 = _exp2(_subtract(_load(scores, j + VECTOR), base1))
                total0 = _add(total0, weight0)
                total1 = _add(total1, weight1)
                _store(scores, j, weight0)
                _store(scores, j + VECTOR, weight1)
            for d in range(0, value_width * LANES, LANES):
                _store(sums, d, _multiply(_load(sums, d), shrink0))
                _store(sums, d + VECTOR, _multiply(_load(sums, d + VECTOR), shrink1))
            at = key
            while at < block_end:
                run = _run_end(at, block_end, position, slots)
                if at < position:
                    values = past_v
                    value_stride = past_v_stride
                    source = (sequence * slots + at % slots) * past_v_stride + group * value_width
                else:
                    values = v
                    value_stride = v_stride
                    source = (start + at - position) * v_stride + group * value_width
                if partial and _spoiled(values, source, value_stride, run - at, value_width):
                    _weigh_spoiled(
                        values, source, value_stride, run - at, value_width, scores, at - key, at, steps, window,
                        clean, sums,
                    )  # fmt: skip
                else:
                    _panel(
                        values, source, 1, value_stride, value_width, run - at, scores, (at - key) * LANES, LANES,
                        sums, 0, LANES,
                    )  # fmt: skip
                at = run
            key = block_end
        _store(lane_peaks, 0, peak0)
        _store(lane_peaks, VECTOR, peak1)
        _store(lane_totals, 0, total0)
        _store(lane_totals, VECTOR, total1)
        for m in range(min(LANES, length * repeats - chunk * LANES)):
            index = chunk * LANES + m
            head = (start + index // repeats) * heads + group * repeats + index % repeats
            share = np.float32(1.0) / lane_totals[m]
            peaks[head] = lane_peaks[m]
            shares[head] = share
            for d in range(value_width):
                y[head * value_width + d] = sums[d * LANES + m] * share


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _backward(
    grad, grad_stride, q, q_stride, k, k_stride, v, v_stride, past_k, past_k_stride, past_v, past_v_stride,
    bounds, positions, job_sequences, job_chunks, span, sizes, window, scale, y, stats,
    grad_q, grad_k, grad_v, grad_past_k, grad_past_v, first, last,
):  # fmt: skip
    """A job is a span of chunks of one sequence for one key head; spans at work at the same time share no key.

    The gradients of keys and values have rows padded to a multiple of 32 and start at zero.
    """
    heads, groups, width, value_width, slots = sizes
    peaks = stats[: stats.shape[0] // 2]
    shares = stats[stats.shape[0] // 2 :]
    repeats = heads // groups
    along_width = -(-width // LANES) * LANES
    value_along = -(-value_width // LANES) * LANES
    factor = np.float32(scale * np.float32(LOG2E))
    across = np.empty(width * LANES, np.float32)
    along = np.empty(along_width * LANES, np.float32)
    grad_across = np.empty(value_width * LANES, np.float32)
    grad_along = np.empty(value_along * LANES, np.float32)
    y_across = np.empty(value_width * LANES, np.float32)
    query_sums = np.empty(width * LANES, np.float32)
    weights = np.empty(KEYS * LANES, np.float32)
    slopes = np.empty(KEYS * LANES, np.float32)
    bases = np.empty(LANES, np.float32)
    lane_shares = np.empty(LANES, np.float32)
    dots = np.empty(LANES, np.float32)
    steps = np.empty(LANES, np.int64)
    for job in range(first, last):
        group = job % groups
        sequence = job_sequences[job // groups]
        start = bounds[sequence]
        length = bounds[sequence + 1] - start
        position = positions[sequence]
        first_chunk = job_chunks[job // groups]
        chunks = -(-length * repeats // LANES)
        for chunk in range(first_chunk, min(chunks, first_chunk + span)):
            lanes = min(LANES, length * repeats - chunk * LANES)
            _gather(q, q_stride, width, start, group, repeats, chunk, length, width, np.float32(1.0), across)
            _turn(across, width, scale, along, along_width)
            for d in range(0, width * LANES, VECTOR):
                _store(across, d, _multiply(_load(across, d), _splat(factor)))
            _gather(
                grad, grad_stride, value_width, start, group, repeats, chunk, length, value_width, np.float32(1.0),
                grad_across,
            )  # fmt: skip
            _turn(grad_across, value_width, np.float32(1.0), grad_along, value_along)
            _lane_steps(chunk, length, repeats, position, steps)
            _gather(
                y, heads * value_width, value_width, start, group, repeats, chunk, length, value_width, np.float32(1.0),
                y_across,
            )  # fmt: skip
            # In the same order as the panel multiplies values: where a query sees one key its slope is exactly zero.
            dot0 = _splat(np.float32(0.0))
            dot1 = dot0
            for d in range(0, value_width * LANES, LANES):
                dot0 = _fma(_load(y_across, d), _load(grad_across, d), dot0)
                dot1 = _fma(_load(y_across, d + VECTOR), _load(grad_across, d + VECTOR), dot1)
            _store(dots, 0, dot0)
            _store(dots, VECTOR, dot1)
            for m in range(LANES):
                bases[m] = np.float32(0.0)
                lane_shares[m] = np.float32(0.0)
            for m in range(lanes):
                index = chunk * LANES + m
                head = (start + index // repeats) * heads + group * repeats + index % repeats
                bases[m] = peaks[head]
                lane_shares[m] = shares[head]
            _clear(query_sums, 0, width * LANES)
            end = steps[LANES - 1] + 1
            key = max(0, position - slots, steps[0] - window + 1)
            while key < end:
                block_end = min(end, key - key % KEYS + KEYS)
                count = block_end - key
                _clear(weights, 0, count * LANES)
                _clear(slopes, 0, count * LANES)
                at = key
                while at < block_end:
                    run = _run_end(at, block_end, position, slots)
                    target = (at - key) * LANES
                    if at < position:
                        slot = sequence * slots + at % slots
                        _panel(
                            past_k, slot * past_k_stride + group * width, past_k_stride, 1, run - at, width,
                            across, 0, LANES, weights, target, LANES,
                        )  # fmt: skip
                        _panel(
                            past_v, slot * past_v_stride + group * value_width, past_v_stride, 1, run - at, value_width,
                            grad_across, 0, LANES, slopes, target, LANES,
                        )  # fmt: skip
                    else:
                        row = start + at - position
                        _panel(
                            k, row * k_stride + group * width, k_stride, 1, run - at, width,
                            across, 0, LANES, weights, target, LANES,
                        )  # fmt: skip
                        _panel(
                            v, row * v_stride + group * value_width, v_stride, 1, run - at, value_width,
                            grad_across, 0, LANES, slopes, target, LANES,
                        )  # fmt: skip
                    at = run
                if block_end - 1 > steps[0] or end - 1 - key >= window:
                    _mask(weights, key, count, steps, window)
                for part in range(0, LANES, VECTOR):
                    base = _load(bases, part)
                    share = _load(lane_shares, part)
                    dot = _load(dots, part)
                    for j in range(part, count * LANES, LANES):
                        weight = _multiply(_exp2(_subtract(_load(weights, j), base)), share)
                        _store(weights, j, weight)
                        _store(slopes, j, _multiply(weight, _subtract(_load(slopes, j), dot)))
                at = key
                while at < block_end:
                    run = _run_end(at, block_end, position, slots)
                    target = (at - key) * LANES
                    if at < position:
                        slot = sequence * slots + at % slots
                        _panel(
                            past_k, slot * past_k_stride + group * width, 1, past_k_stride, width, run - at,
                            slopes, target, LANES, query_sums, 0, LANES,
                        )  # fmt: skip
                        row = slot * groups + group
                        key_sums = grad_past_k
                        value_sums = grad_past_v
                    else:
                        row = start + at - position
                        _panel(
                            k, row * k_stride + group * width, 1, k_stride, width, run - at,
                            slopes, target, LANES, query_sums, 0, LANES,
                        )  # fmt: skip
                        row = row * groups + group
                        key_sums = grad_k
                        value_sums = grad_v
                    for d in range(0, along_width, LANES):
                        _panel(
                            slopes, target, LANES, 1, run - at, lanes, along, d, along_width,
                            key_sums, row * along_width + d, groups * along_width,
                        )  # fmt: skip
                    for d in range(0, value_along, LANES):
                        _panel(
                            weights, target, LANES, 1, run - at, lanes, grad_along, d, value_along,
                            value_sums, row * value_along + d, groups * value_along,
                        )  # fmt: skip
                    at = run
                key = block_end
            for m in range(lanes):
                index = chunk * LANES + m
                head = (start + index // repeats) * heads + group * repeats + index % repeats
                for d in range(width):
                    grad_q[head * width + d] = query_sums[d * LANES + m] * scale


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _head_rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """`[..., H, K]` as (flat fp32 array, stride between steps)."""
    width = tensor.shape[-2] * tensor.shape[-1]
    # The way of a decoded byte, where looking for the stride would take longer than some of the kernel.
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor.detach().view(-1).numpy(), width
    return rows(tensor.flatten(-2), width)


class _Plan:
    """What both passes know about one call: sequences, sizes, and the inputs as flat arrays."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        position: Tensor | None,
        offsets: Tensor | None,
        window: int | None,
    ):
        batch, time, heads, width = q.shape
        groups, value_width = v.shape[2:]
        slots = 0 if past_k is None else past_k.shape[1]
        self.bounds = (sequence_bounds(batch, time, None) if offsets is None else offsets).numpy()
        self.count = self.bounds.size - 1
        self.positions = np.zeros(self.count, np.int64) if position is None else position.contiguous().numpy()
        self.sizes = (heads, groups, width, value_width, slots)
        self.window = _NO_WINDOW if window is None else min(window, _NO_WINDOW)
        past = _head_rows(k[:0]) + _head_rows(v[:0]) if past_k is None else _head_rows(past_k) + _head_rows(past_v)
        self.inputs = _head_rows(q) + _head_rows(k) + _head_rows(v) + past
        reach = min(self.window, slots + time)
        self.work = batch * time * heads * reach * (width + value_width) // VECTOR

    def chunks(self) -> np.ndarray:
        """How many chunks each sequence has, int64 [S]."""
        heads, groups = self.sizes[:2]
        return -(-(self.bounds[1:] - self.bounds[:-1]) * (heads // groups) // LANES)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::window_attention` on the CPU."""
    plan = _Plan(q, k, v, past_k, past_v, position, offsets, window)
    batch, time, heads, _ = q.shape
    groups, value_width = v.shape[2:]
    y = torch.empty(batch, time, heads, value_width, dtype=torch.float32)
    stats = torch.empty(2, batch, time, heads, dtype=torch.float32)
    repeats = heads // groups
    chunks = batch * -(-time * repeats // LANES) if offsets is None else int(plan.chunks().sum())
    cpu_pool.run(
        _forward, chunks * groups, plan.work, *plan.inputs, plan.bounds, plan.positions, plan.sizes,
        plan.window, np.float32(scale * LOG2E), y.view(-1).numpy(), stats.view(-1).numpy(),
    )  # fmt: skip
    return y.to(q.dtype), stats


def backward(
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
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `milonga::window_attention_backward` on the CPU."""
    plan = _Plan(q, k, v, past_k, past_v, position, offsets, window)
    heads, groups, width, value_width, slots = plan.sizes
    grad_q = torch.empty(q.shape, dtype=torch.float32)
    along, value_along = (-(-size // LANES) * LANES for size in (width, value_width))
    leading = k.shape[:2]
    grad_k = torch.zeros(*leading, groups, along, dtype=torch.float32)
    grad_v = torch.zeros(*leading, groups, value_along, dtype=torch.float32)
    count = plan.count if past_k is not None else 0
    grad_past_k = torch.zeros(count, slots, groups, along, dtype=torch.float32)
    grad_past_v = torch.zeros(count, slots, groups, value_along, dtype=torch.float32)
    # A span has at least `window` steps, so its keys lie in it and the one before: even spans first, then odd ones.
    chunks = plan.chunks()
    span = min(-(-max(plan.window, SPAN) * (heads // groups) // LANES), int(chunks.max(initial=1)))
    spans = -(-chunks // span)
    for parity in (0, 1):
        per_sequence = (spans + 1 - parity) // 2
        sequences = np.repeat(np.arange(plan.count), per_sequence)
        nth = np.arange(sequences.size) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
        cpu_pool.run(
            _backward, sequences.size * groups, plan.work * 3, *_head_rows(grad),
            *plan.inputs, plan.bounds, plan.positions, sequences, (2 * nth + parity) * span, span, plan.sizes,
            plan.window, np.float32(scale), flat(y), flat(stats), flat(grad_q), flat(grad_k),
            flat(grad_v), flat(grad_past_k), flat(grad_past_v),
        )  # fmt: skip
    past_dtype = q.dtype if past_k is None else past_k.dtype
    return (
        grad_q.to(q.dtype),
        grad_k[..., :width].to(q.dtype).contiguous(),
        grad_v[..., :value_width].to(q.dtype).contiguous(),
        grad_past_k[..., :width].to(past_dtype).contiguous(),
        grad_past_v[..., :value_width].to(past_dtype if past_v is None else past_v.dtype).contiguous(),
    )


def compile_kernels() -> None:
    """Compile both passes, for the cache."""
    q, k, v = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    outputs = forward(q, k, v, None, None, None, None, 2, 1.0)
    backward(q, q, k, v, None, None, None, None, 2, 1.0, *outputs)
