"""Triton kernels of `selective_scan`.

A program is one warp with a block of neighbouring channels of one chunk of time of one sequence. It walks along time
with the states in registers, laid out `[N, CH]` with the channels across the lanes, so that sums over states stay
within a lane. Time is walked `K` steps at a turn.

Where rows and channels alone do not fill the GPU, sequences are cut into chunks. A chunk's effect on the state is
h -> P h + e, with e the state it ends in from zero and P = exp(A sum(delta)): a first pass finds both, `carry`
folds the chunks of a sequence one after the other, and then every chunk is walked from its true start. The backward
pass does the same from the other end with the gradient of the state.

The loads of a turn are issued a turn ahead (`rows_of`), and B and C, which every lane reads whole, are brought into the
L1 cache a turn ahead (`touch`): without both the warps, few because of their registers, wait for memory most of the
time.

Letters: R rows of time in all, T steps a row of the batch, E channels, N states (a power of two, padded with zeros),
CH channels a program, slot: a chunk's place among all chunks. Offsets of rows are int64. Chunks beyond a sequence's
end have no steps. A step beyond the end of its chunk gets delta = 0 and no input, which leaves the states as they are.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_of_minus(v):
    return tl.exp2(v * -LOG2_E)


@triton.jit
def decay_of(v, EXACT: tl.constexpr):
    """2^v for v <= 0. With EXACT within 2.2e-7, the closer the nearer v is to an integer: no bias where it is almost 1.

    A channel that remembers a thousand steps multiplies a bias by that: with the hardware's the gradient of A was off
    by 3e-6 after 500 steps.
    """
    if EXACT:
        v = tl.where(v < -126.0, -126.0, v)
        # the rounded exponent in the low bits, and 127
        shifted = v + 12583039.0
        f = v - (shifted - 12583039.0)
        p = tl.fma(f, 0.001333354, 0.0096662454)
        p = tl.fma(f, p, 0.055505004)
        p = tl.fma(f, p, 0.24022351)
        p = tl.fma(f, p, 0.69314712)
        p = tl.fma(f, p, 1.0)
        v = p * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    else:
        v = tl.exp2(v)
    return v


@triton.jit
def softplus(v, tail):
    """log(1 + exp(v)) with `tail` = exp(-|v|), relatively accurate for very negative v too.

    log(1 + e) / e is a polynomial of degree 7 on [0, 1], fitted by least squares, relative error 3.5e-7: the hardware's
    logarithm of 1 + e loses 2e-4 at v = -7, where trained models live.
    """
    p = tl.fma(tail, -0.00853921, 0.04408963)
    p = tl.fma(tail, p, -0.10768171)
    p = tl.fma(tail, p, 0.17745242)
    p = tl.fma(tail, p, -0.24495463)
    p = tl.fma(tail, p, 0.33275479)
    p = tl.fma(tail, p, -0.49997404)
    p = tl.fma(tail, p, 0.99999982)
    return tl.fma(tail, p, tl.maximum(v, 0.0))


@triton.jit
def step_size(dt, bias, ok):
    """delta of a step, 0 where it is beyond the end."""
    v = dt.to(tl.float32) + bias
    return tl.where(ok, softplus(v, exp_of_minus(tl.abs(v))), 0.0)


@triton.jit
def rows_of(pointer, stride, step, steps, live, K: tl.constexpr):
    """K rows of a chunk from `step` on, at `pointer`; zeros outside the chunk."""
    values = ()
    for k in tl.static_range(K):
        inside = (step + k >= 0) & (step + k < steps)
        values = values + (tl.load(pointer + k * stride, mask=live & inside, other=0.0),)
    return values


@triton.jit
def touch(pointer, step, steps, N: tl.constexpr, K: tl.constexpr):
    """K rows of B or C from `step` on, one number a lane: brings them into the L1 cache ahead of use."""
    i = tl.arange(0, K * N)
    return tl.load(pointer + i, mask=(step * N + i >= 0) & (step * N + i < steps * N), other=0.0)


@triton.jit
def chunk_of(slot, bounds, T, sequences, length, PACKED: tl.constexpr):
    """-> (sequence, chunk within it, its number of chunks, first row, steps), rows int64.

    Sequence s, which starts at row r, has the slots from r // length + s on; an empty one still has one.
    """
    if PACKED:
        low = slot * 0
        high = sequences
        while low + 1 < high:
            middle = (low + high) // 2
            if tl.load(bounds + middle) // length + middle <= slot:
                low = middle
            else:
                high = middle
        sequence = low
        start = tl.load(bounds + sequence)
        total = tl.load(bounds + sequence + 1) - start
        chunk = (slot - start // length - sequence).to(tl.int32)
    else:
        per_row = tl.maximum((T + length - 1) // length, 1)
        sequence = slot // per_row
        chunk = slot % per_row
        start = sequence.to(tl.int64) * T
        total = start * 0 + T
    chunks = tl.maximum((total + length - 1) // length, 1).to(tl.int32)
    first = start + chunk.to(tl.int64) * length
    steps = tl.minimum(tl.maximum(start + total - first, 0), length).to(tl.int32)
    return sequence, chunk, chunks, start, first, steps


@triton.jit
def first_slot(sequence, bounds, T, length, PACKED: tl.constexpr):
    if PACKED:
        return (tl.load(bounds + sequence) // length).to(tl.int32) + sequence
    else:
        return sequence * tl.maximum((T + length - 1) // length, 1)


@triton.jit(do_not_specialize=["T", "E", "sequences", "length", "x_step", "dt_step", "z_step"])
def scan_forward(
    x, dt, z, B, C, A, D, dt_bias, starts, initial, bounds, y, final, kept, sums,
    T, E, sequences, length, x_step, dt_step, z_step,
    N: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr, CH: tl.constexpr, K: tl.constexpr,
    SPACING: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, INITIAL: tl.constexpr, SAVE: tl.constexpr,
    ENDS: tl.constexpr, Z: tl.constexpr, D_: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """With ENDS: state only, from zero, to `final` (a row per slot) and sum of delta to `sums`. Else everything."""
    blocks = tl.cdiv(E, CH)
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    sequence, chunk, chunks, origin, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    e = block * CH + tl.arange(0, CH)
    n = tl.arange(0, N)
    live = e < E
    tile = n[:, None] * E + e[None, :]
    a2 = tl.load(A + tile, mask=live[None, :], other=0.0) * LOG2_E
    bias = tl.zeros([CH], tl.float32)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=live, other=0.0)
    weight = tl.zeros([CH], tl.float32)
    if D_:
        weight = tl.load(D + e, mask=live, other=0.0)
    h = tl.zeros([N, CH], tl.float32)
    if STARTS:
        h = tl.load(starts + slot.to(tl.int64) * N * E + tile, mask=live[None, :], other=0.0)
    elif INITIAL:
        h = tl.load(initial + sequence.to(tl.int64) * N * E + tile, mask=live[None, :], other=0.0)
    if ENDS and chunk >= chunks - 1:
        steps = 0
    x += first * x_step + e
    dt += first * dt_step + e
    B_first = B + first * N
    C_first = C + first * N
    B = B_first + n
    if not ENDS:
        C = C_first + n
        y += first * E + e
        if Z:
            z += first * z_step + e
    total = tl.zeros([CH], tl.float32)
    near = tl.zeros([K * N], tl.float32)
    held_B = near
    held_C = near
    B_rows = B_first + K * N
    C_rows = C_first + K * N
    xs = rows_of(x, x_step, 0, steps, live, K)
    ds = rows_of(dt, dt_step, 0, steps, live, K)
    zs = xs
    if Z and not ENDS:
        zs = rows_of(z, z_step, 0, steps, live, K)
    for step in range(0, steps, K):
        if SAVE:
            if step % SPACING == 0:
                index = (first - origin + step) // SPACING + origin // SPACING + sequence
                tl.store(kept + index * SLOT * STATES + tile, h, mask=live[None, :] & (n < STATES)[:, None])
        x += K * x_step
        dt += K * dt_step
        next_x = rows_of(x, x_step, step + K, steps, live, K)
        next_d = rows_of(dt, dt_step, step + K, steps, live, K)
        near += held_B
        held_B = touch(B_rows, step + K, steps, N, K)
        B_rows += K * N
        next_z = next_x
        if not ENDS:
            near += held_C
            held_C = touch(C_rows, step + K, steps, N, K)
            C_rows += K * N
            if Z:
                z += K * z_step
                next_z = rows_of(z, z_step, step + K, steps, live, K)
        for k in tl.static_range(K):
            inside = step + k < steps
            ok = live & inside
            delta = step_size(ds[k], bias, ok)
            value = xs[k].to(tl.float32)
            into = tl.load(B + k * N, mask=(n < N) & inside, other=0.0)
            h = tl.fma(decay_of(delta[None, :] * a2, EXACT), h, (delta * value)[None, :] * into[:, None])
            if ENDS:
                total += delta
            else:
                out = tl.load(C + k * N, mask=(n < N) & inside, other=0.0)
                result = tl.fma(weight, value, tl.sum(h * out[:, None], 0))
                if Z:
                    gate = zs[k].to(tl.float32)
                    result *= gate / (1.0 + exp_of_minus(gate))
                tl.store(y + k * E, result, mask=ok)
        B += K * N
        if not ENDS:
            C += K * N
            y += K * E
        xs = next_x
        ds = next_d
        zs = next_z
    # never so: it keeps the compiler from leaving out the loads of `touch`
    tl.store(final + tl.arange(0, K * N), near, mask=tl.zeros([K * N], tl.int32) + E < 0)
    if ENDS:
        if chunk < chunks - 1:
            tl.store(final + slot.to(tl.int64) * N * E + tile, h, mask=live[None, :])
            tl.store(sums + slot.to(tl.int64) * E + e, total, mask=live)
    elif chunk == chunks - 1:
        tl.store(final + sequence.to(tl.int64) * N * E + tile, h, mask=live[None, :])


@triton.jit(do_not_specialize=["T", "E", "sequences", "length"])
def carry(
    ends, sums, A, outer, bounds, T, E, sequences, length,
    N: tl.constexpr, CH: tl.constexpr, PACKED: tl.constexpr, OUTER: tl.constexpr, REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Replaces the ends of all chunks of a sequence by what enters each: from `outer` on, in the order of time.

    With REVERSE from the last chunk to the first.
    """
    blocks = tl.cdiv(E, CH)
    sequence = tl.program_id(0) // blocks
    e = (tl.program_id(0) % blocks) * CH + tl.arange(0, CH)
    n = tl.arange(0, N)
    mask = (e < E)[None, :] & (n < N)[:, None]
    tile = n[:, None] * E + e[None, :]
    a2 = tl.load(A + tile, mask=mask, other=0.0) * LOG2_E
    slot = first_slot(sequence, bounds, T, length, PACKED)
    _, _, chunks, _, _, _ = chunk_of(slot, bounds, T, sequences, length, PACKED)
    h = tl.zeros([N, CH], tl.float32)
    if OUTER:
        h = tl.load(outer + sequence.to(tl.int64) * N * E + tile, mask=mask, other=0.0)
    for i in range(chunks):
        if REVERSE:
            at = (slot + chunks - 1 - i).to(tl.int64)
        else:
            at = (slot + i).to(tl.int64)
        inner = i < chunks - 1
        end = tl.load(ends + at * N * E + tile, mask=mask & inner, other=0.0)
        total = tl.load(sums + at * E + e, mask=(e < E) & inner, other=0.0)
        tl.store(ends + at * N * E + tile, h, mask=mask)
        h = tl.fma(decay_of(a2 * total[None, :], EXACT), h, end)


