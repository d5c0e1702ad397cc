"""Triton kernels that sum what the programs of the backward pass in Gluon leave, in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "blocks", "T", "length", "part", "low"])
def sum_blocks(
    partials, grad_B, grad_C, rows, blocks, T, length, part, low, out_step,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dB and dC of 16 states from the sums of each block of channels, `[blocks, rows, 32]`, to rows `out_step` apart.

    With PARTS row i of `partials` is step `low` + i % part of slot i // part, else row i of the batch.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, 32)
    inside = i < rows
    row = i
    if PARTS:
        per_row = (T + length - 1) // length
        slot = i // part
        step = (slot % per_row) * length + low + i % part
        row = slot // per_row * T + step
        inside = inside & (low + i % part < length) & (step < T)
    at = partials + i[:, None] * 32 + j[None, :]
    size = rows.to(tl.int64) * 32
    total = tl.zeros([ROWS, 32], tl.float32)
    for block in range(0, blocks, 4):
        for k in tl.static_range(4):
            mask = inside[:, None] & (block + k < blocks)
            total += tl.load(at + k * size, mask=mask, other=0.0)
        at += 4 * size
    # columns, from the highest bit: n0, n3, dB or dC, n2, n1
    n = (j >> 4 & 1) + (j & 1) * 2 + (j >> 1 & 1) * 4 + (j >> 3 & 1) * 8
    for_C = (j >> 2 & 1) == 1
    to = row[:, None] * out_step + n[None, :]
    tl.store(grad_B + to, total, mask=inside[:, None] & (for_C == 0)[None, :])
    tl.store(grad_C + to, total, mask=inside[:, None] & for_C[None, :])


@triton.jit(do_not_specialize=["parts", "E"])
def sum_parts(
    parts_A, parts_D, parts_bias, grad_A, grad_D, grad_bias, parts, E,
    CH: tl.constexpr, N: tl.constexpr, D_: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of A `[E N]`, D and dt_bias from those of `parts` programs, of which four are loaded at a time."""
    e = tl.program_id(0) * CH + tl.arange(0, CH)
    i = tl.program_id(0) * CH * N + tl.arange(0, CH * N)
    d_A = tl.zeros([CH * N], tl.float32)
    d_D = tl.zeros([CH], tl.float32)
    d_bias = tl.zeros([CH], tl.float32)
    for first in range(0, parts, 4):
        for k in tl.static_range(4):
            there = first + k < parts
            d_A += tl.load(parts_A + k * (E * N) + i, mask=(i < E * N) & there, other=0.0)
            if D_:
                d_D += tl.load(parts_D + k * E + e, mask=(e < E) & there, other=0.0)
            if BIAS:
                d_bias += tl.load(parts_bias + k * E + e, mask=(e < E) & there, other=0.0)
        parts_A += 4 * E * N
        if D_:
            parts_D += 4 * E
        if BIAS:
            parts_bias += 4 * E
    tl.store(grad_A + i, d_A, mask=i < E * N)
    if D_:
        tl.store(grad_D + e, d_D, mask=e < E)
    if BIAS:
        tl.store(grad_bias + e, d_bias, mask=e < E)
