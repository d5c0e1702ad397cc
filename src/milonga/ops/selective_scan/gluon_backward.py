"""Backward kernels of `selective_scan` in Gluon. See `gluon_common` for how the work is laid out.

Time is walked from the end. With g = grad_y silu(z), h the state, and r the gradient that reaches the state before a
step from the steps after it::

    dh = g C + r          dC = sum over e of g h         y = sum over n of C h
    r  = exp(delta A) dh  dB = sum over e of u dh        du = sum over n of B dh
    q  = r h_before       dA = sum over t of delta q     ddelta = sum over n of A q, + x du

A tile of 32 steps starts at a checkpoint: a walk forward keeps the state before every fourth step in shared memory;
then four steps at a time, from the last: forward again with decays and states in registers, and back.

The 16 products of a lane and step that dB and dC sum over channels are, as they lie in registers, an operand of the
matrix units (m16n8k8, rows: lane bits 2-4 and n0, columns: lane bits 0-1 and n1). Times a matrix of zeros and ones it
sums over four channels and sends dB, dC, n1 and n2 to eight columns; the rest of the sum over the block's channels goes
through shared memory. The matrix units truncate to tf32: exact enough for bfloat16 alone, so other dtypes (EXACT) send
the part that was cut off through them as well.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from milonga.ops.gpu.gluon_parts import reinterpreted
from milonga.ops.selective_scan.gluon_common import (
    CHANNELS,
    LN_2,
    LOG2_E,
    NARROW_ROWS_LAYOUT,
    PAIRS_LAYOUT,
    PART,
    PARTS_OF_TILE,
    PLAIN,
    ROWS_LAYOUT,
    STATES,
    STATES_LAYOUT,
    TILE,
    ahead,
    chunk_of,
    decay_of,
    exp_of_minus,
    first_slot,
    fold,
    parts_of,
    sigmoid,
    slot_of,
    softplus,
    state_offsets,
    tile_rows,
    wide,
)

TURN = gl.constexpr(4)
TURNS = gl.constexpr(8)
MATRIX = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MATRIX, 1))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MATRIX, 1))
SUMS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
# rows: warp, step, n0, n3; columns: the four sums over channels, swizzled against bank conflicts, of eight
PARTIAL_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
PARTIAL_ROWS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
SLOTS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
SLOTS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 1, 2, 16], [2, 1, 2, 1], [3, 2, 1, 0]))
STARTS_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))


@gluon.jit
def turns_of(rows):
    """Shared `[32, W]` as eight turns of four steps."""
    WIDTH: gl.constexpr = rows.shape[1]
    return reinterpreted(rows, rows.dtype, [TURNS, TURN, WIDTH], PLAIN)


@gluon.jit
def from_slots(slots, kind: gl.constexpr):
    """`[32, 64]` of du (kind 0) or of the sum of A q (1), which each turn leaves where its first state was."""
    v = slots.slice(kind, 1, 1).load(SLOTS_LAYOUT).reshape([TILE, CHANNELS])
    return gl.convert_layout(v, NARROW_ROWS_LAYOUT, assert_trivial=True)


@gluon.jit
def slope_of(delta):
    """The derivative of softplus where it is `delta`, 1 - exp(-delta), within 5e-6 of itself."""
    series = gl.fma(delta, gl.full_like(delta, 1.0 / 6.0), gl.full_like(delta, -0.5))
    series = delta * gl.fma(delta, series, gl.full_like(delta, 1.0))
    return gl.where(delta < 0.03, series, 1.0 - exp_of_minus(delta))


@gluon.jit
def four_rows(v):
    """A turn's four `[64]` as `[4, 64]`."""
    return gl.join(gl.join(v[0], v[1]), gl.join(v[2], v[3])).permute([2, 1, 0]).reshape([TURN, CHANNELS])