@triton.jit(do_not_specialize=["T", "E", "sequences", "length", "gy_step", "dt_step", "z_step"])
def scan_back_ends(
    grad_y, dt, z, C, A, dt_bias, bounds, ends, sums, T, E, sequences, length, gy_step, dt_step, z_step,
    N: tl.constexpr, CH: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
    BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradient that leaves each chunk but the first at its start, if none comes in at its end; sums of delta."""
    blocks = tl.cdiv(E, CH)
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    _, chunk, _, _, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    e = block * CH + tl.arange(0, CH)
    n = tl.arange(0, N)
    live = e < E
    tile = n[:, None] * E + e[None, :]
    a2 = tl.load(A + tile, mask=live[None, :], other=0.0) * LOG2_E
    bias = tl.zeros([CH], tl.float32)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=live, other=0.0)
    if chunk == 0:
        steps = 0
    turns = (steps + K - 1) // K
    last = first + (turns - 1) * K
    grad_y += last * gy_step + e
    dt += last * dt_step + e
    C_rows = C + last * N
    C = C_rows + n
    if Z:
        z += last * z_step + e
    r = tl.zeros([N, CH], tl.float32)
    total = tl.zeros([CH], tl.float32)
    near = tl.zeros([K * N], tl.float32)
    held_C = near
    gs = rows_of(grad_y, gy_step, (turns - 1) * K, steps, live & Y, K)
    ds = rows_of(dt, dt_step, (turns - 1) * K, steps, live, K)
    zs = ds
    if Z:
        zs = rows_of(z, z_step, (turns - 1) * K, steps, live, K)
    for turn in range(turns):
        step = (turns - 1 - turn) * K
        grad_y -= K * gy_step
        dt -= K * dt_step
        C_rows -= K * N
        next_g = rows_of(grad_y, gy_step, step - K, steps, live & Y, K)
        next_d = rows_of(dt, dt_step, step - K, steps, live, K)
        near += held_C
        held_C = touch(C_rows, step - K, steps, N, K)
        next_z = next_d
        if Z:
            z -= K * z_step
            next_z = rows_of(z, z_step, step - K, steps, live, K)
        for k in tl.static_range(K - 1, -1, -1):
            inside = step + k < steps
            delta = step_size(ds[k], bias, live & inside)
            g = gs[k].to(tl.float32)
            if Z:
                gate = zs[k].to(tl.float32)
                g *= gate / (1.0 + exp_of_minus(gate))
            out = tl.load(C + k * N, mask=(n < N) & inside, other=0.0)
            r = decay_of(delta[None, :] * a2, EXACT) * tl.fma(g[None, :], out[:, None], r)
            total += delta
        C -= K * N
        gs = next_g
        ds = next_d
        zs = next_z
    tl.store(ends + tl.arange(0, K * N), near, mask=tl.zeros([K * N], tl.int32) + E < 0)
    if chunk > 0:
        tl.store(ends + slot.to(tl.int64) * N * E + tile, r, mask=live[None, :])
        tl.store(sums + slot.to(tl.int64) * E + e, total, mask=live)


@triton.jit(
    do_not_specialize=["T", "E", "rows", "sequences", "length", "gy_step", "x_step", "dt_step", "z_step", "unit"]
)
def scan_backward(
    grad_y, x, dt, z, B, C, A, D, dt_bias, ends, grad_final, bounds, kept, scratch,
    grad_x, grad_dt, grad_z, grad_BC, grad_A, grad_D, grad_bias, grad_initial,
    T, E, rows, sequences, length, gy_step, x_step, dt_step, z_step, unit,
    N: tl.constexpr, STATES: tl.constexpr, SLOT: tl.constexpr, CH: tl.constexpr, K: tl.constexpr,
    SPACING: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, FINAL: tl.constexpr, INITIAL: tl.constexpr,
    Y: tl.constexpr, Z: tl.constexpr, D_: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk. `SPACING` steps at a turn, from the last to the first.

    A turn walks forward from its checkpoint and keeps the state before every fourth step in `scratch` (it stays in the
    L2 cache), then takes four steps at a time: forward again with decays and states in registers, and back. Sums over
    channels, for B and C, go through the matrix units: the products of four steps times a matrix of ones.
    """
    blocks = tl.cdiv(E, CH)
    program = tl.program_id(0)
    slot = program // blocks
    block = program % blocks
    sequence, chunk, _, origin, first, steps = chunk_of(slot, bounds, T, sequences, length, PACKED)
    e = block * CH + tl.arange(0, CH)
    n = tl.arange(0, N)
    live = e < E
    tile = n[:, None] * E + e[None, :]
    known = live[None, :] & (n < STATES)[:, None]
    a2 = tl.load(A + tile, mask=live[None, :], other=0.0) * LOG2_E
    bias = tl.zeros([CH], tl.float32)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=live, other=0.0)
    weight = tl.zeros([CH], tl.float32)
    if D_:
        weight = tl.load(D + e, mask=live, other=0.0)
    r = tl.zeros([N, CH], tl.float32)
    if STARTS:
        r = tl.load(ends + slot.to(tl.int64) * N * E + tile, mask=live[None, :], other=0.0)
    elif FINAL:
        r = tl.load(grad_final + sequence.to(tl.int64) * N * E + tile, mask=live[None, :], other=0.0)
    d_A = tl.zeros([N, CH], tl.float32)
    d_D = tl.zeros([CH], tl.float32)
    d_bias = tl.zeros([CH], tl.float32)
    # `unit` is CH: a number that the compiler does not know keeps it from another layout here, and so everywhere
    scratch += program.to(tl.int64) * (SPACING // K * N * CH) + n[:, None] * unit + tl.arange(0, CH)[None, :]
    near = tl.zeros([K * N], tl.float32)
    held_B = near
    held_C = near
    columns = tl.arange(0, 16)
    ones_B = tl.where(tl.arange(0, CH)[:, None] * 0 + columns[None, :] < 8, 1.0, 0.0)
    ones_C = 1.0 - ones_B
    turns = (steps + SPACING - 1) // SPACING
    for turn in range(turns):
        tile_step = (turns - 1 - turn) * SPACING
        row = first + tile_step
        index = (row - origin) // SPACING + origin // SPACING + sequence
        h = tl.load(kept + index * SLOT * STATES + tile, mask=known, other=0.0)
        x_at = x + row * x_step + e
        dt_at = dt + row * dt_step + e
        B_rows = B + row * N
        C_rows = C + row * N
        B_at = B_rows + n
        xs = rows_of(x_at, x_step, tile_step, steps, live, K)
        ds = rows_of(dt_at, dt_step, tile_step, steps, live, K)
        for part in range(SPACING // K):
            tl.store(scratch + part * N * CH, h)
            x_at += K * x_step
            dt_at += K * dt_step
            B_rows += K * N
            C_rows += K * N
            beyond = tile_step + (part + 1) * K
            next_x = rows_of(x_at, x_step, beyond, steps, live, K)
            next_d = rows_of(dt_at, dt_step, beyond, steps, live, K)
            near += held_B + held_C
            held_B = touch(B_rows, beyond, steps, N, K)
            held_C = touch(C_rows, beyond, steps, N, K)
            for k in tl.static_range(K):
                inside = tile_step + part * K + k < steps
                delta = step_size(ds[k], bias, live & inside)
                into = tl.load(B_at + k * N, mask=(n < N) & inside, other=0.0)
                drive = delta * xs[k].to(tl.float32)
                h = tl.fma(decay_of(delta[None, :] * a2, EXACT), h, drive[None, :] * into[:, None])
            B_at += K * N
            xs = next_x
            ds = next_d
        tl.debug_barrier()
        step = tile_step + SPACING - K
        row = first + step
        next_h = tl.load(scratch + (SPACING // K - 1) * N * CH)
        xs = rows_of(x + row * x_step + e, x_step, step, steps, live, K)
        rs = rows_of(dt + row * dt_step + e, dt_step, step, steps, live, K)
        gs = rows_of(grad_y + row * gy_step + e, gy_step, step, steps, live & Y, K)
        zs = xs
        if Z:
            zs = rows_of(z + row * z_step + e, z_step, step, steps, live, K)
        for turned in range(SPACING // K):
            part = SPACING // K - 1 - turned
            step = tile_step + part * K
            row = first + step
            h = next_h
            B_at = B + row * N + n
            C_at = C + row * N + n
            out_at = row * E + e
            BC_at = grad_BC + (block.to(tl.int64) * rows + row) * 2 * N + n[:, None] + (columns // 8 * N)[None, :]
            before = row - K
            next_h = tl.load(scratch + tl.maximum(part - 1, 0) * N * CH)
            next_x = rows_of(x + before * x_step + e, x_step, step - K, steps, live, K)
            next_r = rows_of(dt + before * dt_step + e, dt_step, step - K, steps, live, K)
            next_g = rows_of(grad_y + before * gy_step + e, gy_step, step - K, steps, live & Y, K)
            next_z = next_x
            if Z:
                next_z = rows_of(z + before * z_step + e, z_step, step - K, steps, live, K)
            decays = ()
            states = (h,)
            deltas = ()
            for k in tl.static_range(K):
                inside = step + k < steps
                delta = step_size(rs[k], bias, live & inside)
                into = tl.load(B_at + k * N, mask=(n < N) & inside, other=0.0)
                decay = decay_of(delta[None, :] * a2, EXACT)
                h = tl.fma(decay, h, (delta * xs[k].to(tl.float32))[None, :] * into[:, None])
                deltas = deltas + (delta,)
                decays = decays + (decay,)
                states = states + (h,)
            for k in tl.static_range(K - 1, -1, -1):
                inside = step + k < steps
                ok = live & inside
                into = tl.load(B_at + k * N, mask=(n < N) & inside, other=0.0)
                out = tl.load(C_at + k * N, mask=(n < N) & inside, other=0.0)
                delta = deltas[k]
                value = xs[k].to(tl.float32)
                raw = rs[k].to(tl.float32) + bias
                g = gs[k].to(tl.float32)
                if Z:
                    gate = zs[k].to(tl.float32)
                    sigmoid = 1.0 / (1.0 + exp_of_minus(gate))
                    result = tl.fma(weight, value, tl.sum(states[k + 1] * out[:, None], 0))
                    d_z = g * result * sigmoid * tl.fma(gate, 1.0 - sigmoid, 1.0)
                    tl.store(grad_z + out_at + k * E, d_z, mask=ok)
                    g *= gate * sigmoid
                d_h = tl.fma(g[None, :], out[:, None], r)
                sums = tl.dot(d_h * (delta * value)[None, :], ones_B, input_precision=PRECISION)
                sums = tl.dot(states[k + 1] * g[None, :], ones_C, sums, input_precision=PRECISION)
                tl.store(BC_at + k * 2 * N, sums, mask=(columns % 8 == 0)[None, :] & inside)
                d_drive = tl.sum(d_h * into[:, None], 0)
                r = decays[k] * d_h
                q = r * states[k]
                d_A = tl.fma(q, delta[None, :], d_A)
                d_delta = tl.fma(d_drive, value, tl.sum(q * a2, 0) * LN_2)
                # the derivative of softplus from exp(-|v|), which does not overflow
                tail = exp_of_minus(tl.abs(raw))
                inverse = 1.0 / (1.0 + tail)
                d_dt = tl.where(inside, d_delta * tl.where(raw >= 0, inverse, tail * inverse), 0.0)
                tl.store(grad_dt + out_at + k * E, d_dt, mask=ok)
                tl.store(grad_x + out_at + k * E, tl.fma(d_drive, delta, g * weight), mask=ok)
                d_D = tl.fma(g, value, d_D)
                d_bias += d_dt
            xs = next_x
            rs = next_r
            gs = next_g
            zs = next_z
        tl.debug_barrier()
    tl.store(grad_A + tl.arange(0, K * N), near, mask=tl.zeros([K * N], tl.int32) + E < 0)
    at = slot.to(tl.int64)
    tl.store(grad_A + at * N * E + tile, d_A, mask=live[None, :])
    if D_:
        tl.store(grad_D + at * E + e, d_D, mask=live)
    if BIAS:
        tl.store(grad_bias + at * E + e, d_bias, mask=live)
    if INITIAL and chunk == 0:
        tl.store(grad_initial + sequence.to(tl.int64) * N * E + tile, r, mask=live[None, :])
