"""Triton kernels of `window_attention`: blockwise softmax over the keys that a block of queries sees, both passes.

Keys have one axis n from -held to steps - 1: n >= 0 are the piece's own, n < 0 come from the ring, where the key n lies
in slot `(head + n) mod P` with `head = position mod P` and `held = min(position, P)`. The query t sees the keys
t - window + 1 .. t. Blocks of keys outside that are never visited; blocks wholly inside take no mask.

A forward program has BM queries of one head and walks blocks of BN keys. In the backward pass one program walks the
queries that see its BN keys, in all heads that share them, for the gradients of keys and values, and another the keys
of its BM queries for theirs: twice the scores, but no sum over programs and hence the same bits every time.

Letters: T steps a row of the batch, P slots, K and V widths of keys and values padded to powers of two, WK and WV the
true ones, GROUP heads that share keys, slot: a block's place among all blocks of a packed batch. Offsets of rows are
int64.
"""

import triton
import triton.language as tl

MINUS = tl.constexpr(float("-inf"))
# sizes that may take any value without being compiled for
FREE = ("T", "sequences", "window", "P", "heads", "low", "high")


@triton.jit
def sequence_of(slot, bounds, sequences, length):
    """The sequence to whose blocks `slot` belongs: sequence s, starting in row r, has those from r // length + s on."""
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(bounds + middle) // length + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def place_of(index, outer, bounds, T, sequences, length, low, PACKED: tl.constexpr):
    """-> (sequence, row of the batch, its first step there, its steps, first step of the block).

    Blocks are counted from the step `low` on, a multiple of their length, but for packed sequences from their begin.
    """
    if PACKED:
        sequence = sequence_of(index, bounds, sequences, length)
        first = tl.load(bounds + sequence)
        steps = (tl.load(bounds + sequence + 1) - first).to(tl.int32)
        block = (index - (first // length + sequence)).to(tl.int32) * length
        return sequence, outer, first, steps, block
    return outer, outer, (outer * 0).to(tl.int64), T, low + index * length


@triton.jit
def ring_of(position, sequence, P, PAST: tl.constexpr):
    """-> (keys that the ring holds, slot of the key before the first of the piece, plus one)."""
    if PAST:
        at = tl.load(position + sequence)
        return tl.minimum(at, P).to(tl.int32), (at % P).to(tl.int32)
    return 0, 0


@triton.jit
def tile(base, rows, stride, columns, ok, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASK: tl.constexpr):
    """`[rows, PADDED]` at `base + rows * stride`; zeros where not `ok` (if MASK) and beyond WIDTH."""
    places = base + rows[:, None] * stride + columns[None, :]
    if MASK:
        if WIDTH == PADDED:
            return tl.load(places, mask=ok[:, None], other=0.0)
        return tl.load(places, mask=ok[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if WIDTH == PADDED:
        return tl.load(places)
    return tl.load(places, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def key_tile(
    base, n, held, head, P, steps, stride, row, start, columns,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, MASK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The keys or values from `start` on, of the ring (`start` < 0) or of the piece, which begins in `row` of base."""
    if RING:
        at = start + n
        slot = head + at
        slot = tl.where(slot < 0, slot + P, slot).to(tl.int64)
        return tile(base, slot, stride, columns, (at >= -held) & (at < 0), WIDTH, PADDED, True)
    return tile(base + (row + start) * stride, n, stride, columns, start + n < steps, WIDTH, PADDED, MASK)


@triton.jit
def visible(t, n, held, steps, window):
    """Whether the query t sees the key n. Both broadcast."""
    return (n <= t) & (t - n < window) & (n >= -held) & (t < steps)


@triton.jit
def attend(acc, total, peak, q, k, v, seen, scale, MASK: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the running softmax of BM queries; scores are in base 2.

    A weight of zero times NaN is NaN. CAREFUL takes every NaN of v out and puts it back where its key is seen.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        scores = tl.where(seen, scores, MINUS)
        above = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = tl.where(above == MINUS, 0.0, above)
    else:
        above = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = above
    shares = tl.exp2(scores * scale - base[:, None])
    keep = tl.exp2(peak - base)
    total = total * keep + tl.sum(shares, 1)
    acc = acc * keep[:, None]
    if CAREFUL:
        spoiled = v != v
        touched = tl.dot(seen.to(v.dtype), spoiled.to(v.dtype), input_precision=PRECISION) > 0.5
        acc = tl.where(touched, float("nan"), acc)
        v = tl.where(spoiled, 0.0, v)
    acc = tl.dot(shares.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, above


@triton.jit
def attend_whole_past(
    acc, total, peak, q, k_base, v_base, cols, k_at, v_at, count, scale, k_step, v_step,
    K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first `count` slots, a multiple of BN, that every query sees: without a window keys lie in their order."""
    for _ in range(0, count, BN):
        k_tile = tile(k_base, cols, k_step, k_at, cols >= 0, WK, K, False)
        v_tile = tile(v_base, cols, v_step, v_at, cols >= 0, WV, V, False)
        acc, total, peak = attend(acc, total, peak, q, k_tile, v_tile, None, scale, False, False, PRECISION)
        k_base += BN * k_step
        v_base += BN * v_step
    return acc, total, peak


@triton.jit
def attend_past(
    acc, total, peak, q, k_base, v_base, t, cols, k_at, v_at, first, held, head, P, steps, window, scale,
    k_step, v_step, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, BN: tl.constexpr,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys `first` .. -1 of the ring."""
    for n in tl.range(first, 0, BN, num_stages=1 if CAREFUL else None):
        k_tile = key_tile(k_base, cols, held, head, P, 0, k_step, 0, n, k_at, WK, K, True, True)
        v_tile = key_tile(v_base, cols, held, head, P, 0, v_step, 0, n, v_at, WV, V, True, True)
        at = (n + cols)[None, :]
        seen = visible(t[:, None], at, held, steps, window) & (at < 0)
        acc, total, peak = attend(acc, total, peak, q, k_tile, v_tile, seen, scale, True, CAREFUL, PRECISION)
    return acc, total, peak


@triton.jit
def attend_cut(
    acc, total, peak, q, k_base, v_base, t, cols, k_at, v_at, first, whole, edge, end, row, steps, window, scale,
    k_step, v_step, K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, BN: tl.constexpr,
    CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The piece's keys from `first` to `whole` and from `edge` to `end`, with a mask.

    The pipeline's buffers and addresses of these few blocks would take registers from all others: one stage.
    """
    cut = (tl.minimum(whole, end) - first + BN - 1) // BN
    for i in tl.range(cut + (tl.maximum(end - edge, 0) + BN - 1) // BN, num_stages=1):
        n = tl.where(i < cut, first + i * BN, edge + (i - cut) * BN)
        k_tile = key_tile(k_base, cols, 0, 0, 0, steps, k_step, row, n, k_at, WK, K, True, False)
        v_tile = key_tile(v_base, cols, 0, 0, 0, steps, v_step, row, n, v_at, WV, V, True, False)
        seen = visible(t[:, None], (n + cols)[None, :], 0, steps, window)
        acc, total, peak = attend(acc, total, peak, q, k_tile, v_tile, seen, scale, True, CAREFUL, PRECISION)
    return acc, total, peak


@triton.jit
def ends_of_queries(t0, steps, window, BM: tl.constexpr, BN: tl.constexpr):
    """Multiples of BN that cut the piece's keys for the queries t0 .. t0 + BM - 1: before `first` none is seen, from
    `whole` to `edge` all are seen by all, from `end` on none."""
    first = tl.maximum(t0 - window + 1, 0) // BN * BN
    whole = (tl.maximum(t0 + BM - window, 0) + BN - 1) // BN * BN
    edge = tl.maximum((t0 + 1) // BN * BN, whole)
    end = tl.minimum(t0 + BM, steps)
    return first, whole, edge, end


@triton.jit(do_not_specialize=FREE)
def attention_forward(
    q, k, v, past_k, past_v, position, bounds, y, stats, T, sequences, window, scale, P, heads, low, high,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    pk_row, pk_step, pk_head, pv_row, pv_step, pv_head,
    K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr, PAST: tl.constexpr, ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y `[B T H WV]` contiguous, and of each query the logarithm (base 2) of its sum of exponentials, `[B H T]`.

    Of every sequence the blocks that begin in `low` .. `high` - 1. ALL: there is no window, and the past is a buffer
    that never wraps.
    """
    # the last queries of a sequence see the most keys: they go first
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    sequence, row, first_row, steps, t0 = place_of(index, tl.program_id(2), bounds, T, sequences, BM, low, PACKED)
    if (t0 < low) | (t0 >= tl.minimum(steps, high)):
        return
    held, head = ring_of(position, sequence, P, PAST)
    g = h // GROUP
    row = row.to(tl.int64)
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    k_at = tl.arange(0, K)
    v_at = tl.arange(0, V)
    t = t0 + rows
    k_base = k + row * k_row + g.to(tl.int64) * k_head
    v_base = v + row * v_row + g.to(tl.int64) * v_head
    q_base = q + row * q_row + (first_row + t0) * q_step + h.to(tl.int64) * q_head
    q_tile = tile(q_base, rows, q_step, k_at, t < steps, WK, K, True)
    acc = tl.zeros([BM, V], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], MINUS, tl.float32)
    pk_base = past_k + sequence.to(tl.int64) * pk_row + g.to(tl.int64) * pk_head
    pv_base = past_v + sequence.to(tl.int64) * pv_row + g.to(tl.int64) * pv_head
    oldest = tl.maximum(-held, t0 - window + 1)
    if PAST:
        rest = oldest
        if ALL:
            rest = held // BN * BN - held
            acc, total, peak = attend_whole_past(
                acc, total, peak, q_tile, pk_base, pv_base, cols, k_at, v_at, held + rest, scale, pk_step, pv_step,
                K, V, WK, WV, BN, PRECISION,
            )  # fmt: skip
        acc, total, peak = attend_past(
            acc, total, peak, q_tile, pk_base, pv_base, t, cols, k_at, v_at, rest, held, head, P, steps, window,
            scale, pk_step, pv_step, K, V, WK, WV, BN, False, PRECISION,
        )  # fmt: skip
    first, whole, edge, end = ends_of_queries(t0, steps, window, BM, BN)
    for n in range(whole, edge, BN):
        k_tile = key_tile(k_base, cols, held, head, P, steps, k_step, first_row, n, k_at, WK, K, False, False)
        v_tile = key_tile(v_base, cols, held, head, P, steps, v_step, first_row, n, v_at, WV, V, False, False)
        acc, total, peak = attend(acc, total, peak, q_tile, k_tile, v_tile, None, scale, False, False, PRECISION)
    acc, total, peak = attend_cut(
        acc, total, peak, q_tile, k_base, v_base, t, cols, k_at, v_at, first, whole, edge, end, first_row, steps,
        window, scale, k_step, v_step, K, V, WK, WV, BN, False, PRECISION,
    )  # fmt: skip
    if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
        # a NaN came in: once more, so that it reaches those alone who see it
        acc = tl.zeros([BM, V], tl.float32)
        total = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], MINUS, tl.float32)
        if PAST:
            acc, total, peak = attend_past(
                acc, total, peak, q_tile, pk_base, pv_base, t, cols, k_at, v_at, oldest, held, head, P, steps, window,
                scale, pk_step, pv_step, K, V, WK, WV, BN, True, PRECISION,
            )  # fmt: skip
        acc, total, peak = attend_cut(
            acc, total, peak, q_tile, k_base, v_base, t, cols, k_at, v_at, first, end, end, end, first_row, steps,
            window, scale, k_step, v_step, K, V, WK, WV, BN, True, PRECISION,
        )  # fmt: skip
    ok = t < steps
    total = tl.where(ok, total, 1.0)
    acc = acc / total[:, None]
    y_base = y + ((row * T + first_row + t0) * heads + h) * WV
    inside = ok[:, None] & (v_at < WV)[None, :]
    tl.store(y_base + rows[:, None] * (heads * WV) + v_at[None, :], acc.to(y.dtype.element_ty), mask=inside)
    tl.store(stats + (row * heads + h) * T + first_row + t, peak + tl.log2(total), mask=ok)


@triton.jit
def key_slopes(
    grad_k, grad_v, k_tile, v_tile, q_base, g_base, stats, dots, row, h, t0, n, held, steps, window, scale, q_step,
    g_step, rows, k_at, v_at,
    WK: tl.constexpr, K: tl.constexpr, WV: tl.constexpr, V: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries t0 .. add to the gradients of a block of keys (without the scale) and of values.

    With TMA the bases are descriptors of all rows of the batch, `row` being the first of the sequence.
    """
    t = t0 + rows
    ok = t < steps
    if TMA:
        q = q_base.load([row + t0, h * K])
        g = g_base.load([row + t0, h * V])
    else:
        q = tile(q_base + (row + t0) * q_step, rows, q_step, k_at, ok, WK, K, MASK)
        g = tile(g_base + (row + t0) * g_step, rows, g_step, v_at, ok, WV, V, MASK)
    if MASK:
        logarithm = tl.load(stats + t, mask=ok, other=0.0)
        dot = tl.load(dots + t, mask=ok, other=0.0)
    else:
        logarithm = tl.load(stats + t)
        dot = tl.load(dots + t)
    scores = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)
    shares = tl.exp2(scores * scale - logarithm[None, :])
    seen = visible(t[None, :], n[:, None], held, steps, window)
    if MASK:
        shares = tl.where(seen, shares, 0.0)
    grad_v = tl.dot(shares.to(g.dtype), g, grad_v, input_precision=PRECISION)
    slopes = shares * (tl.dot(v_tile, tl.trans(g), input_precision=PRECISION) - dot[None, :])
    if MASK:
        slopes = tl.where(seen, slopes, 0.0)
    grad_k = tl.dot(slopes.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=FREE)
def attention_backward_keys(
    q, k, v, position, bounds, grad, stats, dots, grad_k, grad_v, T, sequences, window, scale, slope_scale, P, heads,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head,
    K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr, RING: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the piece's keys and values, or with RING those of the ring, whose k, v and strides then come in.

    With TMA, of rows that are not packed, q and grad are descriptors of `[B * T, H * K]` and `[B * T, H * V]`.
    """
    groups = heads // GROUP
    g = tl.program_id(1)
    cols = tl.arange(0, BN)
    rows = tl.arange(0, BM)
    k_at = tl.arange(0, K)
    v_at = tl.arange(0, V)
    if RING:
        # a program has BN keys of one sequence's ring
        sequence = tl.program_id(2)
        if PACKED:
            row = sequence * 0
            first_row = tl.load(bounds + sequence)
            steps = (tl.load(bounds + sequence + 1) - first_row).to(tl.int32)
        else:
            row = sequence
            first_row = (sequence * 0).to(tl.int64)
            steps = T
        held, head = ring_of(position, sequence, P, True)
        n0 = tl.program_id(0) * BN - P
        at = n0 + cols
        slot = head + at
        slot = tl.where(slot < 0, slot + P, slot).to(tl.int64)
        stored = at < 0
        ok = stored & (at >= -held)
        k_places, k_span = k + sequence.to(tl.int64) * k_row + g.to(tl.int64) * k_head, slot
        v_places, v_span = v + sequence.to(tl.int64) * v_row + g.to(tl.int64) * v_head, slot
        target = sequence.to(tl.int64) * P + slot
    else:
        sequence, row, first_row, steps, n0 = place_of(
            tl.program_id(0), tl.program_id(2), bounds, T, sequences, BN, 0, PACKED
        )
        if n0 >= steps:
            return
        held = 0
        at = n0 + cols
        ok = at < steps
        stored = ok
        k_places = k + row.to(tl.int64) * k_row + (first_row + n0) * k_step + g.to(tl.int64) * k_head
        v_places = v + row.to(tl.int64) * v_row + (first_row + n0) * v_step + g.to(tl.int64) * v_head
        k_span, v_span = cols, cols
        target = row.to(tl.int64) * T + first_row + at
    row = row.to(tl.int64)
    k_tile = tile(k_places, k_span, k_step, k_at, ok, WK, K, True)
    v_tile = tile(v_places, v_span, v_step, v_at, ok, WV, V, True)
    sum_k = tl.zeros([BN, K], tl.float32)
    sum_v = tl.zeros([BN, V], tl.float32)
    # the queries that see any of these keys, and from `whole` to `edge` those that all see all
    first = tl.maximum(n0, 0)
    end = tl.minimum(n0 + BN - 1 + window, steps)
    whole = first + (tl.maximum(n0 + BN - 1 - first, 0) + BM - 1) // BM * BM
    edge = tl.maximum(first + tl.maximum(tl.minimum(n0 + window, steps) - first, 0) // BM * BM, whole)
    cut = (tl.minimum(whole, tl.maximum(end, first)) - first + BM - 1) // BM
    rest = (tl.maximum(end - edge, 0) + BM - 1) // BM
    for member in range(GROUP):
        head_at = g * GROUP + member
        h = head_at.to(tl.int64)
        line = (row * heads + h) * T + first_row
        if TMA:
            q_base, g_base = q, grad
            start = (row * T).to(tl.int32)
        else:
            q_base = q + row * q_row + h * q_head
            g_base = grad + row * g_row + h * g_head
            start = first_row
        for i in range(cut + rest):
            t0 = tl.where(i < cut, first + i * BM, edge + (i - cut) * BM)
            sum_k, sum_v = key_slopes(
                sum_k, sum_v, k_tile, v_tile, q_base, g_base, stats + line, dots + line, start, head_at, t0, at, held,
                steps, window, scale, q_step, g_step, rows, k_at, v_at, WK, K, WV, V, True, TMA, PRECISION,
            )  # fmt: skip
        for t0 in range(whole, edge, BM):
            sum_k, sum_v = key_slopes(
                sum_k, sum_v, k_tile, v_tile, q_base, g_base, stats + line, dots + line, start, head_at, t0, at, held,
                steps, window, scale, q_step, g_step, rows, k_at, v_at, WK, K, WV, V, False, TMA, PRECISION,
            )  # fmt: skip
    if RING:
        sum_k = tl.where(ok[:, None], sum_k, 0.0)
        sum_v = tl.where(ok[:, None], sum_v, 0.0)
    places = (target * groups + g)[:, None]
    inside = stored[:, None]
    sum_k = (sum_k * slope_scale).to(grad_k.dtype.element_ty)
    tl.store(grad_k + places * WK + k_at[None, :], sum_k, mask=inside & (k_at < WK)[None, :])
    sum_v = sum_v.to(grad_v.dtype.element_ty)
    tl.store(grad_v + places * WV + v_at[None, :], sum_v, mask=inside & (v_at < WV)[None, :])


@triton.jit
def query_slopes(q, g, k, v, logarithm, dot, scale, PRECISION: tl.constexpr):
    """The gradient of the scores between a block of queries and one of keys, as if all were seen."""
    shares = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - logarithm[:, None])
    return shares * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - dot[:, None])


@triton.jit(do_not_specialize=FREE)
def attention_backward_queries(
    q, k, v, past_k, past_v, position, bounds, y, grad, stats, dots, grad_q, T, sequences, window, scale, slope_scale,
    P, heads, low, high, q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    pk_row, pk_step, pk_head, pv_row, pv_step, pv_head, g_row, g_step, g_head,
    K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr, PAST: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q, `[B T H WK]` contiguous, of the blocks that `attention_forward` would take.

    It also leaves y . grad of each query in fp32, `[B H T]`, for the gradients of keys and values. y is contiguous.
    With TMA, of rows that are not packed and see no past, k and v are descriptors of `[B * T, G * K]` and
    `[B * T, G * V]`, G being the heads of keys.
    """
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    sequence, row, first_row, steps, t0 = place_of(index, tl.program_id(2), bounds, T, sequences, BM, low, PACKED)
    if (t0 < low) | (t0 >= tl.minimum(steps, high)):
        return
    held, head = ring_of(position, sequence, P, PAST)
    g = h // GROUP
    row = row.to(tl.int64)
    rows = tl.arange(0, BM)
    cols = tl.arange(0, BN)
    k_at = tl.arange(0, K)
    v_at = tl.arange(0, V)
    t = t0 + rows
    ok = t < steps
    q_base = q + row * q_row + (first_row + t0) * q_step + h.to(tl.int64) * q_head
    g_base = grad + row * g_row + (first_row + t0) * g_step + h.to(tl.int64) * g_head
    q_tile = tile(q_base, rows, q_step, k_at, ok, WK, K, True)
    g_tile = tile(g_base, rows, g_step, v_at, ok, WV, V, True)
    line = (row * heads + h) * T + first_row
    logarithm = tl.load(stats + line + t, mask=ok, other=0.0)
    y_tile = tile(y + ((row * T + first_row + t0) * heads + h) * WV, rows, heads * WV, v_at, ok, WV, V, True)
    dot = tl.sum(y_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(dots + line + t, dot, mask=ok)
    acc = tl.zeros([BM, K], tl.float32)
    if PAST:
        pk_base = past_k + sequence.to(tl.int64) * pk_row + g.to(tl.int64) * pk_head
        pv_base = past_v + sequence.to(tl.int64) * pv_row + g.to(tl.int64) * pv_head
        for n in range(tl.maximum(-held, t0 - window + 1), 0, BN):
            k_tile = key_tile(pk_base, cols, held, head, P, 0, pk_step, 0, n, k_at, WK, K, True, True)
            v_tile = key_tile(pv_base, cols, held, head, P, 0, pv_step, 0, n, v_at, WV, V, True, True)
            at = (n + cols)[None, :]
            seen = visible(t[:, None], at, held, steps, window) & (at < 0)
            slopes = query_slopes(q_tile, g_tile, k_tile, v_tile, logarithm, dot, scale, PRECISION)
            slopes = tl.where(seen, slopes, 0.0)
            acc = tl.dot(slopes.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    first, whole, edge, end = ends_of_queries(t0, steps, window, BM, BN)
    if TMA:
        # addresses cost no registers here: one loop for all blocks, the mask a branch that few of them take
        start = (row * T).to(tl.int32)
        for n in range(first, end, BN):
            k_tile = k.load([start + n, g * K])
            v_tile = v.load([start + n, g * V])
            slopes = query_slopes(q_tile, g_tile, k_tile, v_tile, logarithm, dot, scale, PRECISION)
            if (n < whole) | (n >= edge):
                slopes = tl.where(visible(t[:, None], (n + cols)[None, :], held, steps, window), slopes, 0.0)
            acc = tl.dot(slopes.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    else:
        k_base = k + row * k_row + g.to(tl.int64) * k_head
        v_base = v + row * v_row + g.to(tl.int64) * v_head
        cut = (tl.minimum(whole, end) - first + BN - 1) // BN
        for i in range(cut + (tl.maximum(end - edge, 0) + BN - 1) // BN):
            n = tl.where(i < cut, first + i * BN, edge + (i - cut) * BN)
            k_tile = key_tile(k_base, cols, held, head, P, steps, k_step, first_row, n, k_at, WK, K, True, False)
            v_tile = key_tile(v_base, cols, held, head, P, steps, v_step, first_row, n, v_at, WV, V, True, False)
            seen = visible(t[:, None], (n + cols)[None, :], held, steps, window)
            slopes = query_slopes(q_tile, g_tile, k_tile, v_tile, logarithm, dot, scale, PRECISION)
            slopes = tl.where(seen, slopes, 0.0)
            acc = tl.dot(slopes.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        for n in range(whole, edge, BN):
            k_tile = key_tile(k_base, cols, held, head, P, steps, k_step, first_row, n, k_at, WK, K, False, False)
            v_tile = key_tile(v_base, cols, held, head, P, steps, v_step, first_row, n, v_at, WV, V, False, False)
            slopes = query_slopes(q_tile, g_tile, k_tile, v_tile, logarithm, dot, scale, PRECISION)
            acc = tl.dot(slopes.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    places = ((row * T + first_row + t) * heads + h)[:, None] * WK + k_at[None, :]
    acc = (acc * slope_scale).to(grad_q.dtype.element_ty)
    tl.store(grad_q + places, acc, mask=ok[:, None] & (k_at < WK)[None, :])
