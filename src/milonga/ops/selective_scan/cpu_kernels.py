"""Numba kernels of `selective_scan`, written with explicit vectors of channels.

The recurrence runs along time, so the vector lanes are neighbouring channels. A tile of channels (32 to 128) keeps its
states and its A in the first-level cache, laid out `[vector, state, lane]`. Explicit vectors, rather than loops left to
the compiler, because it gives up on loops over this many arrays, and because every channel then sees the same
operations in the same order whatever the tile, the packing or the split: results are equal bit for bit.

Rules kept here: no `nnan` or `ninf`, and minima and maxima let NaN through; only sums over lanes may be reordered; all
offsets are int64. Everything the cached kernels call is in this file, because Numba's cache does not see edits
elsewhere.
"""

import operator

import numba as nb
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# Channels in a vector: one AVX-512 register, else two of 128 or one of 256 bits.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


class _Vector(types.Type):
    """LANES fp32 numbers in registers. Lives inside kernels only."""

    def __init__(self) -> None:
        super().__init__(name=f"float32 x {LANES}")


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


def _address(context, builder, kind, array, index):
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


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
def load(typing, array, index):
    def lower(context, builder, sig, args):
        address = builder.bitcast(_address(context, builder, sig.args[0], *args), _FLOATS.as_pointer())
        return builder.load(address, align=4)

    return _vector(array, types.int64), lower


