"""Forward kernel of `selective_scan` in Gluon. See `gluon_common` for how the work is laid out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from milonga.ops.selective_scan.gluon_common import (
    CHANNELS,
    LOG2_E,
    PAIRS_LAYOUT,
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
    sigmoid,
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
    Z: gl.constexpr, D_: gl.constexpr, BIAS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """With ENDS: the state that a chunk ends in from zero, to `ends`, and its sum of delta, to `sums`.

    There are `finer` of these chunks to one of the others, to keep the GPU busy to the end; the last need none.

    Else everything; with STARTS from the state that `ends` and `sums` of the earlier chunks give.
    """
    blocks = (E + CHANNELS - 1) // CHANNELS
    program = gl.program_id(0)
    slot = program // blocks
    channel = (program % blocks) * CHANNELS
    if ENDS:
        length = length // finer
    sequence, chunk, chunks, origin, _, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    # of the last chunk nobody needs the end
    wanted = chunk < (chunks - 1) // finer * finer
    if ENDS:
        if not wanted:
            steps = 0
    at, eh = state_offsets()
    at += channel * STATES
    live = (channel + eh < E)[None, :] & (at >= 0)
    a2 = gl.load(A + at, mask=live, other=0.0) * LOG2_E
    e = channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    alive = (e < E)[None, :]
    bias = gl.zeros([CHANNELS], gl.float32, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    if BIAS:
        bias = gl.load(dt_bias + e, mask=e < E, other=0.0)
    weight = gl.zeros([CHANNELS], gl.float32, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    if D_ and not ENDS:
        weight = gl.load(D + e, mask=e < E, other=0.0)
    n2 = gl.arange(0, STATES, layout=gl.SliceLayout(0, PAIRS_LAYOUT))
    t2 = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIRS_LAYOUT))

    h = gl.zeros([STATES, CHANNELS], gl.float32, layout=STATES_LAYOUT)
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

    rows_d = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_u = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
    rows_B = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    if not ENDS:
        rows_y = gl.allocate_shared_memory(gl.float32, [TILE, CHANNELS], PLAIN)
        rows_C = gl.allocate_shared_memory(gl.float32, [TILE, STATES], PLAIN)
    k_at = gl.arange(0, TILE, layout=gl.SliceLayout(1, STATES_LAYOUT))[:, None]
    delta_sum = gl.zeros([TILE, CHANNELS], gl.float32, layout=ROWS_LAYOUT)
    for tile in range((steps + TILE - 1) // TILE):
        left = steps - tile * TILE
        v = wide(raw_dt) + bias[None, :]
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
        turned_B = rows_B.permute((1, 0))
        if ENDS:
            for k in gl.static_range(TILE):
                delta_k = rows_d.slice(k, 1, 0).load(STATES_LAYOUT)
                drive = rows_u.slice(k, 1, 0).load(STATES_LAYOUT) * turned_B.slice(k, 1, 1).load(STATES_LAYOUT)
                h = gl.fma(decay_of(delta_k * a2, EXACT), h, drive)
        else:
            turned_C = rows_C.permute((1, 0))
            result = gl.zeros([TILE, CHANNELS], gl.float32, layout=STATES_LAYOUT)
            for k in gl.static_range(TILE):
                delta_k = rows_d.slice(k, 1, 0).load(STATES_LAYOUT)
                drive = rows_u.slice(k, 1, 0).load(STATES_LAYOUT) * turned_B.slice(k, 1, 1).load(STATES_LAYOUT)
                h = gl.fma(decay_of(delta_k * a2, EXACT), h, drive)
                y_k = gl.sum(h * turned_C.slice(k, 1, 1).load(STATES_LAYOUT), 0)
                result = gl.where(k_at == k, y_k[None, :], result)
            rows_y.store(result)
            out = gl.fma(weight[None, :], wide(this_x), rows_y.load(ROWS_LAYOUT))
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
