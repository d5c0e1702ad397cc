"""Triton kernels of a Mamba layer over a short piece: what lies between its products.

Each lets the next kernel start at once, and touches memory that others write only after `gdc_wait` (see
`milonga.ops.decode_step.triton_kernels`). Letters: B rows, T steps, E inner width, N states, R rank of dt, W taps.
"""

import triton
import triton.language as tl

from milonga.ops.decode_step.triton_kernels import silu
from milonga.ops.selective_scan.triton_kernels import LOG2_E, step_size


@triton.jit(do_not_specialize=["T"])
def conv_piece(
    xz, conv_weight, conv_bias, conv, u, T, E, CH: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Causal convolution with SiLU of one step: the first half of a row of xz `[B T 2E]`, and the columns before."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    row = tl.program_id(1).to(tl.int64)
    live = e < E
    bias = tl.load(conv_bias + e, mask=live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    t = row % T
    history = conv + (row // T) * (W - 1) * E + e
    total = tl.zeros([CH], tl.float32)
    for j in tl.static_range(W):  # in the order of the definition: the oldest column first
        back = W - 1 - j
        old = tl.load(history + (t + j) * E, mask=live & (t < back), other=0.0).to(tl.float32)
        new = tl.load(xz + (row - back) * 2 * E + e, mask=live & (t >= back), other=0.0).to(tl.float32)
        tap = tl.load(conv_weight + e * W + j, mask=live, other=0.0).to(tl.float32)
        total += tl.where(t < back, old, new) * tap
    tl.store(u + row * E + e, silu(total + bias).to(u.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "T"])  # one kernel for pieces of every length
def ssm_piece(
    xz, u, low, dt_weight, dt_bias, A_log, D, state, dt, both, into, y, rows, T, E, R,
    SPLITS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, RB: tl.constexpr, CH: tl.constexpr, TB: tl.constexpr,
    STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dt's projection, T steps of the recurrence, D and the gate, for CH channels of one row of the batch.

    low `[splits rows R+2N]`: partial sums of dt's low rank, B and C. Writes dt `[rows E]`, y `[rows E]` and, the first
    program of a row, B `[rows N]`. both `[B programs T 2 N]` is where every program lays its sums of B and C, to read
    them step by step: what STEPS steps need is loaded together, since a load takes longer than a step.
    """
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    b = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, RB)
    n = tl.arange(0, N)
    i = tl.arange(0, TB)
    live = e < E
    w = tl.load(dt_weight + r[:, None] + e.to(tl.int64)[None, :] * R, mask=live[None, :] & (r < R)[:, None], other=0.0)
    tile = e.to(tl.int64)[:, None] * STATES + n[None, :]
    here = live[:, None] & (n < STATES)[None, :]
    a = -tl.exp2(tl.load(A_log + tile, mask=here, other=0.0) * LOG2_E) * LOG2_E
    bias = tl.load(dt_bias + e, mask=live, other=0.0)
    skip = tl.load(D + e, mask=live, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h = tl.load(state + b * E * STATES + tile, mask=here, other=0.0)
    wide = R + 2 * STATES
    first = b * T
    own = both + (b * tl.num_programs(0) + tl.program_id(0)) * T * 2 * STATES
    some = (i < T)[:, None] & (n < STATES)[None, :]
    ranks = tl.zeros([TB, RB], tl.float32)
    inside = tl.zeros([TB, N], tl.float32)
    outof = tl.zeros([TB, N], tl.float32)
    for s in tl.range(SPLITS, loop_unroll_factor=4):  # so many loads at once as registers hold
        part = low + (s * rows + first + i)[:, None] * wide
        ranks += tl.load(part + r[None, :], mask=(i < T)[:, None] & (r < R)[None, :], other=0.0)
        inside += tl.load(part + R + n[None, :], mask=some, other=0.0)
        outof += tl.load(part + R + STATES + n[None, :], mask=some, other=0.0)
    # rounded where the network's own step rounds
    dtype = y.dtype.element_ty
    tl.store(own + (2 * i)[:, None] * STATES + n[None, :], inside.to(dtype), mask=some)
    tl.store(own + (2 * i + 1)[:, None] * STATES + n[None, :], outof.to(dtype), mask=some)
    all_dt = tl.dot(ranks.to(dtype), w, input_precision="ieee").to(dtype)
    tl.store(dt + (first + i)[:, None] * E + e[None, :], all_dt, mask=(i < T)[:, None] & live[None, :])
    if tl.program_id(0) == 0:
        tl.store(into + (first + i)[:, None] * STATES + n[None, :], inside.to(dtype), mask=some)
    tl.debug_barrier()  # every warp has written its dt, B and C before others read them
    for begin in range(0, T, STEPS):
        read = ()
        for k in tl.static_range(STEPS):
            t = begin + k
            row = first + t
            there, states = live & (t < T), (n < STATES) & (t < T)
            read = read + (
                tl.load(dt + row * E + e, mask=there, other=0.0),
                tl.load(u + row * E + e, mask=there, other=0.0),
                tl.load(xz + row * 2 * E + E + e, mask=there, other=0.0),
                tl.load(own + 2 * t * STATES + n, mask=states, other=0.0),
                tl.load(own + (2 * t + 1) * STATES + n, mask=states, other=0.0),
            )
        for k in tl.static_range(STEPS):
            delta = step_size(read[5 * k], bias, live)
            v = read[5 * k + 1].to(tl.float32)
            z = read[5 * k + 2].to(tl.float32)
            h = tl.exp2(delta[:, None] * a) * h + (delta * v)[:, None] * read[5 * k + 3].to(tl.float32)[None, :]
            out = (tl.sum(h * read[5 * k + 4].to(tl.float32)[None, :], 1) + skip * v) * silu(z)
            tl.store(y + (first + begin + k) * E + e, out.to(dtype), mask=live & (begin + k < T))
