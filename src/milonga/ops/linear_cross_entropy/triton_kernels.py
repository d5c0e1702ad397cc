"""Triton kernels of `linear_cross_entropy`: what follows each matrix product, on a chunk of logits.

A program takes `R` rows and, in the forward pass, walks their classes `BV` at a time. Every sum is one chain within a
program: results do not depend on the GPU or on how programs are scheduled.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def logits_of(logits, bias, rows, columns, stride, inside, width, BIAS: tl.constexpr, OTHER: tl.constexpr):
    """A tile of logits in fp32, bias added; `OTHER` outside."""
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(logits + places, mask=inside, other=OTHER).to(tl.float32)
    if BIAS:
        values += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=("count", "ignore"))
def loss_forward(
    logits, bias, targets, losses, totals, count, width, stride, ignore,
    R: tl.constexpr, BV: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Loss of each row, and the natural logarithm of its sum of exponentials.

    A target that is neither a class nor `ignore` gives NaN.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    live = rows < count
    peak = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    for start in range(0, width, BV):
        columns = start + tl.arange(0, BV)
        inside = live[:, None] & (columns < width)[None, :]
        values = logits_of(logits, bias, rows, columns, stride, inside, width, BIAS, float("-inf"))
        above = tl.maximum(peak, tl.max(values, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        terms = tl.exp2((values - base[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - base) * LOG2_E) + tl.sum(terms, 1)
        peak = above
    target = tl.load(targets + rows, mask=live, other=0)
    counts = target != ignore
    known = live & (target >= 0) & (target < width)
    chosen = tl.load(logits + rows.to(tl.int64) * stride + target, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        chosen += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    logarithm = tl.log(tl.where(live, total, 1.0))
    tl.store(losses + rows, tl.where(counts, logarithm - (chosen - peak), 0.0), mask=live)
    tl.store(totals + rows, peak + logarithm, mask=live)


@triton.jit(do_not_specialize=("count", "ignore"))
def loss_backward(
    logits, bias, targets, upstream, totals, gradients, count, width, stride, ignore,
    R: tl.constexpr, BV: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits `[count, width]`, in the dtype of `gradients`."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    live = rows < count
    inside = live[:, None] & (columns < width)[None, :]
    values = logits_of(logits, bias, rows, columns, stride, inside, width, BIAS, 0.0)
    target = tl.load(targets + rows, mask=live, other=ignore)
    total = tl.load(totals + rows, mask=live, other=0.0)
    factor = tl.load(upstream + rows, mask=live, other=0.0).to(tl.float32)
    share = tl.exp2((values - total[:, None]) * LOG2_E)
    slope = factor[:, None] * tl.where(columns[None, :] == target[:, None], share - 1.0, share)
    slope = tl.where((target == ignore)[:, None], 0.0, slope)
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(gradients + places, slope.to(gradients.dtype.element_ty), mask=inside)


@triton.jit
def scale(slope, factor, out, count, BLOCK: tl.constexpr):
    """out = slope * factor, in fp32 until it is stored."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(slope + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, value, mask=at < count)
