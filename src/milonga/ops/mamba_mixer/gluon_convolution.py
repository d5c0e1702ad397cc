"""Backward kernel of the convolution in Gluon, with the product that comes before it.

The gradient of u is that of the scan and a product of F numbers a row with the weight of the narrow projection. Added
up in memory, it would be read and written once more than here. A program is four warps with the same 128 channels, each
of which walks along a chunk of time of its own, 16 rows at a turn: their product is taken by the matrix units for all
four warps and goes through shared memory, swizzled against bank conflicts; then row by row as in
`causal_conv.triton_kernels.conv_backward`. What the next product reads is copied during the walk, past the registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from milonga.ops.gpu.gluon_parts import load_to_shared, reinterpreted
from milonga.ops.selective_scan.gluon_common import sigmoid, wide

CHANNELS = gl.constexpr(128)
HALF = gl.constexpr(64)
WARPS = gl.constexpr(4)
TURN = gl.constexpr(16)
ROWS = gl.constexpr(64)
TAPS = gl.constexpr(4)
DEPTH = gl.constexpr(32)
# Rows whose loads are issued together, ahead of their use; the product's rows are read, so swizzled, in as many.
AHEAD = gl.constexpr(4)
WALK = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
ROWS_OF_TURN = gl.constexpr(gl.BlockedLayout([1, AHEAD, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0]))
MATRIX = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[2, 2], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MATRIX, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MATRIX, 2))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
WEIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
NARROW_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
WEIGHT_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
TURNS_OF_PRODUCTS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, AHEAD, [2, 1, 0]))
PRODUCTS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, AHEAD, [1, 0]))


@gluon.jit
def place(slot, slots, T, length):
    """-> (first row, its step in the sequence, rows of the chunk, rows that the walk reads); no rows beyond `slots`."""
    each = (T + length - 1) // length
    start = slot % each * length
    there = slot < slots
    left = T - start
    steps = gl.where(there, gl.minimum(left, length), 0)
    known = gl.where(there, gl.minimum(left, length + (TAPS - 1)), 0)
    return (slot // each).to(gl.int64) * T + start, start, steps, known


@gluon.jit
def rows_of(pointer, stride, row, end):
    """The next rows of each warp, zeros from row `end` on."""
    values = ()
    for k in gl.static_range(AHEAD):
        values = values + (gl.load(pointer + k * stride, mask=row + k < end, other=0.0),)
    return values


@gluon.jit
def split_rows(v):
    """`[4, AHEAD, 128]`, warp by row, as four `[4, 128]`."""
    gl.static_assert(AHEAD == 4)
    even, odd = gl.split(v.reshape([WARPS, 2, 2, CHANNELS]).permute([0, 1, 3, 2]))
    first, third = gl.split(even.permute([0, 2, 1]))
    second, fourth = gl.split(odd.permute([0, 2, 1]))
    return (
        gl.convert_layout(first, WALK, assert_trivial=True), gl.convert_layout(second, WALK, assert_trivial=True),
        gl.convert_layout(third, WALK, assert_trivial=True), gl.convert_layout(fourth, WALK, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def copy_narrow_rows(lefts, pointer, row, end, column, F: gl.constexpr, BLOCKS: gl.constexpr):
    """`[64, 32]` of each block of the narrow gradient, on their way to shared memory; zeros from row `end` on."""
    for j in gl.static_range(BLOCKS):
        inside = (row < end)[:, None] & (column + j * DEPTH < F)[None, :]
        load_to_shared(lefts[j], pointer + (column + j * DEPTH)[None, :], inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["T", "slots", "length"])
def conv_backward(
    grad_u, narrow, into, x, weight, bias, grad_x, partial, T, slots, length,
    E: gl.constexpr, F: gl.constexpr, g_step: gl.constexpr, x_step: gl.constexpr, out_step: gl.constexpr,
    narrow_step: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Gradients of the rows of four chunks, and each chunk's part in the sums for weight and bias, `[slots, 5, E]`.

    The upstream gradient is `grad_u + narrow @ into`, `into` `[F E]`. Four taps, SiLU, zeros before a sequence.
    """
    blocks = E // CHANNELS
    program = gl.program_id(0)
    channel = (program % blocks) * CHANNELS
    first_slot = (program // blocks) * WARPS
    e = channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, WALK))
    slot = first_slot + gl.arange(0, WARPS, layout=gl.SliceLayout(1, WALK))
    base, start, steps, known = place(slot, slots, T, length)
    steps = steps[:, None]
    known = known[:, None]
    zero = gl.zeros([WARPS, CHANNELS], gl.float32, layout=WALK)
    taps = ()
    for i in gl.static_range(TAPS):
        taps = taps + (gl.load(weight + e * TAPS + i).to(gl.float32)[None, :] + zero,)
    shift = gl.load(bias + e).to(gl.float32)[None, :] + zero
    x_at = x + base[:, None] * x_step + e[None, :]
    g_at = grad_u + base[:, None] * g_step + e[None, :]
    out_at = grad_x + (base[:, None] - (TAPS - 1)) * out_step + e[None, :]
    columns = ()
    for i in gl.static_range(TAPS - 1):
        before = (start[:, None] + i >= TAPS - 1) & (known > 0)
        columns = columns + (gl.load(x_at + (i - (TAPS - 1)) * x_step, mask=before, other=0.0).to(gl.float32),)
    one = zero + 1.0
    slopes = (zero, zero, zero)
    sums = (zero, zero, zero, zero, zero)

    # of the product: row r is of the warp r // 16
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, NARROW))
    column = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, NARROW))
    narrow_base, _, _, narrow_known = place(first_slot + r // TURN, slots, T, length)
    r = r % TURN
    narrow_at = narrow + (narrow_base + r)[:, None] * narrow_step
    weights = gl.allocate_shared_memory(into.dtype.element_ty, [2 * BLOCKS, DEPTH, HALF], WEIGHT_SHARED)
    depth = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, WEIGHT))
    width = channel + gl.arange(0, HALF, layout=gl.SliceLayout(0, WEIGHT))
    for j in gl.static_range(BLOCKS):
        for half in gl.static_range(2):
            at = (j * DEPTH + depth)[:, None] * E + (width + half * HALF)[None, :]
            tile = gl.load(into + at, mask=(j * DEPTH + depth < F)[:, None] & (at >= 0), other=0.0)
            weights.index(2 * j + half).store(tile)
    lefts = ()
    for _ in gl.static_range(BLOCKS):
        lefts = lefts + (gl.allocate_shared_memory(into.dtype.element_ty, [ROWS, DEPTH], NARROW_SHARED),)
    products = gl.allocate_shared_memory(gl.float32, [ROWS, CHANNELS], PRODUCTS)
    turns = reinterpreted(products, gl.float32, [WARPS, TURN, CHANNELS], TURNS_OF_PRODUCTS)

    copy_narrow_rows(lefts, narrow_at, r, narrow_known, column, F, BLOCKS)
    values = rows_of(x_at, x_step, 0, known)
    upstream = rows_of(g_at, g_step, 0, known)
    for turn in range((length + (TAPS - 1) + TURN - 1) // TURN):
        async_copy.wait_group(0)
        for half in gl.static_range(2):
            total = gl.zeros([ROWS, HALF], gl.float32, layout=MATRIX)
            for j in gl.static_range(BLOCKS):
                total = mma_v2(
                    lefts[j].load(LEFT), weights.index(2 * j + half).load(RIGHT), total, input_precision="tf32"
                )
            products.slice(half * HALF, HALF, 1).store(total)
        narrow_at += TURN * narrow_step
        copy_narrow_rows(lefts, narrow_at, r + (turn + 1) * TURN, narrow_known, column, F, BLOCKS)
        for group in gl.static_range(TURN // AHEAD):
            x_at += AHEAD * x_step
            g_at += AHEAD * g_step
            later = turn * TURN + (group + 1) * AHEAD
            coming = rows_of(x_at, x_step, later, known)
            coming_g = rows_of(g_at, g_step, later, known)
            through = split_rows(turns.slice(group * AHEAD, AHEAD, 1).load(ROWS_OF_TURN))
            for k in gl.static_range(AHEAD):
                t = turn * TURN + group * AHEAD + k
                slope = wide(upstream[k]) + through[k]
                value = wide(values[k])
                out = gl.fma(value, taps[TAPS - 1], shift)
                for i in gl.static_range(TAPS - 1):
                    out = gl.fma(columns[i], taps[i], out)
                s = sigmoid(out)
                slope = slope * s * gl.fma(out, 1.0 - s, one)
                # rows from `known` on have no gradient, those from `steps` on are another chunk's
                own = gl.where(t < steps, slope, 0.0)
                sums = (
                    gl.fma(own, columns[0], sums[0]), gl.fma(own, columns[1], sums[1]),
                    gl.fma(own, columns[2], sums[2]), gl.fma(own, value, sums[3]), sums[4] + own,
                )  # fmt: skip
                d_x = gl.fma(slopes[0], taps[3], slope * taps[0])
                d_x = gl.fma(slopes[2], taps[1], gl.fma(slopes[1], taps[2], d_x))
                there = (t >= TAPS - 1) & (t - (TAPS - 1) < steps)
                gl.store(out_at + k * out_step, d_x.to(grad_x.dtype.element_ty), mask=there)
                columns = (columns[1], columns[2], value)
                slopes = (slopes[1], slopes[2], slope)
            out_at += AHEAD * out_step
            values = coming
            upstream = coming_g
    at = slot.to(gl.int64)[:, None] * (TAPS + 1) * E + e[None, :]
    for i in gl.static_range(TAPS + 1):
        gl.store(partial + at + i * E, sums[i], mask=slot[:, None] < slots)