@intrinsic
def load_some(typing, array, index, count):
    """The first `count` lanes from memory, zero in the others."""

    def lower(context, builder, sig, args):
        address = builder.bitcast(_address(context, builder, sig.args[0], *args[:2]), _FLOATS.as_pointer())
        kind = ir.FunctionType(_FLOATS, [_FLOATS.as_pointer(), _INT, _BITS, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
        mask = _mask(builder, args[2])
        return builder.call(function, [address, ir.Constant(_INT, 4), mask, _constant(_FLOATS, 0.0)])

    return _vector(array, types.int64, types.int64), lower


@intrinsic
def store(typing, array, index, value):
    def lower(context, builder, sig, args):
        address = builder.bitcast(_address(context, builder, sig.args[0], *args[:2]), _FLOATS.as_pointer())
        builder.store(args[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, _vector), lower


@intrinsic
def store_some(typing, array, index, value, count):
    """Write the first `count` lanes."""

    def lower(context, builder, sig, args):
        address = builder.bitcast(_address(context, builder, sig.args[0], *args[:2]), _FLOATS.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_FLOATS, _FLOATS.as_pointer(), _INT, _BITS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
        builder.call(function, [args[2], address, ir.Constant(_INT, 4), _mask(builder, args[3])])
        return context.get_dummy_value()

    return types.void(array, types.int64, _vector, types.int64), lower


@intrinsic
def spread(typing, array, index):
    """One number of memory in every lane."""

    def lower(context, builder, sig, args):
        return _spread(builder, builder.load(_address(context, builder, sig.args[0], *args)), _FLOATS)

    return _vector(array, types.int64), lower


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
def if_negative(typing, value, then, otherwise):
    def lower(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(_FLOATS, 0.0)), args[1], args[2])

    return _vector(_vector, _vector, _vector), lower


@intrinsic
def plain_nan(typing, value):
    """`value` with every NaN replaced by the one whose low bits are zero (see `exp2_state`)."""

    def lower(context, builder, sig, args):
        nan = builder.bitcast(_constant(_INTS, 0x7FC00000), _FLOATS)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), nan, args[0])

    return _vector(_vector), lower


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
def add_bits(typing, value, bits):
    def lower(context, builder, sig, args):
        return builder.bitcast(builder.add(*(builder.bitcast(arg, _INTS) for arg in args)), _FLOATS)

    return _vector(_vector, _vector), lower


@intrinsic
def lane_sum(typing, value):
    def lower(context, builder, sig, args):
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(function, [ir.Constant(_FLOAT, 0.0), args[0]], fastmath=("reassoc",))

    return types.float32(_vector), lower


_f = np.float32
LOG2_E = _f(1.4426950408889634)
LN_2 = _f(0.6931471805599453)
LN_2_HIGH, LN_2_LOW = _f(0.693145751953125), _f(1.428606765330187e-06)
# Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
ROUND = _f(12582912.0)
ROUND_BIASED = _f(12582912.0 + 127)
# 2^r on [-1/2, 1/2], relative error 1.05e-7; value and slope are exact at 0, because a channel that remembers 1000
# steps multiplies an error there by 1000. Fitted by weighted least squares, as are the next.
P1, P2, P3, P4, P5 = (_f(c) for c in (0.69314718056, 0.2402228266, 0.05550558493, 0.00966969412, 0.00133006158))
# artanh(sqrt(q)) / sqrt(q) on [0, 1/9], relative error 4e-9.
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
def exp2_state(v):
    """2^v, v at most 127, one operation cheaper: the exponent is added as an integer. 0 from -127 down.

    A NaN stays NaN only if its low nine bits are zero, which `plain_nan` and `_fill` see to.
    """
    v = at_least(v, every(_f(-127.0)))
    s = v + every(ROUND)
    return add_bits(power(v - (s - every(ROUND))), low_bits_as_exponent(s))


@nb.njit
def sigmoid(v):
    return every(_f(1.0)) / (every(_f(1.0)) + exp2(v * every(-LOG2_E)))


@nb.njit
def softplus_tail(v):
    """exp(-|v|): 0 from about -88 down; the remainder is taken in base e, or rounding v * log2(e) would show."""
    v = at_least(every(_f(0.0)) - magnitude(v), every(_f(-127.0) * LN_2))
    s = v * every(LOG2_E) + every(ROUND_BIASED)
    k = s - every(ROUND_BIASED)
    r = v - k * every(LN_2_HIGH) - k * every(LN_2_LOW)
    return power(r * every(LOG2_E)) * low_bits_as_exponent(s)


@nb.njit
def softplus(v, tail):
    """log(1 + exp(v)) = max(v, 0) + log(1 + tail), accurate relatively for very negative v too."""
    s = tail / (every(_f(2.0)) + tail)
    q = s * s
    p = every(L4) * q + every(L3)
    p = p * q + every(L2)
    p = p * q + every(L1)
    p = p * q + every(L0)
    return plain_nan(at_least(v, every(_f(0.0))) + (s + s) * p)


@nb.njit
def read(array, index, left):
    """A vector of a row of which `left` numbers remain; zeros beyond the row."""
    if left >= LANES:
        return load(array, index)
    return load_some(array, index, left)


@nb.njit
def write(array, index, value, left):
    if left >= LANES:
        store(array, index, value)
    else:
        store_some(array, index, value, left)


@nb.njit
def aligned(size):
    """Scratch memory that starts at a cache line."""
    memory = np.empty(size + 16, np.float32)
    return memory[(-(memory.ctypes.data >> 2)) & 15 :]


@nb.njit
def _fill(tile, source, base, states, count, scale):
    """`[count, states]` at `source[base:]` -> tile `[vector, state, lane]`, times `scale`; zeros beyond `count`."""
    for v in range(0, count, LANES):
        for lane in range(LANES):
            for n in range(states):
                value = _f(0.0)
                if v + lane < count:
                    value = source[base + (v + lane) * states + n] * scale
                    if value != value:
                        value = _f(np.nan)
                tile[v * states + n * LANES + lane] = value


@nb.njit
def _spill(target, base, tile, states, count):
    """The inverse of `_fill`."""
    for e in range(count):
        lane = e % LANES
        for n in range(states):
            target[base + e * states + n] = tile[(e - lane) * states + n * LANES + lane]


@nb.njit
def _clear(array, size):
    for i in range(size):
        array[i] = _f(0.0)


@nb.njit
def _add(total, part, size):
    for i in range(size):
        total[i] += part[i]


@nb.njit
def checkpoint_at(start, sequence, chunk, spacing):
    """Which checkpoint holds the state before a chunk of a sequence that starts at row `start`; no two are the same."""
    return start // spacing + sequence + chunk


@nb.njit(nogil=True, cache=True)
def scan(
    x, x_step, dt, dt_step, z, z_step, B, B_step, C, C_step, A, D, dt_bias, initial, bounds,
    width, states, block, spacing, slot, y, final, checkpoints, first, last,
):  # fmt: skip
    """A job is a block of channels of one sequence. Row r of x starts at `x_step * r`; absent arrays are empty.

    The states before every `spacing` steps go to `checkpoints`, `slot` numbers each, unless it is empty.
    """
    sequences = bounds.shape[0] - 1
    A_tile, h = aligned(states * block), aligned(states * block)
    delta, drive, out = aligned(block), aligned(block), aligned(block)
    zero = every(_f(0.0))
    loaded = np.int64(-1)
    for job in range(first, last):
        start, sequence = job // sequences * block, job % sequences
        count = min(block, width - start)
        used = (count + LANES - 1) // LANES * LANES * states
        if loaded != start:
            _fill(A_tile, A, start * states, states, count, LOG2_E)
            loaded = start
        if initial.shape[0]:
            _fill(h, initial, (sequence * width + start) * states, states, count, _f(1.0))
        else:
            _clear(h, used)
        row0 = bounds[sequence]
        for row in range(row0, bounds[sequence + 1]):
            if checkpoints.shape[0] and (row - row0) % spacing == 0:
                base = checkpoint_at(row0, sequence, (row - row0) // spacing, spacing) * slot + start * states
                for i in range(0, used, LANES):
                    store(checkpoints, base + i, load(h, i))
            # Three passes over the row: in one, each vector would wait for its own softplus.
            for v in range(0, count, LANES):
                left, e = count - v, start + v
                value, step = read(x, row * x_step + e, left), read(dt, row * dt_step + e, left)
                if dt_bias.shape[0]:
                    step = step + read(dt_bias, e, left)
                step = softplus(step, softplus_tail(step))
                store(delta, v, step)
                store(drive, v, step * value)
                total = zero
                if D.shape[0]:
                    total = read(D, e, left) * value
                store(out, v, total)
            B_row, C_row = row * B_step, row * C_step
            for v in range(0, count, LANES):
                step, push, even, odd = load(delta, v), load(drive, v), load(out, v), zero
                i = v * states
                for n in range(0, states - 1, 2):
                    j = i + LANES
                    h0 = load(h, i) * exp2_state(step * load(A_tile, i)) + push * spread(B, B_row + n)
                    h1 = load(h, j) * exp2_state(step * load(A_tile, j)) + push * spread(B, B_row + n + 1)
                    store(h, i, h0)
                    store(h, j, h1)
                    even = even + spread(C, C_row + n) * h0
                    odd = odd + spread(C, C_row + n + 1) * h1
                    i = j + LANES
                if states % 2:
                    h0 = load(h, i) * exp2_state(step * load(A_tile, i)) + push * spread(B, B_row + states - 1)
                    store(h, i, h0)
                    even = even + spread(C, C_row + states - 1) * h0
                store(out, v, even + odd)
            for v in range(0, count, LANES):
                left, e = count - v, start + v
                total = load(out, v)
                if z.shape[0]:
                    gate = read(z, row * z_step + e, left)
                    total = total * (gate * sigmoid(gate))
                write(y, row * width + e, total, left)
        _spill(final, (sequence * width + start) * states, h, states, count)


@nb.njit(nogil=True, cache=True)
def scan_backward(
    grad_y, grad_y_step, grad_final, x, x_step, dt, dt_step, z, z_step, B, B_step, C, C_step, A, D, dt_bias, bounds,
    checkpoints, width, states, block, spacing, slot, groups, spans,
    grad_x, grad_dt, grad_z, grad_B, grad_C, grad_A, grad_D, grad_bias, grad_initial, first, last,
):  # fmt: skip
    """A job is a group of channel blocks in a span of sequences.

    grad_B and grad_C `[groups, rows, N]` have one part per group, grad_A `[spans, E, N]`, grad_D and grad_bias
    `[spans, E]` one per span: no two jobs write the same number, and every sum has one order.
    """
    sequences = bounds.shape[0] - 1
    rows = bounds[sequences]
    blocks = (width + block - 1) // block
    tile = states * block
    A_tile, carry, sum_A, total_A = aligned(tile), aligned(tile), aligned(tile), aligned(tile)
    sum_D, sum_bias, total_D, total_bias = aligned(block), aligned(block), aligned(block), aligned(block)
    from_decay, from_drive = aligned(block), aligned(block)
    h, decay = aligned((spacing + 1) * tile), aligned(spacing * tile)
    delta, drive, slope = aligned(spacing * block), aligned(spacing * block), aligned(spacing * block)
    grad, out = aligned(spacing * block), aligned(spacing * block)
    lanes_B, lanes_C = aligned(states * LANES), aligned(states * LANES)
    zero, one = every(_f(0.0)), every(_f(1.0))
    for job in range(first, last):
        group, span = job // spans, job % spans
        block0 = blocks * group // groups
        for index in range(block0, blocks * (group + 1) // groups):
            start = index * block
            count = min(block, width - start)
            used = (count + LANES - 1) // LANES * LANES * states
            _fill(A_tile, A, start * states, states, count, LOG2_E)
            _clear(total_A, tile)
            _clear(total_D, block)
            _clear(total_bias, block)
            for sequence in range(sequences * span // spans, sequences * (span + 1) // spans):
                row0, row1 = bounds[sequence], bounds[sequence + 1]
                if grad_final.shape[0]:
                    _fill(carry, grad_final, (sequence * width + start) * states, states, count, _f(1.0))
                else:
                    _clear(carry, used)
                for chunk in range((row1 - row0 + spacing - 1) // spacing - 1, -1, -1):
                    top = row0 + chunk * spacing
                    steps = min(spacing, row1 - top)
                    base = checkpoint_at(row0, sequence, chunk, spacing) * slot + start * states
                    for i in range(0, used, LANES):
                        store(h, i, load(checkpoints, base + i))
                    _clear(sum_A, used)
                    _clear(sum_D, block)
                    _clear(sum_bias, block)
                    for t in range(steps):
                        row = top + t
                        for v in range(0, count, LANES):
                            left, e, k = count - v, start + v, t * block + v
                            value, step = read(x, row * x_step + e, left), read(dt, row * dt_step + e, left)
                            if dt_bias.shape[0]:
                                step = step + read(dt_bias, e, left)
                            tail = softplus_tail(step)
                            near = one / (one + tail)
                            store(slope, k, if_negative(step, tail * near, near))
                            step = softplus(step, tail)
                            store(delta, k, step)
                            store(drive, k, step * value)
                            upstream = read(grad_y, row * grad_y_step + e, left)
                            if z.shape[0]:
                                gate = read(z, row * z_step + e, left)
                                upstream = upstream * (gate * sigmoid(gate))
                            store(grad, k, upstream)
                            total = zero
                            if D.shape[0]:
                                total = read(D, e, left) * value
                            store(out, k, total)
                        B_row, C_row = row * B_step, row * C_step
                        for v in range(0, count, LANES):
                            k = t * block + v
                            step, push, total = load(delta, k), load(drive, k), load(out, k)
                            i, j = t * tile + v * states, v * states
                            for n in range(states):
                                a = exp2_state(step * load(A_tile, j))
                                now = load(h, i) * a + push * spread(B, B_row + n)
                                store(decay, i, a)
                                store(h, i + tile, now)
                                total = total + spread(C, C_row + n) * now
                                i += LANES
                                j += LANES
                            store(out, k, total)
                    for t in range(steps - 1, -1, -1):
                        row = top + t
                        B_row, C_row = row * B_step, row * C_step
                        _clear(lanes_B, states * LANES)
                        _clear(lanes_C, states * LANES)
                        for v in range(0, count, LANES):
                            k = t * block + v
                            step, push, upstream = load(delta, k), load(drive, k), load(grad, k)
                            to_decay, to_drive = zero, zero
                            i, j, m = t * tile + v * states, v * states, 0
                            for n in range(states):
                                store(lanes_C, m, load(lanes_C, m) + upstream * load(h, i + tile))
                                q = load(carry, j) + spread(C, C_row + n) * upstream
                                store(lanes_B, m, load(lanes_B, m) + q * push)
                                to_drive = to_drive + q * spread(B, B_row + n)
                                q = q * load(decay, i)
                                store(carry, j, q)
                                q = q * load(h, i)
                                to_decay = to_decay + q * load(A_tile, j)
                                store(sum_A, j, load(sum_A, j) + q * step)
                                i += LANES
                                j += LANES
                                m += LANES
                            store(from_decay, v, to_decay)
                            store(from_drive, v, to_drive)
                        for v in range(0, count, LANES):
                            left, e, k = count - v, start + v, t * block + v
                            value, upstream, to_drive = (
                                read(x, row * x_step + e, left),
                                load(grad, k),
                                load(from_drive, v),
                            )
                            to_x = to_drive * load(delta, k)
                            if D.shape[0]:
                                to_x = to_x + upstream * read(D, e, left)
                                store(sum_D, v, load(sum_D, v) + upstream * value)
                            write(grad_x, row * width + e, to_x, left)
                            to_dt = (load(from_decay, v) * every(LN_2) + to_drive * value) * load(slope, k)
                            store(sum_bias, v, load(sum_bias, v) + to_dt)
                            write(grad_dt, row * width + e, to_dt, left)
                            if z.shape[0]:
                                gate = read(z, row * z_step + e, left)
                                s = sigmoid(gate)
                                to_z = (
                                    read(grad_y, row * grad_y_step + e, left)
                                    * load(out, k)
                                    * (s + gate * s * (one - s))
                                )
                                write(grad_z, row * width + e, to_z, left)
                        base = (group * rows + row) * states
                        for n in range(states):
                            to_B, to_C = lane_sum(load(lanes_B, n * LANES)), lane_sum(load(lanes_C, n * LANES))
                            if index == block0:
                                grad_B[base + n], grad_C[base + n] = to_B, to_C
                            else:
                                grad_B[base + n] += to_B
                                grad_C[base + n] += to_C
                    # Sums of sums: rounding then grows with the square root of what it would in one long sum.
                    _add(total_A, sum_A, used)
                    _add(total_D, sum_D, block)
                    _add(total_bias, sum_bias, block)
                if grad_initial.shape[0]:
                    _spill(grad_initial, (sequence * width + start) * states, carry, states, count)
            _spill(grad_A, (span * width + start) * states, total_A, states, count)
            for e in range(count):
                grad_D[span * width + start + e] = total_D[e]
                grad_bias[span * width + start + e] = total_bias[e]
