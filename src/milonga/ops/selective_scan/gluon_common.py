"""What the Gluon kernels of `selective_scan` share: layouts, elementwise functions, and which steps a program walks.

A program is four warps with 64 neighbouring channels of one chunk of time of one sequence. The state is `[16, 64]`,
states by channels: a lane holds 8 of the 16 states of a channel (`states_layout`), a warp 16 channels. A tile of 32
steps goes through three phases: elementwise, with 8 or 16 bytes a lane of each row (`rows_layout`), into fp32 rows in
shared memory; the recurrence, step by step, from shared memory; elementwise again. The recurrence is a loop over parts
of 16 steps: in one piece of 32 the compiler made steps wait for the next tile's rows, for want of scoreboards.

Where there are few programs, the forward pass has programs of 32 channels in place of 64, with 4 states in a lane.

Steps beyond the end of a chunk get delta = 0 and no input or upstream gradient, which leaves h and r as they are.
Offsets of rows are int64; those within a tile int32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from milonga.ops.gpu.gluon_parts import reinterpreted

STATES = gl.constexpr(16)
CHANNELS = gl.constexpr(64)
TILE = gl.constexpr(32)
PART = gl.constexpr(16)
PARTS_OF_TILE = gl.constexpr(2)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
STATES_LAYOUT = gl.constexpr(gl.BlockedLayout([8, 1], [2, 16], [1, 4], [1, 0]))
HALF_STATES_LAYOUT = gl.constexpr(gl.BlockedLayout([4, 1], [4, 8], [1, 4], [1, 0]))
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
HALF_ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
NARROW_ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
# rows of B and C
PAIRS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def reciprocal(v):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], gl.float32, is_pure=True, pack=1)


@gluon.jit
def wide(v):
    """To fp32; bfloat16 two at a time, a shift and a mask, half the instructions of the built-in conversion."""
    if v.dtype == gl.bfloat16:
        v = gl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=f,=f,r", [v], gl.float32, is_pure=True, pack=2
        )
    else:
        v = v.to(gl.float32)
    return v


@gluon.jit
def exp_of_minus(v):
    return gl.exp2(v * -LOG2_E)


@gluon.jit
def decay_of(v, EXACT: gl.constexpr):
    """2^v for v <= 0. With EXACT within 2.2e-7, the closer the nearer v is to an integer: no bias where it is almost 1.

    A channel that remembers a thousand steps multiplies a bias by that: with the hardware's the gradient of A was off
    by 3e-6 after 500 steps.
    """
    if EXACT:
        v = gl.where(v < -126.0, -126.0, v)
        # the rounded exponent in the low bits, and 127
        shifted = v + 12583039.0
        f = v - (shifted - 12583039.0)
        p = gl.fma(f, gl.full_like(f, 0.001333354), gl.full_like(f, 0.0096662454))
        p = gl.fma(f, p, gl.full_like(f, 0.055505004))
        p = gl.fma(f, p, gl.full_like(f, 0.24022351))
        p = gl.fma(f, p, gl.full_like(f, 0.69314712))
        p = gl.fma(f, p, gl.full_like(f, 1.0))
        v = p * gl.inline_asm_elementwise("shl.b32 $0, $1, 23;", "=f,f", [shifted], gl.float32, is_pure=True, pack=1)
    else:
        v = gl.exp2(v)
    return v


@gluon.jit
def softplus(v, tail):
    """log(1 + exp(v)) with `tail` = exp(-|v|): the polynomial of `triton_kernels.softplus`."""
    p = gl.fma(tail, gl.full_like(tail, -0.00853921), gl.full_like(tail, 0.04408963))
    p = gl.fma(tail, p, gl.full_like(tail, -0.10768171))
    p = gl.fma(tail, p, gl.full_like(tail, 0.17745242))
    p = gl.fma(tail, p, gl.full_like(tail, -0.24495463))
    p = gl.fma(tail, p, gl.full_like(tail, 0.33275479))
    p = gl.fma(tail, p, gl.full_like(tail, -0.49997404))
    p = gl.fma(tail, p, gl.full_like(tail, 0.99999982))
    return gl.fma(tail, p, gl.maximum(v, 0.0))


@gluon.jit
def sigmoid(v):
    return reciprocal(1.0 + exp_of_minus(v))


@gluon.jit
def slot_of(place, T, sequences, length, PACKED: gl.constexpr):
    """The slot that the `place`-th programs take: first chunks of all sequences first, last chunks, which may be short,
    last. A slot says where a chunk's results lie."""
    slot = place
    if not PACKED:
        per_row = gl.maximum((T + length - 1) // length, 1)
        slot = place % sequences * per_row + place // sequences
    return slot


@gluon.jit
def chunk_of(slot, bounds, T, sequences, length, PACKED: gl.constexpr):
    """-> (sequence, chunk within it, its number of chunks, the sequence's first row and steps, first row, steps).

    Sequence s, which starts at row r, has the slots from r // length + s on; an empty one still has one.
    """
    if PACKED:
        low = slot * 0
        high = sequences
        while low + 1 < high:
            middle = (low + high) // 2
            if gl.load(bounds + middle) // length + middle <= slot:
                low = middle
            else:
                high = middle
        sequence = low
        start = gl.load(bounds + sequence)
        total = gl.load(bounds + sequence + 1) - start
        chunk = (slot - start // length - sequence).to(gl.int32)
    else:
        per_row = gl.maximum((T + length - 1) // length, 1)
        sequence = slot // per_row
        chunk = slot % per_row
        start = sequence.to(gl.int64) * T
        total = start * 0 + T
    chunks = gl.maximum((total + length - 1) // length, 1).to(gl.int32)
    first = start + chunk.to(gl.int64) * length
    steps = gl.minimum(gl.maximum(start + total - first, 0), length).to(gl.int32)
    return sequence, chunk, chunks, start, total, first, steps


@gluon.jit
def first_slot(sequence, start, T, length, PACKED: gl.constexpr):
    """The first slot of a sequence that starts at row `start`, int64."""
    if PACKED:
        slot = start // length + sequence
    else:
        slot = sequence.to(gl.int64) * gl.maximum((T + length - 1) // length, 1)
    return slot


@gluon.jit
def fold(state, a2, ends, sums, slot, count, E, channel, SIGN: gl.constexpr, EXACT: gl.constexpr):
    """What `state` becomes after `count` chunks, from `slot` on in the direction SIGN, that end in `ends` from zero.

    Four at a time, so that their loads are under way together.
    """
    at, eh = state_offsets(CHANNELS, STATES_LAYOUT)
    inside = channel + eh < E
    for i in range(0, count, 4):
        for k in gl.static_range(4):
            place = (slot + SIGN * (i + k)) * E + channel
            more = inside & (i + k < count)
            total = gl.load(sums + place + eh, mask=more, other=0.0)
            end = gl.load(ends + place * STATES + at, mask=more[None, :] & (at >= 0), other=0.0)
            state = gl.fma(decay_of(a2 * total[None, :], EXACT), state, end)
    return state


@gluon.jit
def state_offsets(CH: gl.constexpr, LAYOUT: gl.constexpr):
    """Offsets of a block's states in `[E N]`, and its channels, in the layout of states."""
    e = gl.arange(0, CH, layout=gl.SliceLayout(0, LAYOUT))
    n = gl.arange(0, STATES, layout=gl.SliceLayout(1, LAYOUT))
    return e[None, :] * STATES + n[:, None], e


@gluon.jit
def ahead(pointer, mask):
    """Ask for the lines at `pointer` in the L2 cache: their loads wait less, and no register waits for them."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [pointer, mask.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def parts_of(rows):
    """Shared `[32, W]` as two parts of 16 steps."""
    WIDTH: gl.constexpr = rows.shape[1]
    return reinterpreted(rows, gl.float32, [PARTS_OF_TILE, PART, WIDTH], PLAIN)


@gluon.jit
def tile_rows(pointer, offsets, mask):
    return gl.load(pointer + offsets, mask=mask, other=0.0)