@gluon.jit
def recomputed(v):
    """`v`, in a way that keeps what is computed from it inside a loop: kept outside, it would be spilled."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], gl.int32, is_pure=False, pack=1)


@gluon.jit
def four_states(a, b, c, d):
    """Four `[16, 64]` as `[4 * 64, 16]`."""
    return gl.join(gl.join(a, b), gl.join(c, d)).permute([3, 2, 1, 0]).reshape([4 * CHANNELS, STATES])


@gluon.jit
def sum_of_four_channels(for_B, for_C, ones, EXACT: gl.constexpr):
    """The `[16, 64]` products of dB and dC, summed over four channels each, `[64, 8]`."""
    products = gl.join(for_B, for_C).reshape([2, 2, 2, 2, 4, 2, 2, 2, 2, 2])
    products = products.permute([4, 3, 0, 5, 6, 9, 1, 2, 7, 8]).reshape([64, 32])
    products = gl.convert_layout(products, LEFT)
    sums = gl.zeros([64, 8], gl.float32, layout=MATRIX)
    if EXACT:
        top = gl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xffffe000;", "=f,f", [products], gl.float32, is_pure=True, pack=1
        )
        sums = mma_v2(products - top, ones, sums, input_precision="tf32")
        products = top
    return mma_v2(products, ones, sums, input_precision="tf32")


@gluon.jit
def store_sums(pointer, partials, left):
    """Sums of a turn over all channels of the block to `[4, 32]` in memory: columns n0, n3, dB or dC, n2, n1.

    Of the steps only `left` exist; the rows after them may be another program's.
    """
    p = partials.load(PARTIAL_LAYOUT)
    p = gl.sum(gl.sum(p.reshape([4, 16, 4, 8]), 2), 0)
    p = gl.convert_layout(p, SUMS_LAYOUT, assert_trivial=True)
    i = gl.arange(0, 16, layout=gl.SliceLayout(1, SUMS_LAYOUT))
    j = gl.arange(0, 8, layout=gl.SliceLayout(0, SUMS_LAYOUT))
    gl.store(pointer + i[:, None] * 8 + j[None, :], p, mask=(i // 4 < left)[:, None])


@gluon.jit(do_not_specialize=["T", "sequences", "length", "finer"])
def scan_back_ends(
    grad_y, dt, z, C, A, dt_bias, ends, sums, bounds, T, E, sequences, length, finer, gy_step, dt_step, z_step, C_step,
    PACKED: gl.constexpr, Y: gl.constexpr, Z: gl.constexpr, BIAS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """The r that leaves each chunk but the first at its start, if none comes in at its end; sums of delta."""
    blocks = (E + CHANNELS - 1) // CHANNELS
    program = gl.program_id(0)
    channel = (program % blocks) * CHANNELS
    length = length // finer
    slot = slot_of(program // blocks, T, sequences, length, PACKED)
    _, chunk, _, _, _, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    if chunk < finer:
        steps = 0
    at, eh = state_offsets(CHANNELS, STATES_LAYOUT)
    at += channel * STATES
    live = (channel + eh < E)[None, :] & (at >= 0)
    a2 = gl.load(A + at, mask=live, other=0.0) * LOG2_E
    e = channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    alive = (e < E)[None, :]
    bias = gl.zeros([CHANNELS], gl.float32, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    if BIAS:
        bias = gl.load(dt_bias + e, mask=e < E, other=0.0)
    n2 = gl.arange(0, STATES, layout=gl.SliceLayout(0, PAIRS_LAYOUT))
    t2 = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIRS_LAYOUT))
    tiles = (steps + TILE - 1) // TILE
    last = first + (tiles - 1) * TILE
    left = gl.where(tiles > 0, steps - (tiles - 1) * TILE, 0)
    grad_y += last * gy_step
    dt += last * dt_step
    C += last * C_step
    g_at = t[:, None] * gy_step + e[None, :]
    dt_at = t[:, None] * dt_step + e[None, :]
    C_at = t2[:, None] * C_step + n2[None, :]
    inside = (t < left)[:, None] & alive & Y
    raw_g = tile_rows(grad_y, g_at, inside)
    raw_dt = tile_rows(dt, dt_at, (t < left)[:, None] & alive)
    raw_C = tile_rows(C, C_at, (t2 < left)[:, None])
    raw_z = raw_g
    if Z:
        z += last * z_step
        z_at = t[:, None] * z_step + e[None, :]
        raw_z = tile_rows(z, z_at, inside)
    rows_d = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_g = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_C = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    row_bias = gl.allocate_shared_memory(gl.float32, [1, CHANNELS], PLAIN)
    row_bias.store(bias[None, :])
    parts_d = parts_of(rows_d)
    parts_g = parts_of(rows_g)
    parts_C = parts_of(rows_C)
    r = gl.zeros([STATES, CHANNELS], gl.float32, layout=STATES_LAYOUT)
    delta_sum = gl.zeros([TILE, CHANNELS], gl.float32, layout=ROWS_LAYOUT)
    for tile in range(tiles):
        v = wide(raw_dt) + row_bias.load(ROWS_LAYOUT)
        delta = gl.where((t < left)[:, None], softplus(v, exp_of_minus(gl.abs(v))), 0.0)
        delta_sum += delta
        g = wide(raw_g)
        if Z:
            gate = wide(raw_z)
            g *= gate * sigmoid(gate)
        rows_d.store(delta)
        rows_g.store(g)
        rows_C.store(wide(raw_C))
        left = TILE
        # the tile before, if there is one
        more = (t >= 0)[:, None] & (tile + 1 < tiles)
        grad_y -= TILE * gy_step
        dt -= TILE * dt_step
        C -= TILE * C_step
        raw_g = tile_rows(grad_y, g_at, more & alive & Y)
        raw_dt = tile_rows(dt, dt_at, more & alive)
        raw_C = tile_rows(C, C_at, (t2 >= 0)[:, None] & (tile + 1 < tiles))
        if Z:
            z -= TILE * z_step
            raw_z = tile_rows(z, z_at, more & alive)
        for back in range(PARTS_OF_TILE):
            part = PARTS_OF_TILE - 1 - back
            deltas = parts_d.index(part)
            upstream = parts_g.index(part)
            out_of = parts_C.index(part).permute((1, 0))
            for k in gl.static_range(PART - 1, -1, -1):
                g_k = upstream.slice(k, 1, 0).load(STATES_LAYOUT)
                decay = decay_of(deltas.slice(k, 1, 0).load(STATES_LAYOUT) * a2, EXACT)
                r = decay * gl.fma(g_k, out_of.slice(k, 1, 1).load(STATES_LAYOUT), r)
    if chunk >= finer:
        gl.store(ends + slot.to(gl.int64) * E * STATES + at, r, mask=live)
        gl.store(sums + slot.to(gl.int64) * E + e, gl.sum(delta_sum, 0), mask=e < E)


@gluon.jit(do_not_specialize=["T", "sequences", "length", "finer", "low", "high", "partial_rows"])
def scan_backward(
    grad_y, x, dt, z, B, C, A, D, dt_bias, ends, sums, grad_final, carried, bounds, kept,
    grad_x, grad_dt, grad_z, y, partials, grad_A, grad_D, grad_bias, grad_initial,
    T, E, sequences, length, finer, low, high, partial_rows,
    gy_step, x_step, dt_step, z_step, B_step, C_step, kept_step,
    PACKED: gl.constexpr, STARTS: gl.constexpr, FINAL: gl.constexpr, INITIAL: gl.constexpr, GATED: gl.constexpr,
    PARTS: gl.constexpr, Y: gl.constexpr, Z: gl.constexpr, D_: gl.constexpr, BIAS: gl.constexpr, EXACT: gl.constexpr,
    KEEP: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """All gradients of the steps from `low` to `high` of each chunk. Parts are walked from the last to the first.

    Rows of the gradients of x, dt and z, and of y, are E * SPREAD numbers apart.

    With GATED the output of the forward pass too. With KEEP the upstream gradient and z of a tile, of two bytes each,
    stay in shared memory for the last phase, for which x does in any case; else they are read again.

    r comes from `ends` and `sums` of the later chunks, or from the part after this one (PARTS, in `carried`, where the
    one that leaves this part goes too).
    """
    blocks = (E + CHANNELS - 1) // CHANNELS
    program = gl.program_id(0)
    slot = slot_of(program // blocks, T, sequences, length, PACKED)
    block = program % blocks
    channel = block * CHANNELS
    sequence, chunk, _, origin, total, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    is_last = steps <= high
    steps = gl.minimum(steps, high) - low
    first += low
    at, eh = state_offsets(CHANNELS, STATES_LAYOUT)
    at += channel * STATES
    live = (channel + eh < E)[None, :] & (at >= 0)
    a2 = gl.load(A + at, mask=live, other=0.0) * LOG2_E
    r = gl.zeros([STATES, CHANNELS], gl.float32, layout=STATES_LAYOUT)
    if is_last:
        if FINAL:
            r = gl.load(grad_final + sequence.to(gl.int64) * E * STATES + at, mask=live, other=0.0)
        if STARTS:
            small = length // finer
            pieces = ((total + small - 1) // small).to(gl.int32)
            end = first_slot(sequence, origin, T, small, PACKED) + pieces - 1
            r = fold(r, a2, ends, sums, end, pieces - (chunk + 1) * finer, E, channel, -1, EXACT)
    elif PARTS:
        r = gl.load(carried + slot.to(gl.int64) * E * STATES + at, mask=live, other=0.0)

    e = channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, NARROW_ROWS_LAYOUT))
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, NARROW_ROWS_LAYOUT))
    alive = (e < E)[None, :]
    bias = gl.zeros([CHANNELS], gl.float32, layout=gl.SliceLayout(0, NARROW_ROWS_LAYOUT))
    weight = bias
    if BIAS:
        bias = gl.load(dt_bias + e, mask=e < E, other=0.0)
    if D_:
        weight = gl.load(D + e, mask=e < E, other=0.0)
    n2 = gl.arange(0, STATES, layout=gl.SliceLayout(0, PAIRS_LAYOUT))
    t2 = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIRS_LAYOUT))
    d_A = gl.zeros([STATES, CHANNELS], gl.float32, layout=STATES_LAYOUT)
    d_D = gl.zeros([8, CHANNELS], gl.float32, layout=NARROW_ROWS_LAYOUT)
    d_bias = gl.zeros([8, CHANNELS], gl.float32, layout=NARROW_ROWS_LAYOUT)

    tiles = gl.maximum((steps + TILE - 1) // TILE, 0)
    left = gl.where(tiles > 0, steps - (tiles - 1) * TILE, 0)
    last = first + (tiles - 1) * TILE
    x += last * x_step
    dt += last * dt_step
    B += last * B_step
    C += last * C_step
    grad_x += last * (E * SPREAD)
    grad_dt += last * (E * SPREAD)
    kept += ((last - origin) // TILE + origin // TILE + sequence) * kept_step
    if PARTS:
        place = slot.to(gl.int64) * (high - low)
    else:
        place = first
    partials += (block.to(gl.int64) * partial_rows + place + tiles * TILE - TURN) * 2 * STATES
    if Y:
        grad_y += last * gy_step
    if Z:
        z += last * z_step
        grad_z += last * (E * SPREAD)
    if GATED:
        y += last * (E * SPREAD)
    line = gl.arange(0, 4 * TILE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    line_t = line // 4
    kind = line % 4

    rows_d = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_x = gl.allocate_shared_memory(x.dtype.element_ty, [TILE, CHANNELS], PLAIN)
    rows_g = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_B = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    rows_C = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    if KEEP and Y:
        kept_g = gl.allocate_shared_memory(x.dtype.element_ty, [TILE, CHANNELS], PLAIN)
    if KEEP and Z:
        kept_z = gl.allocate_shared_memory(x.dtype.element_ty, [TILE, CHANNELS], PLAIN)
    row_bias = gl.allocate_shared_memory(gl.float32, [1, CHANNELS], PLAIN)
    row_weight = gl.allocate_shared_memory(gl.float32, [1, CHANNELS], PLAIN)
    row_bias.store(bias[None, :])
    row_weight.store(weight[None, :])
    starts = gl.allocate_shared_memory(gl.float32, [2, 4 * CHANNELS, STATES], STARTS_LAYOUT)
    turns_h = reinterpreted(starts, gl.float32, [TURNS, CHANNELS, STATES], STARTS_LAYOUT)
    sums_BC = gl.allocate_shared_memory(gl.float32, [64, 32], PARTIAL_ROWS)
    # du and the sum of A q of a turn, in the place of the state before it, which is dead when it is done
    slots = reinterpreted(starts, gl.float32, [TURNS, 4, TURN, CHANNELS], SLOTS)
    turns_uq = reinterpreted(starts, gl.float32, [TURNS * 2, 2 * TURN, CHANNELS], PLAIN)
    turns_d = turns_of(rows_d)
    turns_x = turns_of(rows_x)
    turns_g = turns_of(rows_g)
    turns_B = turns_of(rows_B)
    turns_C = turns_of(rows_C)
    turned_B = rows_B.permute((1, 0))
    one_k = gl.arange(0, 32, layout=gl.SliceLayout(1, RIGHT))
    one_c = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))
    ones = ((one_k[:, None] // 4) == one_c[None, :]).to(gl.float32)

    for tile in range(tiles):
        # calculated again in every tile: kept, they would be spilled
        t = recomputed(t)
        t2 = recomputed(t2)
        there = (t < left)[:, None] & alive
        start = gl.load(kept + at, mask=live, other=0.0)
        raw_dt = tile_rows(dt, t[:, None] * dt_step + e[None, :], there)
        raw_x = tile_rows(x, t[:, None] * x_step + e[None, :], there)
        if Y:
            raw_g = tile_rows(grad_y, t[:, None] * gy_step + e[None, :], there)
        if Z:
            raw_z = tile_rows(z, t[:, None] * z_step + e[None, :], there)
        raw_B = tile_rows(B, t2[:, None] * B_step + n2[None, :], (t2 < left)[:, None])
        raw_C = tile_rows(C, t2[:, None] * C_step + n2[None, :], (t2 < left)[:, None])
        # what the tile before this one needs, a line a thread
        soon = tile + 1 < tiles
        ahead(x - TILE * x_step + channel + line_t * x_step, soon & (kind == 0))
        ahead(dt - TILE * dt_step + channel + line_t * dt_step, soon & (kind == 1))
        if Y:
            ahead(grad_y - TILE * gy_step + channel + line_t * gy_step, soon & (kind == 2))
        if Z:
            ahead(z - TILE * z_step + channel + line_t * z_step, soon & (kind == 3))
        state = channel * STATES + line * 32
        ahead(kept - kept_step + state, soon & (line < 32) & (state < kept_step))
        h = start
        v = wide(raw_dt) + row_bias.load(NARROW_ROWS_LAYOUT)
        delta = gl.where((t < left)[:, None], softplus(v, exp_of_minus(gl.abs(v))), 0.0)
        rows_d.store(delta)
        rows_x.store(raw_x)
        g = gl.zeros_like(delta)
        if KEEP and Y:
            kept_g.store(raw_g)
        if KEEP and Z:
            kept_z.store(raw_z)
        if Y:
            g = wide(raw_g)
            if Z:
                gate = wide(raw_z)
                g *= gate * sigmoid(gate)
        rows_g.store(g)
        rows_B.store(wide(raw_B))
        rows_C.store(wide(raw_C))
        # kept four at a time: the compiler puts a barrier between two stores to one buffer
        early = (h,)
        for step in gl.static_range(TILE - TURN):
            delta_k = rows_d.slice(step, 1, 0).load(STATES_LAYOUT)
            decay = decay_of(delta_k * a2, EXACT)
            u_k = delta_k * rows_x.slice(step, 1, 0).load(STATES_LAYOUT).to(gl.float32)
            drive = u_k * turned_B.slice(step, 1, 1).load(STATES_LAYOUT)
            h = gl.fma(decay, h, drive)
            if step % TURN == TURN - 1:
                early = early + (h,)
            if step == 4 * TURN - 1:
                starts.index(0).store(four_states(early[0], early[1], early[2], early[3]))
        starts.index(1).store(four_states(early[4], early[5], early[6], early[7]))
        for back in range(TURNS):
            turn = TURNS - 1 - back
            d4 = turns_d.index(turn)
            x4 = turns_x.index(turn)
            g4 = turns_g.index(turn)
            b4 = turns_B.index(turn).permute((1, 0))
            c4 = turns_C.index(turn).permute((1, 0))
            h = turns_h.index(turn).permute((1, 0)).load(STATES_LAYOUT)
            if back > 0:
                store_sums(partials, sums_BC, left - (turn + 1) * TURN)
                partials -= TURN * 2 * STATES
            states = (h,)
            decays = ()
            inputs = ()
            ys = ()
            for k in gl.static_range(TURN):
                delta_k = d4.slice(k, 1, 0).load(STATES_LAYOUT)
                decay = decay_of(delta_k * a2, EXACT)
                u_k = delta_k * x4.slice(k, 1, 0).load(STATES_LAYOUT).to(gl.float32)
                inputs = inputs + (u_k,)
                drive = u_k * b4.slice(k, 1, 1).load(STATES_LAYOUT)
                h = gl.fma(decay, h, drive)
                ys = ys + (gl.sum(h * c4.slice(k, 1, 1).load(STATES_LAYOUT), 0),)
                decays = decays + (decay,)
                states = states + (h,)
            sums4 = ()
            us = ()
            qs = ()
            for k in gl.static_range(TURN - 1, -1, -1):
                delta_k = d4.slice(k, 1, 0).load(STATES_LAYOUT)
                into = b4.slice(k, 1, 1).load(STATES_LAYOUT)
                g_k = g4.slice(k, 1, 0).load(STATES_LAYOUT)
                d_h = gl.fma(g_k, c4.slice(k, 1, 1).load(STATES_LAYOUT), r)
                u_k = inputs[k]
                sums4 = (sum_of_four_channels(d_h * u_k, states[k + 1] * g_k, ones, EXACT),) + sums4
                r = decays[k] * d_h
                q = r * states[k]
                us = (gl.sum(d_h * into, 0),) + us
                qs = (gl.sum(q * a2, 0),) + qs
                d_A = gl.fma(q, delta_k, d_A)
            g4.store(four_rows(ys))
            u_and_q = gl.join(four_rows(us), four_rows(qs)).permute([2, 0, 1]).reshape([2 * TURN, CHANNELS])
            turns_uq.index(2 * turn).store(u_and_q)
            four = gl.join(gl.join(sums4[0], sums4[1]), gl.join(sums4[2], sums4[3])).reshape([4, 16, 8, 2, 2])
            sums_BC.store(four.permute([0, 4, 3, 1, 2]).reshape([64, 32]))

        t = recomputed(t)
        there = (t < left)[:, None] & alive
        out_at = t[:, None] * (E * SPREAD) + e[None, :]
        old_x = rows_x.load(NARROW_ROWS_LAYOUT)
        old_dt = old_x
        if EXACT:
            old_dt = tile_rows(dt, t[:, None] * dt_step + e[None, :], there)
        old_g = old_x
        old_z = old_x
        if Y:
            if KEEP:
                old_g = kept_g.load(NARROW_ROWS_LAYOUT)
            else:
                old_g = tile_rows(grad_y, t[:, None] * gy_step + e[None, :], there)
        if Z:
            if KEEP:
                old_z = kept_z.load(NARROW_ROWS_LAYOUT)
            else:
                old_z = tile_rows(z, t[:, None] * z_step + e[None, :], there)
        # the tile before, if there is one: its loads are under way during the rest of this one
        x -= TILE * x_step
        dt -= TILE * dt_step
        B -= TILE * B_step
        C -= TILE * C_step
        kept -= kept_step
        if Y:
            grad_y -= TILE * gy_step
        if Z:
            z -= TILE * z_step
        store_sums(partials, sums_BC, left)
        partials -= TURN * 2 * STATES

        delta = rows_d.load(NARROW_ROWS_LAYOUT)
        if EXACT:
            slope = sigmoid(wide(old_dt) + row_bias.load(NARROW_ROWS_LAYOUT))
        else:
            slope = slope_of(delta)
        value = wide(old_x)
        g = gl.zeros_like(delta)
        if Y:
            g = wide(old_g)
        if GATED or Z:
            out = gl.fma(row_weight.load(NARROW_ROWS_LAYOUT), value, rows_g.load(NARROW_ROWS_LAYOUT))
            if Z:
                gate = wide(old_z)
                open_ = sigmoid(gate)
                g_open = g * open_
                g = g_open * gate
                d_z = out * g_open * gl.fma(gate, 1.0 - open_, gl.full_like(gate, 1.0))
                gl.store(grad_z + out_at, d_z.to(grad_z.dtype.element_ty), mask=there)
                out *= gate * open_
            if GATED:
                gl.store(y + out_at, out.to(y.dtype.element_ty), mask=there)
        d_u = from_slots(slots, 0)
        d_x = gl.fma(d_u, delta, g * row_weight.load(NARROW_ROWS_LAYOUT))
        gl.store(grad_x + out_at, d_x.to(grad_x.dtype.element_ty), mask=there)
        d_dt = gl.fma(d_u, value, from_slots(slots, 1) * LN_2) * slope
        gl.store(grad_dt + out_at, d_dt.to(grad_dt.dtype.element_ty), mask=there)
        if D_:
            d_D += gl.convert_layout(gl.sum((g * value).reshape([4, 8, CHANNELS]), 0), NARROW_ROWS_LAYOUT)
        if BIAS:
            d_dt = gl.where((t < left)[:, None], d_dt, 0.0)
            d_bias += gl.convert_layout(gl.sum(d_dt.reshape([4, 8, CHANNELS]), 0), NARROW_ROWS_LAYOUT)
        grad_x -= TILE * SPREAD * E
        grad_dt -= TILE * SPREAD * E
        if Z:
            grad_z -= TILE * SPREAD * E
        if GATED:
            y -= TILE * SPREAD * E
        left = TILE
    to = slot.to(gl.int64) * E
    gl.store(grad_A + to * STATES + at, d_A, mask=live)
    if D_:
        gl.store(grad_D + to + e, gl.sum(d_D, 0), mask=e < E)
    if BIAS:
        gl.store(grad_bias + to + e, gl.sum(d_bias, 0), mask=e < E)
    if PARTS:
        gl.store(carried + to * STATES + at, r, mask=live)
    if INITIAL:
        if (chunk == 0) & (low == 0):
            gl.store(grad_initial + sequence.to(gl.int64) * E * STATES + at, r, mask=live)
