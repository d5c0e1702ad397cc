"""The Numba kernel of `mamba_step`: the step of one layer, or of several that follow each other, in one call.

The threads share the work out themselves. A layer's step has four parts that wait for each other: norm, input
projection and convolution; the projection that gives dt, B and C; the recurrence; the output projection. Threads take
pieces of a part from an atomic counter until none is left, and go on when all are done. A thread that comes late, or
never, costs nothing but its help. A piece writes outputs of its own and no sum is split between pieces, so results do
not depend on the number of threads.

Every tensor is the address of its first number: a step has about thirty, and to unpack each for Numba takes longer than
to read it. Vectors are explicit for the reasons given in `milonga.ops.selective_scan.cpu_kernels`, whose rules hold
here too: no `nnan` or `ninf`, minima and maxima let NaN through, only sums over lanes are reordered. Everything that
the cached kernel calls is in this file, because Numba's cache does not see edits elsewhere.
"""

import operator
import sys

import numba as nb
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# Numbers in a vector: one AVX-512 register, else two of 128 or one of 256 bits.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
# Outputs of a piece, by part: small enough that two threads end together, large enough that taking one costs nothing.
FEATURES, LOW_FEATURES = 32, 4
CHANNELS = 64
# How far ahead int8 weights are asked for, in bytes: so few arrive per addition that the processor's own prefetching
# falls behind (24 layers of width 768: 3.2 instead of 4.0 ms; wider weights gain nothing).
AHEAD = 8192
# Where the counters of each part lie: pieces taken and, a cache line further, pieces done.
PARTS, LINE = 4, 8
# How often a thread looks whether a part is done before it lets others run in between.
PATIENCE = 2000

# Places in the table of a layer and in that of a call.
IN, LOW, DT, OUT, IN_SCALE, LOW_SCALE, DT_SCALE, OUT_SCALE = range(8)
TAPS, TAPS_BIAS, DECAY, SKIP, DT_BIAS = range(8, 13)
WIDTH, INNER, STATES, RANK, TAP_COUNT, NORM, EPS = range(13, 20)
LAYER_SIZE = 20
X, CONV, SSM, COLUMNS, U, STEP, SMALL, NEXT_CONV, NEXT_SSM, Y, ROWS, BRANCH, SUM = range(13)
CALL_SIZE = 13

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


class _Vector(types.Type):
    """LANES fp32 numbers in registers. Lives inside the kernel only."""

    def __init__(self) -> None:
        super().__init__(name=f"mamba_step float32 x {LANES}")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _FLOATS)


def _define(symbol, instruction: str) -> None:
    @infer_global(symbol)
    class _Template(ConcreteTemplate):
        cases = [signature(_vector, _vector, _vector)]  # noqa: RUF012

    # contract: a product and a sum may become one fused operation, nothing else may change
    def lower(context, builder, sig, args):
        return {"add": builder.fadd, "sub": builder.fsub, "mul": builder.fmul, "div": builder.fdiv}[instruction](
            *args, flags=("contract",)
        )

    lower_builtin(symbol, _vector, _vector)(lower)


for _symbol, _instruction in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.truediv, "div"),
):
    _define(_symbol, _instruction)


def _constant(kind, value):
    return ir.Constant(kind, [value] * LANES)


def _pointer(builder, base, index, kind, size):
    """Where number `index` of `size` bytes lies behind the address `base`, as a pointer to `kind`."""
    offset = builder.mul(index, ir.Constant(_LONG, size))
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _spread(builder, value, kind):
    undefined = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, ir.Constant(_INT, 0)), undefined, _constant(_INTS, 0)
    )


def _mask(builder, count):
    """True in the first `count` lanes."""
    limit = _spread(builder, builder.trunc(count, _INT), _INTS)
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), limit)


@intrinsic
def load(typing, base, index):
    def lower(context, builder, sig, args):
        return builder.load(_pointer(builder, *args, _FLOATS, 4), align=4)

    return _vector(types.int64, types.int64), lower


