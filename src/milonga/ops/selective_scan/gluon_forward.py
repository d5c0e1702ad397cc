"""Forward kernel of `selective_scan` in Gluon. See `gluon_common` for how the work is laid out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from milonga.ops.selective_scan.gluon_common import (
    HALF_ROWS_LAYOUT,
    HALF_STATES_LAYOUT,
    LOG2_E,
    PAIRS_LAYOUT,
    PART,
    PARTS_OF_TILE,
    PLAIN,
    ROWS_LAYOUT,
    STATES,
    STATES_LAYOUT,
    TILE,
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


@gluon.jit(do_not_specialize=["T", "sequences", "length", "finer"])
def scan_forward(
    x, dt, z, B, C, A, D, dt_bias, ends, sums, initial, bounds, y, final, kept,
    T, E, sequences, length, finer, x_step, dt_step, z_step, B_step, C_step, kept_step,
    PACKED: gl.constexpr, STARTS: gl.constexpr, INITIAL: gl.constexpr, SAVE: gl.constexpr, ENDS: gl.constexpr,
    Z: gl.constexpr, D_: gl.constexpr, BIAS: gl.constexpr, EXACT: gl.constexpr, CH: gl.constexpr,
):  # fmt: skip
    """With ENDS: the state that a chunk ends in from zero, to `ends`, and its sum of delta, to `sums`.

    There are `finer` of these chunks to one of the others, to keep the GPU busy to the end; the last need none.

    Else everything; with STARTS from the state that `ends` and `sums` of the earlier chunks give. CH channels a
    program: 64, or 32 where neither.
    """
    HL: gl.constexpr = STATES_LAYOUT if CH == 64 else HALF_STATES_LAYOUT
    RL: gl.constexpr = ROWS_LAYOUT if CH == 64 else HALF_ROWS_LAYOUT
    blocks = (E + CH - 1) // CH
    program = gl.program_id(0)
    channel = (program % blocks) * CH
    if ENDS:
        length = length // finer
    slot = slot_of(program // blocks, T, sequences, length, PACKED)
    sequence, chunk, chunks, origin, _, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    # of the last chunk nobody needs the end
    wanted = chunk < (chunks - 1) // finer * finer
    if ENDS:
        if not wanted:
            steps = 0
    at, eh = state_offsets(CH, HL)
    at += channel * STATES
    live = (channel + eh < E)[None, :] & (at >= 0)
    a2 = gl.load(A + at, mask=live, other=0.0) * LOG2_E
    e = channel + gl.arange(0, CH, layout=gl.SliceLayout(0, RL))
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, RL))
    alive = (e < E)[None, :]
    bias = gl.zeros([CH], gl.float32, layout=gl.SliceLayout(0, RL))
    if BIAS:
        bias = gl.load(dt_bias + e, mask=e < E, other=0.0)
    weight = gl.zeros([CH], gl.float32, layout=gl.SliceLayout(0, RL))
    if D_ and not ENDS:
        weight = gl.load(D + e, mask=e < E, other=0.0)
    n2 = gl.arange(0, STATES, layout=gl.SliceLayout(0, PAIRS_LAYOUT))
    t2 = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIRS_LAYOUT))

    h = gl.zeros([STATES, CH], gl.float32, layout=HL)
    if INITIAL and not ENDS:
        h = gl.load(initial + sequence.to(gl.int64) * E * STATES + at, mask=live, other=0.0)
    if STARTS:
        fine = first_slot(sequence, origin, T, length // finer, PACKED)
        h = fold(h, a2, ends, sums, fine, chunk * finer, E, channel, 1, EXACT)

    x += first * x_step
    dt += first * dt_step
    B += first * B_step
    x_at = t[:, None] * x_step + e[None, :]
    dt_at = t[:, None] * dt_step + e[None, :]
    B_at = t2[:, None] * B_step + n2[None, :]
    inside = (t < steps)[:, None]
    inside2 = (t2 < steps)[:, None]
    raw_x = tile_rows(x, x_at, inside & alive)
    raw_dt = tile_rows(dt, dt_at, inside & alive)
    raw_B = tile_rows(B, B_at, inside2)
    raw_z = raw_x
    raw_C = raw_B
    if not ENDS:
        C += first * C_step
        C_at = t2[:, None] * C_step + n2[None, :]
        raw_C = tile_rows(C, C_at, inside2)
        y += first * E
        kept += ((first - origin) // TILE + origin // TILE + sequence) * kept_step
        if Z:
            z += first * z_step
            z_at = t[:, None] * z_step + e[None, :]
            raw_z = tile_rows(z, z_at, inside & alive)

    rows_d = gl.allocate_shared_memory(gl.float32, [TILE, CH], PLAIN)
    rows_u = gl.allocate_shared_memory(gl.float32, [TILE, CH], PLAIN)
    rows_B = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    if not ENDS:
        rows_y = gl.allocate_shared_memory(gl.float32, [TILE, CH], PLAIN)
        rows_C = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    row_bias = gl.allocate_shared_memory(gl.float32, [1, CH], PLAIN)
    row_bias.store(bias[None, :])
    parts_d = parts_of(rows_d)
    parts_u = parts_of(rows_u)
    parts_B = parts_of(rows_B)
    if not ENDS:
        row_weight = gl.allocate_shared_memory(gl.float32, [1, CH], PLAIN)
        row_weight.store(weight[None, :])
        parts_y = parts_of(rows_y)
        parts_C = parts_of(rows_C)
    k_at = gl.arange(0, PART, layout=gl.SliceLayout(1, HL))[:, None]
    delta_sum = gl.zeros([TILE, CH], gl.float32, layout=RL)
    for tile in range((steps + TILE - 1) // TILE):
        left = steps - tile * TILE
        v = wide(raw_dt) + row_bias.load(RL)
        delta = gl.where((t < left)[:, None], softplus(v, exp_of_minus(gl.abs(v))), 0.0)
        rows_d.store(delta)
        rows_u.store(delta * wide(raw_x))
        rows_B.store(wide(raw_B))
        this_x = raw_x
        this_z = raw_z
        if ENDS:
            delta_sum += delta
        else:
            rows_C.store(wide(raw_C))
            if SAVE:
                gl.store(kept + at, h, mask=live)
                kept += kept_step
        x += TILE * x_step
        dt += TILE * dt_step
        B += TILE * B_step
        inside = (t < left - TILE)[:, None]
        inside2 = (t2 < left - TILE)[:, None]
        raw_x = tile_rows(x, x_at, inside & alive)
        raw_dt = tile_rows(dt, dt_at, inside & alive)
        raw_B = tile_rows(B, B_at, inside2)
        if not ENDS:
            C += TILE * C_step
            raw_C = tile_rows(C, C_at, inside2)
            if Z:
                z += TILE * z_step
                raw_z = tile_rows(z, z_at, inside & alive)
        for part in range(PARTS_OF_TILE):
            deltas = parts_d.index(part)
            inputs = parts_u.index(part)
            into = parts_B.index(part).permute((1, 0))
            if not ENDS:
                out_of = parts_C.index(part).permute((1, 0))
                result = gl.zeros([PART, CH], gl.float32, layout=HL)
            for k in gl.static_range(PART):
                delta_k = deltas.slice(k, 1, 0).load(HL)
                drive = inputs.slice(k, 1, 0).load(HL) * into.slice(k, 1, 1).load(HL)
                h = gl.fma(decay_of(delta_k * a2, EXACT), h, drive)
                if not ENDS:
                    y_k = gl.sum(h * out_of.slice(k, 1, 1).load(HL), 0)
                    result = gl.where(k_at == k, y_k[None, :], result)
            if not ENDS:
                parts_y.index(part).store(result)
        if not ENDS:
            out = gl.fma(row_weight.load(RL), wide(this_x), rows_y.load(RL))
            if Z:
                gate = wide(this_z)
                out *= gate * sigmoid(gate)
            out_at = t[:, None] * E + e[None, :]
            gl.store(y + out_at, out.to(y.dtype.element_ty), mask=(t < left)[:, None] & alive)
            y += TILE * E
    if ENDS:
        if wanted:
            gl.store(ends + slot.to(gl.int64) * E * STATES + at, h, mask=live)
            gl.store(sums + slot.to(gl.int64) * E + e, gl.sum(delta_sum, 0), mask=e < E)
    elif chunk == chunks - 1:
        gl.store(final + sequence.to(gl.int64) * E * STATES + at, h, mask=live)
