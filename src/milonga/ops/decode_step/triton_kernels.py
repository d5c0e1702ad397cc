"""Triton kernels of one decoded step: few rows, every weight read once, so the time is that of the weights' bytes.

A step is a chain of short kernels, each waiting for the one before. With PDL (programmatic dependent launch) a kernel
is already resident while the one before it runs: it brings the weights that it will need into the L2 cache, which
depend on nothing, and only then waits for its input. Every kernel lets its successor start at once, and touches memory
that others write only after `gdc_wait`, which returns when the kernel before is complete, and so all before that.

Letters: B rows, F features, K the width that a product sums over, E inner width, N states, R rank of dt, W conv width.
"""

import triton
import triton.language as tl

from milonga.ops.selective_scan.triton_kernels import LOG2_E, exp_of_minus, step_size

LINE: tl.constexpr = tl.constexpr(128)  # bytes of a cache line


@triton.jit
def silu(v):
    return v / (1.0 + exp_of_minus(v))


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines of these addresses to be brought into L2; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(weight, f, features, row_bytes, first, last, LINES: tl.constexpr):
    """The bytes first..last of the rows f of a row-major weight."""
    rows = weight.to(tl.pointer_type(tl.uint8)) + tl.minimum(f, features - 1).to(tl.int64)[:, None] * row_bytes
    line = tl.arange(0, LINES)[None, :] * LINE
    for start in range(first, last, LINES * LINE):
        prefetch(rows + tl.minimum(start + line, last - 1))


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
def product(
    x, x_step, weight, B, K, f, b, features, first, last,
    KB: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows f of the weight times the rows b of x, over first..last of K: -> `[f, b]`, fp32."""
    k = tl.arange(0, KB)
    acc = tl.zeros([f.shape[0], b.shape[0]], tl.float32)
    rows = weight + f.to(tl.int64)[:, None] * K
    columns = x + b.to(tl.int64)[None, :] * x_step
    for start in range(first, last, KB):
        at = start + k
        if EVEN:
            w = tl.load(rows + at[None, :], mask=(f < features)[:, None], other=0.0)
            v = tl.load(columns + at[:, None], mask=(b < B)[None, :], other=0.0)
        else:
            w = tl.load(rows + at[None, :], mask=(f < features)[:, None] & (at < last)[None, :], other=0.0)
            v = tl.load(columns + at[:, None], mask=(b < B)[None, :] & (at < last)[:, None], other=0.0)
        acc = tl.dot(w, v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def skinny(
    x, weight, residual, out, conv_weight, conv_bias, conv_state, B, F, K, span, x_step,
    FB: tl.constexpr, KB: tl.constexpr, BB: tl.constexpr, LINES: tl.constexpr, W: tl.constexpr,
    GATED: tl.constexpr, CONV: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`x [B K] @ weight [F K]^T`, a tile of FB features a program; `span` of K where the sum is SPLIT over programs.

    RESIDUAL adds `residual [B F]`. GATED reads weight `[2F K]` and writes `silu(first) * second`. CONV takes the first
    half of F through one step of a causal convolution with SiLU and moves `conv_state [B W-1 F/2]` on; the second half
    is written as it is. SPLIT writes fp32 partial sums `[splits B F]`.
    """
    f = tl.program_id(0) * FB + tl.arange(0, FB)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, K)
    b = tl.program_id(2) * BB + tl.arange(0, BB)
    element = weight.dtype.element_ty.primitive_bitwidth // 8
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_rows(weight, f, F, K * element, first * element, last * element, LINES)
        if GATED:
            prefetch_rows(weight, f + F, 2 * F, K * element, first * element, last * element, LINES)
        tl.extra.cuda.gdc_wait()
    acc = product(x, x_step, weight, B, K, f, b, F, first, last, KB, PRECISION, EVEN)
    live = (f < F)[:, None] & (b < B)[None, :]
    at = b.to(tl.int64)[None, :] * F + f[:, None]
    if GATED:
        up = product(x, x_step, weight + F.to(tl.int64) * K, B, K, f, b, F, first, last, KB, PRECISION, EVEN)
        dtype = x.dtype.element_ty
        acc = silu(acc.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)
    if CONV:
        half = F // 2
        if tl.program_id(0) * FB < half:
            column = acc.to(out.dtype.element_ty)
            state = conv_state + b.to(tl.int64)[None, :] * (W - 1) * half + f[:, None]
            # in the order of the definition: the oldest column first
            total = tl.zeros_like(acc)
            for j in tl.static_range(W - 1):
                old = tl.load(state + j * half, mask=live, other=0.0)
                total += old.to(tl.float32) * tl.load(conv_weight + f * W + j, mask=f < F).to(tl.float32)[:, None]
                if j > 0:
                    tl.store(state + (j - 1) * half, old, mask=live)
            newest = tl.load(conv_weight + f * W + W - 1, mask=f < F).to(tl.float32)[:, None]
            total += column.to(tl.float32) * newest
            if W > 1:
                tl.store(state + (W - 2) * half, column.to(conv_state.dtype.element_ty), mask=live)
            acc = silu(total + tl.load(conv_bias + f, mask=f < F).to(tl.float32)[:, None])
    if RESIDUAL:
        acc += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * B * F
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=live)


