"""`rotary` on a GPU, for both passes: the gradient is turned back. A program is a row, or up to 32 heads of it."""

from decimal import Context, Decimal
from functools import lru_cache
from math import frexp, ldexp

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.gpu.triton_parts import power_of_two, rows

_HEADS = 32
# Bits of the upper part of a frequency: times a position below 2^33 the product is exact in float64.
_BITS = 20
_TURN = Decimal("6.2831853071795864769252867665590057683943387987502")


@triton.jit
def _cos_and_sin(turns):
    """fp32 cosine and sine of an angle in turns (float64): quarter turns taken off, then polynomials on [-pi/4, pi/4],
    fitted by least squares weighted towards the least maximum; errors 1e-10 and 2e-9 before rounding."""
    quarters = turns * 4.0
    whole = tl.floor(quarters + 0.5)
    r = (quarters - whole).to(tl.float32) * 1.5707963267948966
    z = r * r
    c = tl.fma(z, tl.fma(z, tl.fma(z, 2.443841494e-05, -0.001388736721), 0.04166664686), -0.5)
    c = tl.fma(z, c, 1.0)
    s = tl.fma(z, tl.fma(z, -0.0001949560137, 0.008331978389), -0.1666665066)
    s = tl.fma(r * z, s, r)
    q = whole.to(tl.int32)
    odd = (q & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) != 0, -cos, cos), tl.where((q & 2) != 0, -sin, sin)


@triton.jit(do_not_specialize=["known"])
def _rotate(
    x, positions, frequencies, y, known, x_step,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TURNS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """`TURNS` times `GROUP` heads of a row; `known`: the number of positions, which serve the rows in turn."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    position = tl.load(positions + row % known).to(tl.float64)
    turns = position * tl.load(frequencies + i, mask=i < HALF, other=0.0)
    turns -= tl.floor(turns)
    turns += position * tl.load(frequencies + HALF + i, mask=i < HALF, other=0.0)
    turns -= tl.floor(turns)
    cos, sin = _cos_and_sin(turns)
    if BACK:
        sin = -sin
    head = tl.program_id(1) * (TURNS * GROUP) + tl.arange(0, GROUP)
    lane = head[:, None] * (2 * HALF) + i[None, :]
    x += row * x_step + lane
    y += row * (HEADS * 2 * HALF) + lane
    firsts = ()
    seconds = ()
    for turn in tl.static_range(TURNS):
        live = (head + turn * GROUP < HEADS)[:, None] & (i < HALF)[None, :]
        firsts = firsts + (tl.load(x + turn * (GROUP * 2 * HALF), mask=live, other=0.0),)
        seconds = seconds + (tl.load(x + turn * (GROUP * 2 * HALF) + HALF, mask=live, other=0.0),)
    for turn in tl.static_range(TURNS):
        live = (head + turn * GROUP < HEADS)[:, None] & (i < HALF)[None, :]
        first = firsts[turn].to(tl.float32)
        second = seconds[turn].to(tl.float32)
        at = y + turn * (GROUP * 2 * HALF)
        tl.store(at, first * cos[None, :] - second * sin[None, :], mask=live)
        tl.store(at + HALF, second * cos[None, :] + first * sin[None, :], mask=live)


@lru_cache(maxsize=64)
def _frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i / K) in turns a step, as two float64 parts `[2, K / 2]` whose sum is exact to about 2^-73.

    Copied to the device on first use, which must not be while a CUDA graph is captured.
    """
    context = Context(prec=50)
    upper, lower = [], []
    for i in range(width // 2):
        power = context.divide(Decimal(-2 * i), Decimal(width))
        exact = context.divide(context.power(Decimal(base), power), _TURN)
        mantissa, exponent = frexp(float(exact))
        upper.append(ldexp(round(ldexp(mantissa, _BITS)), exponent - _BITS))
        lower.append(float(context.subtract(exact, Decimal(upper[-1]))))
    return torch.tensor([upper, lower], dtype=torch.float64, device="cpu").to(device)


def rotate(x: Tensor, positions: Tensor, base: float, sign: float) -> Tensor:
    """Kernel of `milonga::rotary` on a GPU: one launch."""
    batch, time, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    half = width // 2
    x, x_step = rows(x.flatten(2), heads * width)
    together = min(heads, _HEADS)
    # a warp has a group's loads in flight: 16 bytes a lane for K = 128 in bf16, 8 heads at a time
    group = min(power_of_two(together), max(512 // power_of_two(half), 1))
    tile = {
        "HEADS": heads, "HALF": half, "PADDED": power_of_two(half), "GROUP": group, "TURNS": -(-together // group),
        "BACK": sign < 0, "num_warps": 1,
    }  # fmt: skip
    grid = (batch * time, -(-heads // (group * tile["TURNS"])))
    with torch.cuda.device_of(x):
        _rotate[grid](
            x, positions.contiguous(), _frequencies(width, float(base), x.device), y, positions.numel(), x_step, **tile
        )
    return y
