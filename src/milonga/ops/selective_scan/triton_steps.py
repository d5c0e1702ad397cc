"""Triton kernel of `selective_scan` for a few steps, as in decoding: one launch, every tensor as it comes.

A program is a warp with a few channels of one sequence and all their states, `[CH, N]` with the states of a channel
side by side as they lie in memory. There is nothing to share and no time to cut: reading and writing the state is what
a step costs.
"""

import triton
import triton.language as tl

from milonga.ops.selective_scan.triton_kernels import LOG2_E, decay_of, exp_of_minus, step_size


@triton.jit(do_not_specialize=["T"])
def scan_steps(
    x, dt, z, B, C, A, D, dt_bias, initial, bounds, y, final, T, E, x_step, dt_step, z_step, B_step, C_step,
    STATES: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr,
    Z: tl.constexpr, D_: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """STATES states a channel; N is the power of two above."""
    blocks = tl.cdiv(E, CH)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * CH + tl.arange(0, CH)
    n = tl.arange(0, N)
    live = e < E
    known = n < STATES
    mask = live[:, None] & known[None, :]
    tile = e[:, None] * STATES + n[None, :]
    row = sequence * T
    steps = T
    if PACKED:
        row = tl.load(bounds + sequence)
        steps = (tl.load(bounds + sequence + 1) - row).to(tl.int32)
    a2 = tl.load(A + tile, mask=mask, other=0.0) * LOG2_E
    h = tl.zeros([CH, N], tl.float32)
    if INITIAL:
        h = tl.load(initial + sequence * E * STATES + tile, mask=mask, other=0.0)
    bias = tl.zeros([CH], tl.float32)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=live, other=0.0)
    weight = tl.zeros([CH], tl.float32)
    if D_:
        weight = tl.load(D + e, mask=live, other=0.0)
    for _ in range(steps):
        value = tl.load(x + row * x_step + e, mask=live, other=0.0).to(tl.float32)
        delta = step_size(tl.load(dt + row * dt_step + e, mask=live, other=0.0), bias, live)
        into = tl.load(B + row * B_step + n, mask=known, other=0.0).to(tl.float32)
        out = tl.load(C + row * C_step + n, mask=known, other=0.0).to(tl.float32)
        h = tl.fma(decay_of(delta[:, None] * a2, EXACT), h, (delta * value)[:, None] * into[None, :])
        result = tl.fma(weight, value, tl.sum(h * out[None, :], 1))
        if Z:
            gate = tl.load(z + row * z_step + e, mask=live, other=0.0).to(tl.float32)
            result *= gate / (1.0 + exp_of_minus(gate))
        tl.store(y + row * E + e, result, mask=live)
        row += 1
    tl.store(final + sequence * E * STATES + tile, h, mask=mask)
