"""Triton kernels of `causal_conv`.

A program is one warp with a block of neighbouring channels of one chunk of time of one sequence. It walks along time,
`K` rows at a turn, whose loads are issued together, a turn ahead; the last W - 1 rows stay in registers, so that each
row is read once but for the few around a chunk's ends. What is before a sequence's first row comes from `initial`.

Letters: T rows of time a batch row, E channels, W taps, CH channels a program, slot: a chunk's place among all chunks.
Offsets of rows are int64.
"""

import triton
import triton.language as tl

from milonga.ops.gpu.triton_parts import chunk_of, sigmoid


@triton.jit
def taps_of(weight, e, live, W: tl.constexpr, PADDED: tl.constexpr):
    """The W taps, each fp32 `[CH]`: read as rows, since a read per tap would touch every cache line W times."""
    k = tl.arange(0, PADDED)
    tile = tl.load(weight + e[:, None] * W + k[None, :], mask=live[:, None] & (k < W)[None, :], other=0.0)
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.sum(tl.where((k == i)[None, :], tile.to(tl.float32), 0.0), 1),)
    return taps


@triton.jit
def columns_before(x, x_step, initial, position, total, sequence, e, E, live, W: tl.constexpr, INITIAL: tl.constexpr):
    """The W - 1 rows before `position` of a sequence, fp32, oldest first (one of zeros for W = 1); x: its first row.

    A chunk without rows may begin beyond the sequence's end: it gets zeros for what is not there.
    """
    columns = ()
    for i in tl.static_range(W - 1):
        at = position + (i - (W - 1))
        value = tl.load(x + at * x_step + e, mask=live & (at >= 0) & (at < total), other=0.0).to(tl.float32)
        if INITIAL:
            place = sequence.to(tl.int64) * (W - 1) + at + (W - 1)
            value += tl.load(initial + place * E + e, mask=live & (at < 0), other=0.0).to(tl.float32)
        columns = columns + (value,)
    if W == 1:
        columns = (tl.zeros_like(e).to(tl.float32),)
    return columns


@triton.jit
def rows_of(pointer, stride, row, end, live, K: tl.constexpr):
    """K rows from `row` on, at `pointer`; zeros from `end` on."""
    values = ()
    for k in tl.static_range(K):
        values = values + (tl.load(pointer + k * stride, mask=live & (row + k < end), other=0.0),)
    return values


@triton.jit
def weighted(columns, value, taps, bias, W: tl.constexpr):
    """bias + sum over k of taps[k] times the column W - 1 - k steps back."""
    total = bias
    for k in tl.static_range(W - 1):
        total = tl.fma(columns[k], taps[k], total)
    return tl.fma(value, taps[W - 1], total)


@triton.jit
def shifted(columns, value, W: tl.constexpr):
    """The columns one step on."""
    later = ()
    for k in tl.static_range(1, W - 1):
        later = later + (columns[k],)
    return later + (value,)