@intrinsic
def load_some(typing, base, index, count):
    """The first `count` lanes from memory, zero in the others."""

    def lower(context, builder, sig, args):
        address = _pointer(builder, *args[:2], _FLOATS, 4)
        kind = ir.FunctionType(_FLOATS, [_FLOATS.as_pointer(), _INT, _BITS, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
        mask = _mask(builder, args[2])
        return builder.call(function, [address, ir.Constant(_INT, 4), mask, _constant(_FLOATS, 0.0)])

    return _vector(types.int64, types.int64, types.int64), lower


@intrinsic
def store(typing, base, index, value):
    def lower(context, builder, sig, args):
        builder.store(args[2], _pointer(builder, *args[:2], _FLOATS, 4), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, _vector), lower


@intrinsic
def store_some(typing, base, index, value, count):
    """Write the first `count` lanes."""

    def lower(context, builder, sig, args):
        address = _pointer(builder, *args[:2], _FLOATS, 4)
        kind = ir.FunctionType(ir.VoidType(), [_FLOATS, _FLOATS.as_pointer(), _INT, _BITS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
        builder.call(function, [args[2], address, ir.Constant(_INT, 4), _mask(builder, args[3])])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, _vector, types.int64), lower


@intrinsic
def number(typing, base, index):
    def lower(context, builder, sig, args):
        return builder.load(_pointer(builder, *args, _FLOAT, 4))

    return types.float32(types.int64, types.int64), lower


@intrinsic
def put(typing, base, index, value):
    def lower(context, builder, sig, args):
        builder.store(args[2], _pointer(builder, *args[:2], _FLOAT, 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), lower


def _widened(builder, stored, value, floats, ints):
    """A weight, or a vector of them, as fp32: exactly."""
    if stored == types.float32:
        return value
    if stored == types.int8:
        return builder.sitofp(value, floats)
    wide, shift = builder.zext(value, ints), ir.Constant(ints, 16 if ints == _INT else [16] * LANES)
    return builder.bitcast(builder.shl(wide, shift), floats)  # bfloat16: the upper half


def _stored(kind):
    """Of an array of weights: Numba's type of one, LLVM's, and its bytes."""
    stored = kind.dtype
    if stored == types.float32:
        return stored, _FLOAT, 4
    size = stored.bitwidth // 8
    return stored, ir.IntType(8 * size), size


@intrinsic
def load_weights(typing, like, base, index):
    """LANES weights of the dtype of the array `like`."""
    stored, one, size = _stored(like)

    def lower(context, builder, sig, args):
        address = _pointer(builder, *args[1:], ir.VectorType(one, LANES), size)
        return _widened(builder, stored, builder.load(address, align=size), _FLOATS, _INTS)

    return _vector(like, types.int64, types.int64), lower


@intrinsic
def prefetch(typing, like, base, index):
    """Ask for the cache line of a weight; an address behind the last one does no harm."""
    size = _stored(like)[2]

    def lower(context, builder, sig, args):
        address = _pointer(builder, *args[1:], ir.IntType(8), size)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, ir.Constant(_INT, 0), ir.Constant(_INT, 3), ir.Constant(_INT, 1)])
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64), lower


@intrinsic
def weight(typing, like, base, index):
    """One weight of the dtype of the array `like`."""
    stored, one, size = _stored(like)

    def lower(context, builder, sig, args):
        return _widened(builder, stored, builder.load(_pointer(builder, *args[1:], one, size)), _FLOAT, _INT)

    return types.float32(like, types.int64, types.int64), lower


@intrinsic
def every(typing, value):
    """One number in every lane."""

    def lower(context, builder, sig, args):
        return _spread(builder, args[0], _FLOATS)

    return _vector(types.float32), lower


@intrinsic
def at_least(typing, value, bound):
    """The larger of the two; NaN in `value` stays."""

    def lower(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return _vector(_vector, _vector), lower


@intrinsic
def at_most(typing, value, bound):
    """The smaller of the two; NaN in `value` stays."""

    def lower(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), args[1], args[0])

    return _vector(_vector, _vector), lower


@intrinsic
def magnitude(typing, value):
    def lower(context, builder, sig, args):
        return builder.bitcast(builder.and_(builder.bitcast(args[0], _INTS), _constant(_INTS, 0x7FFFFFFF)), _FLOATS)

    return _vector(_vector), lower


@intrinsic
def low_bits_as_exponent(typing, value):
    """The low nine bits of each lane, moved to where fp32 keeps sign and exponent."""

    def lower(context, builder, sig, args):
        return builder.bitcast(builder.shl(builder.bitcast(args[0], _INTS), _constant(_INTS, 23)), _FLOATS)

    return _vector(_vector), lower


@intrinsic
def lane_sum(typing, value):
    def lower(context, builder, sig, args):
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(function, [ir.Constant(_FLOAT, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(_vector), lower


@intrinsic
def count_up(typing, counters, index):
    """Add 1 to a counter, atomically: -> what it was. What was written before is seen by who sees the new value."""

    def lower(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), ir.Constant(_LONG, 1), "acq_rel")

    return types.int64(counters, types.int64), lower


@intrinsic
def look(typing, counters, index):
    """The value of a counter, and all that was written before it had it."""

    def lower(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(counters, types.int64), lower


@intrinsic
def let_others_run(typing):
    def lower(context, builder, sig, args):
        if sys.platform != "win32":
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT, []), "sched_yield")
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), lower


_f = np.float32
LOG2_E = _f(1.4426950408889634)
LN_2 = _f(0.6931471805599453)
LN_2_HIGH, LN_2_LOW = _f(0.693145751953125), _f(1.428606765330187e-06)
# Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
ROUND_BIASED = _f(12582912.0 + 127)
# 2^r on [-1/2, 1/2] and artanh(sqrt(q)) / sqrt(q) on [0, 1/9], as in the scan.
P1, P2, P3, P4, P5 = (_f(c) for c in (0.69314718056, 0.2402228266, 0.05550558493, 0.00966969412, 0.00133006158))
L0, L1, L2, L3, L4 = (_f(c) for c in (1.0, 0.33333158493, 0.20012454689, 0.13980305195, 0.14089171589))


@nb.njit
def power(r):
    """2^r for r in [-1/2, 1/2]."""
    p = every(P5) * r + every(P4)
    p = p * r + every(P3)
    p = p * r + every(P2)
    p = p * r + every(P1)
    return p * r + every(_f(1.0))


@nb.njit
def exp2(v):
    """2^v: infinite from 128 on, 0 from -127 down; any NaN stays NaN."""
    v = at_most(at_least(v, every(_f(-127.0))), every(_f(128.0)))
    s = v + every(ROUND_BIASED)
    return power(v - (s - every(ROUND_BIASED))) * low_bits_as_exponent(s)


@nb.njit
def silu(v):
    return v / (every(_f(1.0)) + exp2(v * every(-LOG2_E)))


@nb.njit
def softplus(v):
    """log(1 + exp(v)) = max(v, 0) + log(1 + exp(-|v|)), accurate relatively for very negative v too."""
    below = at_least(every(_f(0.0)) - magnitude(v), every(_f(-127.0) * LN_2))
    s = below * every(LOG2_E) + every(ROUND_BIASED)
    k = s - every(ROUND_BIASED)
    # The remainder is taken in base e, or rounding below * log2(e) would show.
    r = below - k * every(LN_2_HIGH) - k * every(LN_2_LOW)
    tail = power(r * every(LOG2_E)) * low_bits_as_exponent(s)
    s = tail / (every(_f(2.0)) + tail)
    q = s * s
    p = every(L4) * q + every(L3)
    p = p * q + every(L2)
    p = p * q + every(L1)
    p = p * q + every(L0)
    return at_least(v, every(_f(0.0))) + (s + s) * p


@nb.njit
def read(base, index, left):
    """A vector of a row of which `left` numbers remain; zeros beyond the row."""
    if left >= LANES:
        return load(base, index)
    return load_some(base, index, left)


@nb.njit
def write(base, index, value, left):
    if left >= LANES:
        store(base, index, value)
    else:
        store_some(base, index, value, left)


@nb.njit
def _dot(like, weights, row, x, source, width):
    """The sum of `width` products of weights and of x, from their numbers `row` and `source` on."""
    zero = every(_f(0.0))
    a, b, c, d = zero, zero, zero, zero
    i = 0
    while i + 4 * LANES <= width:
        if like.itemsize == 1:
            prefetch(like, weights, row + i + AHEAD)
        a = a + load_weights(like, weights, row + i) * load(x, source + i)
        b = b + load_weights(like, weights, row + i + LANES) * load(x, source + i + LANES)
        c = c + load_weights(like, weights, row + i + 2 * LANES) * load(x, source + i + 2 * LANES)
        d = d + load_weights(like, weights, row + i + 3 * LANES) * load(x, source + i + 3 * LANES)
        i += 4 * LANES
    while i + LANES <= width:
        a = a + load_weights(like, weights, row + i) * load(x, source + i)
        i += LANES
    total = lane_sum((a + b) + (c + d))
    while i < width:
        total += weight(like, weights, row + i) * number(x, source + i)
        i += 1
    return total


@nb.njit
def _product(like, weights, scale, x, x_step, y, y_step, rows, width, first, last):
    """Features `first` to `last` of `rows` rows: `y = weights @ x`, times the feature's scale where there is one."""
    for f in range(first, last):
        for r in range(rows):
            total = _dot(like, weights, f * width, x, r * x_step, width)
            if scale:
                total *= number(scale, f)
            put(y, r * y_step + f, total)


@nb.njit
def _convolve(layer, call, first, last):
    """The convolution's step for channels `first` to `last`, and the columns it leaves for the next."""
    inner, kept = layer[INNER], layer[TAP_COUNT] - 1
    for r in range(call[ROWS]):
        for e in range(first, last, LANES):
            left, place = last - e, r * kept * inner + e
            column = read(call[COLUMNS], r * inner + e, left)
            total = read(layer[TAPS_BIAS], e, left)
            for k in range(kept):
                earlier = read(call[CONV], place + k * inner, left)
                total = total + earlier * read(layer[TAPS], k * inner + e, left)
                if k:
                    write(call[NEXT_CONV], place + (k - 1) * inner, earlier, left)
            if kept:
                write(call[NEXT_CONV], place + (kept - 1) * inner, column, left)
            total = total + column * read(layer[TAPS], kept * inner + e, left)
            write(call[U], r * inner + e, silu(total), left)


@nb.njit
def _recur(like, layer, call, first, last, delta, drive, z, y):
    """The recurrence's step for channels `first` to `last`, with D and the gate."""
    inner, states, rank = layer[INNER], layer[STATES], layer[RANK]
    low = rank + 2 * states
    u, ssm, after, step = call[U], call[SSM], call[NEXT_SSM], call[STEP]
    _product(like, layer[DT], layer[DT_SCALE], call[SMALL], low, step, inner, call[ROWS], rank, first, last)
    for r in range(call[ROWS]):
        B, C = r * low + rank, r * low + rank + states
        for e in range(first, last, LANES):
            left = last - e
            wide = softplus(read(step, r * inner + e, left) + read(layer[DT_BIAS], e, left))
            store(delta, e - first, wide)
            store(drive, e - first, wide * read(u, r * inner + e, left))
        for e in range(first, last):
            wide, push = every(number(delta, e - first)), every(number(drive, e - first))
            row, total = (r * inner + e) * states, every(_f(0.0))
            for n in range(0, states, LANES):
                left = states - n
                decay = exp2(wide * read(layer[DECAY], e * states + n, left))
                h = read(ssm, row + n, left) * decay + push * read(call[SMALL], B + n, left)
                write(after, row + n, h, left)
                total = total + h * read(call[SMALL], C + n, left)
            put(y, r * inner + e, lane_sum(total))
        for e in range(first, last, LANES):
            left, place = last - e, r * inner + e
            total = read(y, place, left) + read(layer[SKIP], e, left) * read(u, place, left)
            write(y, place, total * silu(read(z, place, left)), left)


@nb.njit
def _next(counters, part):
    """The number of the next piece of a part."""
    return count_up(counters, 2 * part * LINE)


@nb.njit
def _done(counters, part):
    """One more piece of a part is done."""
    count_up(counters, (2 * part + 1) * LINE)


@nb.njit
def _wait(counters, part, pieces):
    """Until every piece of a part is done."""
    looks = 0
    while look(counters, (2 * part + 1) * LINE) < pieces:
        looks += 1
        if looks % PATIENCE == 0:
            let_others_run()


@nb.njit
def _normalise(layer, call, normed, keep):
    """The norm of x + branch, and that sum itself if it is to be kept."""
    width, x, branch = layer[WIDTH], call[X], call[BRANCH]
    for r in range(call[ROWS]):
        row, squares = r * width, every(_f(0.0))
        for i in range(0, width, LANES):
            left = width - i
            value = read(x, row + i, left)
            if branch:
                value = value + read(branch, row + i, left)
            if keep:
                write(call[SUM], row + i, value, left)
            write(normed, row + i, value, left)
            squares = squares + value * value
        factor = every(_f(1.0) / np.sqrt(lane_sum(squares) / _f(width) + number(layer[EPS], 0)))
        for i in range(0, width, LANES):
            left = width - i
            write(normed, row + i, read(normed, row + i, left) * factor * read(layer[NORM], i, left), left)


@nb.njit
def _project(like, layer, call, counters, part, z, normed):
    """Part 0: the norm, the input projection, and behind the first half of that the convolution.

    Each thread makes the norm for itself, once it has a piece to use it for: it is quicker than to wait for it.
    """
    inner, width, rows = layer[INNER], layer[WIDTH], call[ROWS]
    weights, scale = layer[IN] + inner * width * like.itemsize, layer[IN_SCALE]
    gate_scale = scale + 4 * inner if scale else 0
    x = normed if layer[NORM] else call[X]
    blocks = (inner + FEATURES - 1) // FEATURES
    wanted = layer[NORM] != 0
    piece = _next(counters, part)
    while piece < 2 * blocks:
        if wanted:
            _normalise(layer, call, normed, piece == 0)
            wanted = False
        first = piece % blocks * FEATURES
        last = min(inner, first + FEATURES)
        if piece < blocks:
            _product(like, layer[IN], scale, x, width, call[COLUMNS], inner, rows, width, first, last)
            _convolve(layer, call, first, last)
        else:
            _product(like, weights, gate_scale, x, width, z, inner, rows, width, first, last)
        _done(counters, part)
        piece = _next(counters, part)
    _wait(counters, part, 2 * blocks)


@nb.njit
def _multiply(like, weights, scale, x, width, y, features, rows, size, counters, part):
    """Parts 1 and 3: a product, `size` features a piece."""
    blocks = (features + size - 1) // size
    piece = _next(counters, part)
    while piece < blocks:
        first = piece * size
        _product(like, weights, scale, x, width, y, features, rows, width, first, min(features, first + size))
        _done(counters, part)
        piece = _next(counters, part)
    _wait(counters, part, blocks)


@nb.njit
def _advance(like, layer, call, counters, part, z, y, scratch):
    """Part 2: the recurrence."""
    inner = layer[INNER]
    blocks = (inner + CHANNELS - 1) // CHANNELS
    piece = _next(counters, part)
    while piece < blocks:
        first = piece * CHANNELS
        drive = scratch + 4 * (CHANNELS + LANES)
        _recur(like, layer, call, first, min(inner, first + CHANNELS), scratch, drive, z, y)
        _done(counters, part)
        piece = _next(counters, part)
    _wait(counters, part, blocks)


@nb.njit(nogil=True, cache=True, error_model="numpy")
def steps(like, layers, calls, all_counters):
    """One thread's share of a step of several layers, one behind the other.

    `like` is an empty array of the dtype in which the products' weights are stored.
    """
    widest = np.int64(0)
    for k in range(layers.shape[0]):
        widest = max(widest, calls[k, ROWS] * layers[k, WIDTH])
    memory = np.empty(2 * (CHANNELS + LANES) + widest, np.float32)
    scratch = np.int64(memory.ctypes.data)
    normed = scratch + 8 * (CHANNELS + LANES)
    for k in range(layers.shape[0]):
        layer, call, counters = layers[k], calls[k], all_counters[k]
        inner, width, rows = layer[INNER], layer[WIDTH], call[ROWS]
        low = layer[RANK] + 2 * layer[STATES]
        small = call[SMALL]
        z = small + 4 * low * rows
        y = z + 4 * inner * rows
        _project(like, layer, call, counters, 0, z, normed)
        _multiply(like, layer[LOW], layer[LOW_SCALE], call[U], inner, small, low, rows, LOW_FEATURES, counters, 1)
        _advance(like, layer, call, counters, 2, z, y, scratch)
        _multiply(like, layer[OUT], layer[OUT_SCALE], y, inner, call[Y], width, rows, FEATURES, counters, 3)
    memory[0] = _f(0.0)  # it lives until here: only its address was used
