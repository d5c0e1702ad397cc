"""A step of AdamW on a GPU: many tensors in one launch that moves them and finds them by their addresses in a table.

A program is a chunk of one tensor. A launch of its own before it counts the step and finds each tensor's bias
corrections, in float64: 1 - beta^t in fp32 would be wrong in the fifth digit at first. What is left for a chunk is to
read 16 bytes a parameter and to write 12.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.adamw.table import Table

# Elements and warps of a program, and tensors of a program that counts steps.
_CHUNK, _WARPS, _TENSORS = 2048, 8, 128
# Columns of a table: four addresses, the step count's, elements, number of the first chunk, and one for even rows.
_COLUMNS = tl.constexpr(8)
_STEP, _ELEMENTS, _FIRST = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_VANISHES = -2000.0  # log2 of what is 0 in float64


@triton.jit
def _bias_correction(t, LOG2_BETA: tl.constexpr):
    return 1.0 - tl.exp2(t * tl.full([], LOG2_BETA, tl.float64))


@triton.jit(do_not_specialize=["count", "lr"])
def _count(
    table, rates, skip, count, lr,
    LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, SKIPS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Advances step counts; writes `rates` `[N 2]`: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)."""
    if SKIPS:
        if tl.load(skip) == 1.0:
            return
    row = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    live = row < count
    place = tl.load(table + row * _COLUMNS + _STEP, mask=live, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(place, mask=live, other=0.0) + 1.0
    tl.store(place, t, mask=live)
    t = t.to(tl.float64)
    first = lr / _bias_correction(t, LOG2_BETA1)
    second = 1.0 / tl.sqrt(_bias_correction(t, LOG2_BETA2))
    tl.store(rates + row * 2, first.to(tl.float32), mask=live)
    tl.store(rates + row * 2 + 1, second.to(tl.float32), mask=live)


@triton.jit
def _mean(old, new, beta, weight, LITTLE: tl.constexpr):
    """beta * old + weight * new, weight = 1 - beta, from the side that is nearer: of the other little would be left."""
    if LITTLE:
        found = tl.fma(old - new, beta, new)
    else:
        found = tl.fma(new - old, weight, old)
    return found


@triton.jit
def _move(
    parameter, gradient, exp_avg, exp_avg_sq, left, inverse, beta1, beta2, weight1, weight2, eps, decay, rate,
    correction, LITTLE1: tl.constexpr, LITTLE2: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # every rounding is written down (fma), so that no path differs from another by what a compiler joins
    at = tl.arange(0, CHUNK)
    live = None if WHOLE else at < left
    g = tl.load(gradient + at, mask=live) * inverse
    m = tl.load(exp_avg + at, mask=live)
    v = tl.load(exp_avg_sq + at, mask=live)
    p = tl.load(parameter + at, mask=live)
    m = _mean(m, g, beta1, weight1, LITTLE1)
    v = _mean(v, g * g, beta2, weight2, LITTLE2)
    update = tl.div_rn(m, tl.fma(tl.sqrt_rn(v), correction, eps))
    # one rounding of the size of p: beside it a decay of 1e-6 of p would be half lost in 1 - 1e-6
    p = p - tl.fma(p, decay, rate * update)
    tl.store(exp_avg + at, m, mask=live)
    tl.store(exp_avg_sq + at, v, mask=live)
    tl.store(parameter + at, p, mask=live)


@triton.jit(do_not_specialize=["beta1", "beta2", "weight1", "weight2", "eps", "decay"])
def _step(
    table, owner, rates, scale, skip, beta1, beta2, weight1, weight2, eps, decay,
    LITTLE1: tl.constexpr, LITTLE2: tl.constexpr, SCALES: tl.constexpr, SKIPS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner + tl.program_id(0))
    row = table + tensor * _COLUMNS
    start = (tl.program_id(0) - tl.load(row + _FIRST)) * CHUNK
    left = tl.load(row + _ELEMENTS) - start
    parameter = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
    parameter, gradient, exp_avg, exp_avg_sq = parameter + start, gradient + start, exp_avg + start, exp_avg_sq + start
    if SKIPS:  # behind the loads above, which so need not wait for this one
        if tl.load(skip) == 1.0:
            return
    rate, correction = tl.load(rates + tensor * 2), tl.load(rates + tensor * 2 + 1)
    inverse = 1.0
    if SCALES:
        inverse = tl.div_rn(1.0, tl.load(scale))
    if left >= CHUNK:  # without masks, which would part the wide accesses
        _move(
            parameter, gradient, exp_avg, exp_avg_sq, left, inverse, beta1, beta2, weight1, weight2, eps, decay, rate,
            correction, LITTLE1, LITTLE2, True, CHUNK,
        )  # fmt: skip
    else:
        _move(
            parameter, gradient, exp_avg, exp_avg_sq, left, inverse, beta1, beta2, weight1, weight2, eps, decay, rate,
            correction, LITTLE1, LITTLE2, False, CHUNK,
        )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else _VANISHES


def step(
    table: Table,
    tensors: Sequence[Sequence[Tensor]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Kernels of `milonga.ops.adamw.adamw_`: two launches for all tensors (parameters, gradients, moments, counts)."""
    parameters = tensors[0]
    counts = [parameter.numel() for parameter in parameters]
    with torch.cuda.device_of(parameters[0]):
        for rows, owner, aligned in table.launches(tensors, counts, _CHUNK):
            count = rows.numel() // _COLUMNS.value
            rates = torch.empty(2 * count, dtype=torch.float32, device=rows.device)
            absent = rates  # a kernel takes some tensor where one is absent
            _count[(-(-count // _TENSORS),)](
                rows, rates, absent if skip is None else skip, count, float(lr),
                LOG2_BETA1=_log2(betas[0]), LOG2_BETA2=_log2(betas[1]), SKIPS=skip is not None, TENSORS=_TENSORS,
            )  # fmt: skip
            if owner.numel():
                _step[(owner.numel(),)](
                    rows, owner, rates, absent if scale is None else scale, absent if skip is None else skip,
                    float(betas[0]), float(betas[1]), 1.0 - betas[0], 1.0 - betas[1], float(eps),
                    float(lr * weight_decay), LITTLE1=betas[0] < 0.5, LITTLE2=betas[1] < 0.5,
                    SCALES=scale is not None, SKIPS=skip is not None, ALIGNED=aligned, CHUNK=_CHUNK, num_warps=_WARPS,
                )  # fmt: skip