@triton.jit(do_not_specialize=["T", "sequences", "length"])
def conv_forward(
    x, weight, bias, initial, bounds, y, final, T, E, sequences, length, x_step,
    W: tl.constexpr, PADDED: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of a chunk; the last chunk of a sequence copies the columns that the sequence leaves behind."""
    blocks = tl.cdiv(E, CH)
    sequence, chunk, chunks, origin, total = chunk_of(tl.program_id(0) // blocks, bounds, T, sequences, length, PACKED)
    e = (tl.program_id(0) % blocks) * CH + tl.arange(0, CH)
    live = e < E
    taps = taps_of(weight, e, live, W, PADDED)
    shift = tl.zeros([CH], tl.float32)
    if BIAS:
        shift = tl.load(bias + e, mask=live, other=0.0).to(tl.float32)
    start = chunk.to(tl.int64) * length
    steps = tl.minimum(tl.maximum(total - start, 0), length).to(tl.int32)
    x += origin * x_step
    columns = columns_before(x, x_step, initial, start, total, sequence, e, E, live, W, INITIAL)
    x_at = x + start * x_step + e
    y_at = y + (origin + start) * E + e
    values = rows_of(x_at, x_step, 0, steps, live, K)
    for turn in range((steps + K - 1) // K):
        step = turn * K
        coming = rows_of(x_at + K * x_step, x_step, step + K, steps, live, K)
        for k in tl.static_range(K):
            value = values[k].to(tl.float32)
            out = weighted(columns, value, taps, shift, W)
            columns = shifted(columns, value, W)
            if SILU:
                out = out * sigmoid(out)
            tl.store(y_at + k * E, out, mask=live & (step + k < steps))
        x_at += K * x_step
        y_at += K * E
        values = coming
    if chunk == chunks - 1:
        for i in tl.static_range(W - 1):
            at = total + (i - (W - 1))
            value = tl.load(x + at * x_step + e, mask=live & (at >= 0), other=0.0)
            place = sequence.to(tl.int64) * (W - 1)
            if INITIAL:
                before = tl.load(initial + (place + at + (W - 1)) * E + e, mask=live & (at < 0), other=0.0)
                value = tl.where(at < 0, before, value)
            tl.store(final + (place + i) * E + e, value, mask=live)


@triton.jit(do_not_specialize=["T", "sequences", "length"])
def conv_backward(
    grad_y, grad_final, x, weight, bias, initial, bounds, grad_x, partial, grad_initial,
    T, E, sequences, length, g_step, x_step, out_step,
    W: tl.constexpr, PADDED: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, Y: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's rows, of `initial` for a sequence's first chunk, and the chunk's part in the sums.

    The walk goes W - 1 rows beyond the chunk: at step t the slope of row t is known (the gradient of the sum before
    the activation), and with it the gradient of row t - (W - 1), of which the first W - 1 are those of `initial`.
    """
    blocks = tl.cdiv(E, CH)
    slot = tl.program_id(0) // blocks
    sequence, chunk, _, origin, total = chunk_of(slot, bounds, T, sequences, length, PACKED)
    e = (tl.program_id(0) % blocks) * CH + tl.arange(0, CH)
    live = e < E
    taps = taps_of(weight, e, live, W, PADDED)
    zero = tl.zeros([CH], tl.float32)
    shift = zero
    if BIAS:
        shift = tl.load(bias + e, mask=live, other=0.0).to(tl.float32)
    start = chunk.to(tl.int64) * length
    steps = tl.minimum(tl.maximum(total - start, 0), length).to(tl.int32)
    # rows from `start` on that the walk reads
    known = tl.minimum(tl.maximum(total - start, 0), length + (W - 1)).to(tl.int32)
    x += origin * x_step
    columns = columns_before(x, x_step, initial, start, total, sequence, e, E, live, W, INITIAL)
    x_at = x + start * x_step + e
    g_at = grad_y + (origin + start) * g_step + e
    out_at = grad_x + (origin + start - (W - 1)) * out_step + e
    kept = sequence.to(tl.int64) * (W - 1)
    slopes = (zero,)
    for _ in tl.static_range(W - 2):
        slopes = slopes + (zero,)
    sums = (zero,)
    for _ in tl.static_range(W):
        sums = sums + (zero,)
    values = rows_of(x_at, x_step, 0, known, live, K)
    upstream = rows_of(g_at, g_step, 0, known, live & Y, K)
    for turn in range((steps + (W - 1) + K - 1) // K):
        step = turn * K
        coming = rows_of(x_at + K * x_step, x_step, step + K, known, live, K)
        coming_g = rows_of(g_at + K * g_step, g_step, step + K, known, live & Y, K)
        for k in tl.static_range(K):
            t = step + k
            value = values[k].to(tl.float32)
            slope = upstream[k].to(tl.float32)
            if SILU:
                out = weighted(columns, value, taps, shift, W)
                s = sigmoid(out)
                slope = slope * s * tl.fma(out, 1.0 - s, 1.0)
                slope = tl.where(t < known, slope, 0.0)  # not 0 times what is not finite
            own = tl.where(t < steps, slope, 0.0)
            grown = ()
            for i in tl.static_range(W - 1):
                grown = grown + (tl.fma(own, columns[i], sums[i]),)
            sums = grown + (tl.fma(own, value, sums[W - 1]), sums[W] + own)
            d_x = slope * taps[0]
            for i in tl.static_range(1, W):
                d_x = tl.fma(slopes[W - 1 - i], taps[i], d_x)
            q = t - (W - 1)
            if FINAL:
                place = start + q - total + (W - 1)
                there = live & (place >= 0) & (q < steps)
                d_x += tl.load(grad_final + (kept + place) * E + e, mask=there, other=0.0).to(tl.float32)
            tl.store(out_at + k * out_step, d_x, mask=live & (q >= 0) & (q < steps))
            if INITIAL:
                tl.store(grad_initial + (kept + t) * E + e, d_x, mask=live & (q < 0) & (chunk == 0))
            columns = shifted(columns, value, W)
            slopes = shifted(slopes, slope, W)
        x_at += K * x_step
        g_at += K * g_step
        out_at += K * out_step
        values = coming
        upstream = coming_g
    partial += slot.to(tl.int64) * (W + 1) * E + e
    for i in tl.static_range(W + 1):
        # a sequence without rows adds nothing, not 0 times what its initial state holds
        tl.store(partial + i * E, tl.where(steps > 0, sums[i], 0.0), mask=live)


@triton.jit(do_not_specialize=["slots"])
def conv_sums(partial, grad_weight, grad_bias, slots, E, W: tl.constexpr, CH: tl.constexpr, ROWS: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """Sums of the chunks' parts in a fixed order: `[slots, W + 1, E]` -> weights `[E W]`, bias `[E]`."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    live = e < E
    tap = tl.program_id(1)
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, CH], tl.float32)
    for row in range(0, slots, ROWS):
        place = (row + r).to(tl.int64) * (W + 1) + tap
        total += tl.load(partial + place[:, None] * E + e[None, :], mask=(row + r < slots)[:, None] & live[None, :],
                         other=0.0)  # fmt: skip
    result = tl.sum(total, 0)
    tl.store(grad_weight + e * W + tap, result, mask=live & (tap < W))
    if BIAS:
        tl.store(grad_bias + e, result, mask=live & (tap == W))
