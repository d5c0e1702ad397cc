"""Triton kernels of `window_attention` for a piece of few steps after a past: decoding, and checking a drafted text.

The ring is read in place and in the order of its slots, which a softmax does not mind. It is cut into `splits` lengths
of slots, each with a program that all heads sharing a key head go through together, and `decode_sum` adds up what they
found in the order of the slots. The cuts depend on the capacity alone: a graph captured once serves every position, and
a row of a batch gets the same bits whatever the others are.

Letters as in `triton_kernels`; a program has R rows, pairs of one of T steps and one of GROUP heads.
"""

import triton
import triton.language as tl

from milonga.ops.window_attention.triton_kernels import MINUS, attend, tile

FREE = ("window", "P", "length", "splits", "heads")


@triton.jit(do_not_specialize=FREE)
def decode_splits(
    q, k, v, past_k, past_v, position, parts, logs, window, scale, P, length, splits, heads,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    pk_row, pk_step, pk_head, pv_row, pv_step, pv_head,
    K: tl.constexpr, V: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, GROUP: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the slots of one split: y of each row, `[S G splits R V]`, and log2 of the sum of exponentials; fp32 both."""
    g = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    at = tl.load(position + sequence)
    held = tl.minimum(at, P).to(tl.int32)
    head = (at % P).to(tl.int32)
    cols = tl.arange(0, BN)
    k_at = tl.arange(0, K)
    v_at = tl.arange(0, V)
    r = tl.arange(0, R)
    t = r // GROUP
    live = r < T * GROUP
    wide = g.to(tl.int64)
    places = q + sequence * q_row + t[:, None] * q_step + (g * GROUP + r % GROUP)[:, None] * q_head + k_at[None, :]
    q_tile = tl.load(places, mask=live[:, None] & (k_at < WK)[None, :], other=0.0)
    acc = tl.zeros([R, V], tl.float32)
    total = tl.zeros([R], tl.float32)
    peak = tl.full([R], MINUS, tl.float32)
    k_base = past_k + sequence * pk_row + wide * pk_head
    v_base = past_v + sequence * pv_row + wide * pv_head
    low = split * length
    # slots from `held` on were never written
    high = tl.minimum(low + length, held)
    for start in range(low, high, BN):
        slot = start + cols
        back = head - 1 - slot
        n = -1 - tl.where(back < 0, back + P, back)
        # the first step sees the farthest back: what it does not see nobody does
        ok = (slot < high) & (n > -window)
        slot = slot.to(tl.int64)
        k_tile = tile(k_base, slot, pk_step, k_at, ok, WK, K, True)
        v_tile = tile(v_base, slot, pv_step, v_at, ok, WV, V, True)
        seen = ok[None, :] & (t[:, None] - n[None, :] < window)
        acc, total, peak = attend(acc, total, peak, q_tile, k_tile, v_tile, seen, scale, True, T > 1, PRECISION)
    if split == splits - 1:
        ok = cols < T
        k_tile = tile(k + sequence * k_row + wide * k_head, cols, k_step, k_at, ok, WK, K, True)
        v_tile = tile(v + sequence * v_row + wide * v_head, cols, v_step, v_at, ok, WV, V, True)
        apart = t[:, None] - cols[None, :]
        seen = ok[None, :] & (apart >= 0) & (apart < window)
        acc, total, peak = attend(acc, total, peak, q_tile, k_tile, v_tile, seen, scale, True, T > 1, PRECISION)
    line = ((sequence * (heads // GROUP) + g) * splits + split) * R + r
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    tl.store(logs + line, tl.where(some, peak + tl.log2(total), MINUS))
    acc = acc / total[:, None]
    tl.store(parts + line[:, None] * V + v_at[None, :], acc)


@triton.jit(do_not_specialize=("splits", "heads"))
def decode_sum(
    parts, logs, y, stats, splits, heads,
    V: tl.constexpr, WV: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y `[S T H WV]` and log2 of each query's whole sum of exponentials, `[S H T]`; SPLITS is at least `splits`."""
    h = tl.program_id(0)
    t = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, SPLITS)
    v_at = tl.arange(0, V)
    line = ((sequence * (heads // GROUP) + h // GROUP) * splits + i) * R + t * GROUP + h % GROUP
    logarithms = tl.load(logs + line, mask=i < splits, other=MINUS)
    peak = tl.max(logarithms, 0)
    some = logarithms != MINUS
    shares = tl.where(some, tl.exp2(logarithms - peak), 0.0)
    total = tl.sum(shares, 0)
    values = tl.load(parts + line[:, None] * V + v_at[None, :], mask=some[:, None], other=0.0)
    result = tl.sum(values * shares[:, None], 0) / total
    place = ((sequence * T + t) * heads + h) * WV + v_at
    tl.store(y + place, result.to(y.dtype.element_ty), mask=v_at < WV)
    tl.store(stats + (sequence * heads + h) * T + t, peak + tl.log2(total))
