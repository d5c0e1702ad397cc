"""Triton kernels of one decoded step: few rows, every weight read once, so the time is that of the weights' bytes.

A step is a chain of short kernels, each waiting for the one before. With PDL (programmatic dependent launch) a kernel
is already resident while the one before it runs: it reads the first weights that it will need, which depend on nothing,
and only then waits for its input. A kernel lets its successor start at once, and touches memory that others write only
after `gdc_wait`, which returns when the kernel before is complete, and so all before that. One exception: the narrow
product lets its successor, the recurrence, start after its own wait; so that one reads its state before it waits, and
the product before them, a step later, its columns. Between two steps these may be written by other kernels, a copy or a
replay, if at least one without PDL, which starts when all before it are complete, follows: the embedding of a step.

Letters: B rows, F features, K the width that a product sums over, E inner width, N states, R rank of dt, W conv width.
"""

import triton
import triton.language as tl

from milonga.ops.selective_scan.triton_kernels import LOG2_E, exp_of_minus, step_size


@triton.jit
def silu(v):
    return v / (1.0 + exp_of_minus(v))


@triton.jit
def normalise(
    x, weight, bias, out, width, eps,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: root-mean-square norm, or with CENTRED layer norm with a bias."""
    i = tl.arange(0, BLOCK)
    inside = i < width
    scale = tl.load(weight + i, mask=inside, other=0.0)
    shift = tl.zeros([BLOCK], tl.float32)
    if CENTRED:
        shift = tl.load(bias + i, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * width
    v = tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        v = tl.where(inside, v - tl.sum(v, 0) / width, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(out + row + i, (v * scale + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit
def weights_at(weight, K, f, features, at, last, EVEN: tl.constexpr):
    """Rows f of a row-major weight, columns `at [G, KB]`: -> `[G, f, KB]`."""
    inside = (f < features)[None, :, None]
    if not EVEN:
        inside = inside & (at < last)[:, None, :]
    return tl.load(weight + f.to(tl.int64)[None, :, None] * K + at[:, None, :], mask=inside, other=0.0)


@triton.jit
def hold(weight, K, f, features, at, last, step, HELD: tl.constexpr, EVEN: tl.constexpr):
    """The first HELD pieces of the rows f: on their way before the input is there."""
    pieces = ()
    for j in tl.static_range(HELD):
        pieces = pieces + (weights_at(weight, K, f, features, at + j * step, last, EVEN),)
    return pieces


@triton.jit
def inputs_at(x, x_step, b, B, at, last, EVEN: tl.constexpr):
    """Rows b of x, columns `at [G, KB]`: -> `[G, KB, b]`."""
    inside = (b < B)[None, None, :]
    if not EVEN:
        inside = inside & (at < last)[:, :, None]
    return tl.load(x + b.to(tl.int64)[None, None, :] * x_step + at[:, :, None], mask=inside, other=0.0)


@triton.jit
def product(
    held, gate, x, x_step, weight, second, B, K, f, b, features, at, last, step,
    HELD: tl.constexpr, AHEAD: tl.constexpr, PIECES: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows f of the weight (with GATED of the second weight too) times the rows b of x, over `at`, `at + step`, ...

    -> (`[f, b]`, `[f, b]` of the second weight), fp32. A sum is taken in G parts, one for each group of warps, and they
    are added at the end. The inputs of AHEAD pieces are asked for together: a product waits for its operands to go
    through shared memory, and one request after the other would cost the latency of the L2 cache each.
    """
    acc = tl.zeros([at.shape[0], f.shape[0], b.shape[0]], tl.float32)
    up = acc
    for j in tl.static_range(0, HELD, AHEAD):
        inputs = ()
        for i in tl.static_range(AHEAD):
            if j + i < HELD:
                inputs = inputs + (inputs_at(x, x_step, b, B, at + (j + i) * step, last, EVEN),)
        for i in tl.static_range(AHEAD):
            if j + i < HELD:
                acc = tl.dot(held[j + i], inputs[i], acc, input_precision="ieee")
                if GATED:
                    up = tl.dot(gate[j + i], inputs[i], up, input_precision="ieee")
    for j in range(HELD, PIECES):
        w = weights_at(weight, K, f, features, at + j * step, last, EVEN)
        v = inputs_at(x, x_step, b, B, at + j * step, last, EVEN)
        acc = tl.dot(w, v, acc, input_precision="ieee")
        if GATED:
            w = weights_at(second, K, f, features, at + j * step, last, EVEN)
            up = tl.dot(w, v, up, input_precision="ieee")
    return tl.sum(acc, 0), tl.sum(up, 0)


@triton.jit(do_not_specialize=["B"])
def skinny(
    x, weight, residual, out, conv_weight, conv_bias, conv_state, B, F, K, span, x_step,
    FB: tl.constexpr, KB: tl.constexpr, G: tl.constexpr, BB: tl.constexpr, HELD: tl.constexpr, AHEAD: tl.constexpr,
    PIECES: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, CONV: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`x [B K] @ weight [F K]^T`, a tile of FB features a program; `span` of K where the sum is SPLIT over programs.

    RESIDUAL adds `residual [B F]`. GATED reads weight `[2F K]` and writes `silu(first) * second`. CONV takes the first
    half of F through one step of a causal convolution with SiLU and moves `conv_state [B W-1 F/2]` on; the second half
    is written as it is. SPLIT writes fp32 partial sums `[splits B F]`.

    Without EARLY the next kernel starts only when the one before this is complete, and may read what that one and all
    before it wrote without a wait of its own. What is added at the end, a residual or the columns before and their
    taps, is read before the product: read after it, it would be waited for once more.
    """
    f = tl.program_id(0) * FB + tl.arange(0, FB)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, K)
    b = tl.program_id(2) * BB + tl.arange(0, BB)
    columns = first + tl.arange(0, G)[:, None] * KB + tl.arange(0, KB)[None, :]
    second = weight + F.to(tl.int64) * K
    held = hold(weight, K, f, F, columns, last, G * KB, HELD, EVEN)
    gate = ()
    if GATED:
        gate = hold(second, K, f, F, columns, last, G * KB, HELD, EVEN)
    live = (f < F)[:, None] & (b < B)[None, :]
    at = b.to(tl.int64)[None, :] * F + f[:, None]
    half = F // 2
    state = conv_state + b.to(tl.int64)[None, :] * (W - 1) * half + f[:, None]
    before, taps, shift = (), (), tl.zeros([FB], conv_bias.dtype.element_ty)
    if CONV:
        # written a step ago by this product, and that is complete: see EARLY; not by way of an old L1 line
        within = live & (tl.program_id(0) * FB < half)
        for j in tl.static_range(W - 1):
            before = before + (tl.load(state + j * half, mask=within, other=0.0, cache_modifier=".cg"),)
        for j in tl.static_range(W):
            taps = taps + (tl.load(conv_weight + f * W + j, mask=f < half, other=0.0),)
        shift = tl.load(conv_bias + f, mask=f < half, other=0.0)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    added = tl.zeros([FB, BB], tl.float32)
    if RESIDUAL:
        added = tl.load(residual + at, mask=live, other=0.0)
    acc, up = product(
        held, gate, x, x_step, weight, second, B, K, f, b, F, columns, last, G * KB, HELD, AHEAD, PIECES, GATED, EVEN
    )  # fmt: skip
    if GATED:
        dtype = x.dtype.element_ty
        acc = silu(acc.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)
    if CONV:
        if tl.program_id(0) * FB < half:
            column = acc.to(out.dtype.element_ty)
            # in the order of the definition: the oldest column first
            total = tl.zeros_like(acc)
            for j in tl.static_range(W - 1):
                total += before[j].to(tl.float32) * taps[j].to(tl.float32)[:, None]
                if j > 0:
                    tl.store(state + (j - 1) * half, before[j], mask=live)
            total += column.to(tl.float32) * taps[W - 1].to(tl.float32)[:, None]
            if W > 1:
                tl.store(state + (W - 2) * half, column.to(conv_state.dtype.element_ty), mask=live)
            acc = silu(total + shift.to(tl.float32)[:, None])
    if RESIDUAL:
        acc += added.to(tl.float32)
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * B * F
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["B"])
def ssm_step(
    xz, low, dt_weight, dt_bias, A_log, D, state, y, B, E, R,
    SPLITS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, RB: tl.constexpr, CH: tl.constexpr, BB: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt's projection, one step of the recurrence in place, D and the gate, for CH channels of BB rows.

    xz `[B 2E]`: the convolved input and the gate; low `[splits B R+2N]`: partial sums of dt's low rank, B and C.
    Everything is read before anything is computed: a chain of short waits would take longer than the bytes.
    """
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    r = tl.arange(0, RB)
    n = tl.arange(0, N)
    i = tl.arange(0, BB)
    live = e < E
    w = tl.load(dt_weight + e.to(tl.int64)[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    tile = e.to(tl.int64)[:, None] * STATES + n[None, :]
    here = live[:, None] & (n < STATES)[None, :]
    a = -tl.exp2(tl.load(A_log + tile, mask=here, other=0.0) * LOG2_E) * LOG2_E
    bias = tl.load(dt_bias + e, mask=live, other=0.0)
    skip = tl.load(D + e, mask=live, other=0.0)
    wide = R + 2 * STATES
    first = (tl.program_id(1) * BB).to(tl.int64)
    b = first + i
    rows = b < B
    states = state + b[:, None, None] * E * STATES + tile[None, :, :]
    both = rows[:, None] & live[None, :]
    # written by the kernel before the last or earlier, and that is complete: see EARLY; not by way of an old L1 line
    h = tl.load(states, mask=rows[:, None, None] & here[None, :, :], other=0.0, cache_modifier=".cg")
    u = tl.load(xz + b[:, None] * 2 * E + e[None, :], mask=both, other=0.0, cache_modifier=".cg").to(tl.float32)
    z = tl.load(xz + b[:, None] * 2 * E + E + e[None, :], mask=both, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    into = tl.zeros([BB, N], tl.float32)
    outof = tl.zeros([BB, N], tl.float32)
    some = rows[:, None] & (n < STATES)[None, :]
    for s in tl.static_range(SPLITS):
        part = low + (s * B + b)[:, None] * wide + R + n[None, :]
        into += tl.load(part, mask=some, other=0.0)
        outof += tl.load(part + STATES, mask=some, other=0.0)
    # rounded where the network's own step rounds
    dtype = y.dtype.element_ty
    into, outof = into.to(dtype).to(tl.float32), outof.to(dtype).to(tl.float32)
    ranks = ()
    for j in tl.static_range(BB):
        rank = tl.zeros([RB], tl.float32)
        for s in tl.static_range(SPLITS):
            part = low + (s * B + first + j) * wide + r
            rank += tl.load(part, mask=(first + j < B) & (r < R), other=0.0)
        ranks = ranks + (rank,)
    dt = tl.zeros([BB, CH], tl.float32)
    for j in tl.static_range(BB):
        one = tl.sum(w.to(tl.float32) * ranks[j].to(dtype).to(tl.float32)[None, :], 1)
        dt = tl.where((i == j)[:, None], one[None, :], dt)
    delta = step_size(dt.to(dtype), bias[None, :], live[None, :])
    h = tl.exp2(delta[:, :, None] * a[None, :, :]) * h + (delta * u)[:, :, None] * into[:, None, :]
    tl.store(states, h, mask=rows[:, None, None] & here[None, :, :])
    v = (tl.sum(h * outof[:, None, :], 2) + skip[None, :] * u) * silu(z)
    tl.store(y + b[:, None] * E + e[None, :], v.to(dtype), mask=both)


@triton.jit(do_not_specialize=["T"])
def replay(
    columns, x, dt, B_, A_log, dt_bias, keep, conv, state, T, E, columns_row, columns_step, x_step, dt_step, b_step,
    STATES: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The state of one row after its first `keep[b]` steps, in place: `[B W-1 E]` columns and `[B E N]` sums."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    live = e < E
    here = live[:, None] & (n < STATES)[None, :]
    tile = b * E * STATES + e.to(tl.int64)[:, None] * STATES + n[None, :]
    steps = tl.load(keep + b).to(tl.int32)
    a = -tl.exp2(tl.load(A_log + e[:, None] * STATES + n[None, :], mask=here, other=0.0) * LOG2_E) * LOG2_E
    bias = tl.load(dt_bias + e, mask=live, other=0.0)
    h = tl.load(state + tile, mask=here, other=0.0)
    for t in range(steps):
        row = b * T + t
        delta = step_size(tl.load(dt + row * dt_step + e, mask=live, other=0.0), bias, live)
        u = tl.load(x + row * x_step + e, mask=live, other=0.0).to(tl.float32)
        into = tl.load(B_ + row * b_step + n, mask=n < STATES, other=0.0).to(tl.float32)
        h = tl.exp2(delta[:, None] * a) * h + (delta * u)[:, None] * into[None, :]
    tl.store(state + tile, h, mask=here)
    history = conv + b * (W - 1) * E + e
    for j in tl.static_range(W - 1):
        source = steps + j - (W - 1)  # a step of the piece; before it, a column of the history
        old = tl.load(history + (steps + j) * E, mask=live & (source < 0), other=0.0)
        new = tl.load(columns + b * columns_row + source * columns_step + e, mask=live & (source >= 0), other=0.0)
        tl.store(history + j * E, tl.where(source < 0, old, new.to(conv.dtype.element_ty)), mask=live)


@triton.jit
def ring_write(
    k, v, ring_k, ring_v, position, slots, k_row, v_row,
    KW: tl.constexpr, VW: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """One step of one row: its key `[KW]` and value `[VW]` into slot `position mod slots`, and the position one on."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.load(position + b)
    if slots > 0:
        place = b * slots + at % slots
        i, j = tl.arange(0, KB), tl.arange(0, VB)
        key = tl.load(k + b * k_row + i, mask=i < KW)
        value = tl.load(v + b * v_row + j, mask=j < VW)
        tl.debug_barrier()  # every warp has read the position before one of them moves it
        tl.store(ring_k + place * KW + i, key.to(ring_k.dtype.element_ty), mask=i < KW)
        tl.store(ring_v + place * VW + j, value.to(ring_v.dtype.element_ty), mask=j < VW)
    tl.store(position + b, at + 1)