@triton.jit
def ssm_step(
    xz, low, dt_weight, dt_bias, A_log, D, state, y, B, E, R, splits,
    STATES: tl.constexpr, N: tl.constexpr, RB: tl.constexpr, SB: tl.constexpr, CH: tl.constexpr, BB: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """dt's projection, one step of the recurrence in place, D and the gate, for CH channels of BB rows.

    xz `[B 2E]`: the convolved input and the gate; low `[splits B R+2N]`: partial sums of dt's low rank, B and C.
    """
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    r = tl.arange(0, RB)
    n = tl.arange(0, N)
    s = tl.arange(0, SB)
    live = e < E
    tile = e.to(tl.int64)[:, None] * STATES + n[None, :]
    here = live[:, None] & (n < STATES)[None, :]
    w = tl.load(dt_weight + e.to(tl.int64)[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
    w = w.to(tl.float32)
    a = -tl.exp2(tl.load(A_log + tile, mask=here, other=0.0) * LOG2_E) * LOG2_E
    bias = tl.load(dt_bias + e, mask=live, other=0.0)
    skip = tl.load(D + e, mask=live, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    wide = R + 2 * STATES
    dtype = y.dtype.element_ty
    for i in tl.static_range(BB):
        b = (tl.program_id(1) * BB + i).to(tl.int64)
        ok = b < B
        parts = low + (s.to(tl.int64)[:, None] * B + b) * wide
        some = ok & (s < splits)[:, None]
        rank = tl.sum(tl.load(parts + r[None, :], mask=some & (r < R)[None, :], other=0.0), 0)
        into = tl.sum(tl.load(parts + R + n[None, :], mask=some & (n < STATES)[None, :], other=0.0), 0)
        outof = tl.sum(tl.load(parts + R + STATES + n[None, :], mask=some & (n < STATES)[None, :], other=0.0), 0)
        # rounded where the network's own step rounds
        rank, into, outof = rank.to(dtype).to(tl.float32), into.to(dtype).to(tl.float32), outof.to(dtype).to(tl.float32)
        u = tl.load(xz + b * 2 * E + e, mask=ok & live, other=0.0).to(tl.float32)
        z = tl.load(xz + b * 2 * E + E + e, mask=ok & live, other=0.0).to(tl.float32)
        h = tl.load(state + b * E * STATES + tile, mask=ok & here, other=0.0)
        delta = step_size(tl.sum(w * rank[None, :], 1).to(dtype), bias, live)
        h = tl.exp2(delta[:, None] * a) * h + (delta * u)[:, None] * into[None, :]
        tl.store(state + b * E * STATES + tile, h, mask=ok & here)
        v = (tl.sum(h * outof[None, :], 1) + skip * u) * silu(z)
        tl.store(y + b * E + e, v.to(dtype), mask=ok & live)


@triton.jit
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
