"""`rms_norm` and `layer_norm` on a GPU, with or without a residual added first: a program is a tile of whole rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.gpu.triton_parts import dense, power_of_two, rows, sum_rows

# Warps of the backward pass, one wave on an H100: each program leaves a row of sums for the weight's gradient. Fixed,
# so that results do not depend on the GPU.
_WARPS = 2112
# What the backward pass reads: what was normalised; y, of a norm without mean and bias; the normalised row.
SUM, OUTPUT, NORMAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Where a norm is to be told from its output, weights below this are taken for it, with their sign: 1e-18.
_LEAST = tl.constexpr(2.0**-60)


@triton.jit
def _invertible(weight):
    """`weight`, none of it nearer to 0 than `_LEAST`."""
    return tl.where(tl.abs(weight) < _LEAST, tl.where(weight < 0.0, -_LEAST, _LEAST), weight)


@triton.jit(do_not_specialize=["count"])
def _forward(
    x, residual, weight, bias, y, total, normal, mean, scale, count, width, x_step, residual_step, eps,
    ROWS: tl.constexpr, CH: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
    BIAS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """With ADD, x + residual, rounded as `total` is, goes there and is normalised; with CENTRE, less its mean.

    KEPT is what the backward pass will read: y, which says what the normalised row was whatever the weights, or that
    row, which goes to `normal`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CH)[None, :]
    values = ()
    for part in tl.static_range(PARTS):
        at = column + part * CH
        live = (row < count) & (at < width)
        value = tl.load(x + row * x_step + at, mask=live, other=0.0)
        if ADD:
            other = tl.load(residual + row * residual_step + at, mask=live, other=0.0)
            value = (value.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + row * width + at, value, mask=live)
        values = values + (value,)
    middle = tl.zeros([ROWS, 1], tl.float32)
    if CENTRE:
        sums = tl.zeros([ROWS, CH], tl.float32)
        for part in tl.static_range(PARTS):
            sums += values[part].to(tl.float32)
        middle = tl.sum(sums, 1)[:, None] / width
        tl.store(mean + row, middle, mask=row < count)
    squares = tl.zeros([ROWS, CH], tl.float32)
    for part in tl.static_range(PARTS):
        value = values[part].to(tl.float32)
        if CENTRE:
            value = tl.where(column + part * CH < width, value - middle, 0.0)
        squares = tl.fma(value, value, squares)
    factor = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / width + eps)
    tl.store(scale + row, factor, mask=row < count)
    for part in tl.static_range(PARTS):
        at = column + part * CH
        w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        if KEPT == OUTPUT:
            w = _invertible(w)
        value = values[part].to(tl.float32)
        if CENTRE:
            value -= middle
        out = value * factor
        if KEPT == NORMAL:
            tl.store(normal + row * width + at, out, mask=(row < count) & (at < width))
        out = out * w
        if BIAS:
            out += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(y + row * width + at, out, mask=(row < count) & (at < width))


@triton.jit
def _normalised(value, middle, factor, inverse, KEPT: tl.constexpr):
    """The row less its mean and over its deviation, from what was kept of it."""
    value = value.to(tl.float32)
    if KEPT == SUM:
        value = (value - middle) * factor
    if KEPT == OUTPUT:
        value = value * inverse
    return value


@triton.jit
def _affine(normal, weight, bias, y, count, width, CH: tl.constexpr):
    """y = normal * weight + bias, a row of `width` numbers after the other."""
    at = tl.program_id(0).to(tl.int64) * CH + tl.arange(0, CH)
    column = at % width
    value = tl.load(normal + at, mask=at < count, other=0.0).to(tl.float32)
    w, b = tl.load(weight + column).to(tl.float32), tl.load(bias + column).to(tl.float32)
    tl.store(y + at, value * w + b, mask=at < count)


@triton.jit
def _parts_of(pointer, row, step, end, width, CH: tl.constexpr, PARTS: tl.constexpr):
    """Rows in parts of CH columns; zeros from row `end` on."""
    values = ()
    for part in tl.static_range(PARTS):
        at = tl.arange(0, CH)[None, :] + part * CH
        values = values + (tl.load(pointer + row * step + at, mask=(row < end) & (at < width), other=0.0),)
    return values


@triton.jit(do_not_specialize=["count", "length"])
def _backward(
    grad, grad_total, x, weight, mean, scale, grad_x, grad_narrow, partial, count, width, length,
    grad_step, total_step, x_step,
    ROWS: tl.constexpr, CH: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
    BIAS: tl.constexpr, NARROW: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """`length` rows, `ROWS` at a turn. With ADD, `grad_total` is added to the gradient of x.

    With NARROW the gradient is written twice, the second time in another dtype. KEPT says what `x` is.
    """
    column = tl.arange(0, CH)[None, :]
    first = tl.program_id(0).to(tl.int64) * length
    end = tl.minimum(first + length, count)
    weights = ()
    inverse = ()
    sums = ()
    shifts = ()
    for part in tl.static_range(PARTS):
        at = column + part * CH
        w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        if KEPT == OUTPUT:
            w = _invertible(w)
        weights = weights + (w,)
        inverse = inverse + (1.0 / w if KEPT == OUTPUT else 1.0,)
        sums = sums + (tl.zeros([ROWS, CH], tl.float32),)
        shifts = shifts + (tl.zeros([ROWS if BIAS else 1, CH if BIAS else 1], tl.float32),)
    # the loads of a turn are issued a turn ahead: a row's sum would else be waited for with nothing on its way
    row = first + tl.arange(0, ROWS)[:, None]
    values = _parts_of(x, row, x_step, end, width, CH, PARTS)
    upstream = _parts_of(grad, row, grad_step, end, width, CH, PARTS)
    more = ()
    if ADD:
        more = _parts_of(grad_total, row, total_step, end, width, CH, PARTS)
    for turn in range((length + ROWS - 1) // ROWS):
        row = first + turn * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < end
        next_values = _parts_of(x, row + ROWS, x_step, end, width, CH, PARTS)
        next_upstream = _parts_of(grad, row + ROWS, grad_step, end, width, CH, PARTS)
        next_more = ()
        if ADD:
            next_more = _parts_of(grad_total, row + ROWS, total_step, end, width, CH, PARTS)
        factor = tl.load(scale + row, mask=inside, other=0.0)
        middle = tl.zeros([ROWS, 1], tl.float32)
        if CENTRE and KEPT == SUM:
            middle = tl.load(mean + row, mask=inside, other=0.0)
        products = tl.zeros([ROWS, CH], tl.float32)
        plain = tl.zeros([ROWS, CH], tl.float32)
        grown = ()
        lifted = ()
        for part in tl.static_range(PARTS):
            value = _normalised(values[part], middle, factor, inverse[part], KEPT)
            g = upstream[part].to(tl.float32)
            products = tl.fma(g * weights[part], value, products)
            grown = grown + (tl.fma(g, value, sums[part]),)
            if CENTRE:
                plain = tl.fma(g, weights[part], plain)
            if BIAS:
                lifted = lifted + (shifts[part] + g,)
            else:
                lifted = lifted + (shifts[part],)
        sums = grown
        shifts = lifted
        shift = tl.sum(products, 1)[:, None] * factor / width
        level = tl.zeros([ROWS, 1], tl.float32)
        if CENTRE:
            level = tl.sum(plain, 1)[:, None] * factor / width
        for part in tl.static_range(PARTS):
            at = column + part * CH
            value = _normalised(values[part], middle, factor, inverse[part], KEPT)
            out = upstream[part].to(tl.float32) * weights[part] * factor - value * shift
            if CENTRE:
                out -= level
            if ADD:
                out += more[part].to(tl.float32)
            tl.store(grad_x + row * width + at, out, mask=inside & (at < width))
            if NARROW:
                tl.store(grad_narrow + row * width + at, out, mask=inside & (at < width))
        values = next_values
        upstream = next_upstream
        if ADD:
            more = next_more
    row = tl.program_id(0).to(tl.int64) * width * (2 if BIAS else 1)
    for part in tl.static_range(PARTS):
        at = part * CH + tl.arange(0, CH)
        tl.store(partial + row + at, tl.sum(sums[part], 0), mask=at < width)
        if BIAS:
            tl.store(partial + row + width + at, tl.sum(shifts[part], 0), mask=at < width)


class Normed(NamedTuple):
    """What `forward_norm` gives."""

    y: Tensor
    total: Tensor  # like x, the sum in the wider dtype
    normal: Tensor  # like y, the normalised row
    mean: Tensor  # [R] fp32
    scale: Tensor  # [R] fp32, 1/deviation


def _tile(count: int, width: int) -> dict[str, int]:
    """Rows and columns of a tile: wide rows in parts, so that few lanes are idle; several narrow rows together."""
    warps = 1 if width <= 256 else 2 if width <= 1024 else 4 if width <= 4096 else 8 if width <= 16384 else 16
    columns = min(power_of_two(width), 128 * warps if width > 256 else 256)
    tall = min(256 // columns, power_of_two(count)) if columns < 256 else 1
    return {"ROWS": tall, "CH": columns, "PARTS": -(-width // columns), "num_warps": warps}


def _kept(keep_sum: bool, affine: bool) -> int:
    """What the backward pass reads, of a norm with or without mean or bias."""
    return (SUM if keep_sum else NORMAL if affine else OUTPUT).value


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm` on a GPU."""
    found = forward_norm(x, None, weight, None, eps, x.dtype, False)
    return found.y, found.scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm_backward` on a GPU."""
    grad_x, _, grad_weight, _ = backward_norm(grad, None, x, weight, False, scale, scale, x.dtype, x.dtype, False)
    return grad_x, grad_weight


def forward_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype,
    centre: bool, keep_sum: bool = True,
) -> Normed:  # fmt: skip
    """Kernel of `milonga::norm`. What is absent comes back empty."""
    width = weight.numel()
    count = x.numel() // width if width else 0
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    sums = x.new_empty(0)
    if residual is not None:
        sums = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    kept = _kept(keep_sum, centre or bias is not None)
    normal = torch.empty(x.shape if kept == NORMAL.value else (0,), dtype=dtype, device=x.device)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    mean = torch.empty(count if centre else 0, dtype=torch.float32, device=x.device)
    if count:
        x, x_step = rows(x, width)
        other, other_step = (x, x_step) if residual is None else rows(residual, width)
        tile = _tile(count, width)
        with torch.cuda.device_of(x):
            _forward[(-(-count // tile["ROWS"]),)](
                x, other, weight.contiguous(), dense(bias, weight), y, sums, normal, mean, scale,
                count, width, x_step, other_step, eps, ADD=residual is not None, CENTRE=centre, BIAS=bias is not None,
                KEPT=kept, **tile,
            )  # fmt: skip
    return Normed(y, sums, normal, mean, scale)


def affine(normal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`normal * weight + bias` over the last dimension, in the dtype of `normal`."""
    y = torch.empty(normal.shape, dtype=normal.dtype, device=normal.device)
    normal, weight, bias = normal.contiguous(), weight.contiguous(), bias.contiguous()
    count = normal.numel()
    if count:
        with torch.cuda.device_of(normal):
            _affine[(-(-count // 1024),)](normal, weight, bias, y, count, weight.numel(), CH=1024, num_warps=4)
    return y


def backward_norm(
    grad: Tensor, grad_total: Tensor | None, kept: Tensor, weight: Tensor, biased: bool, mean: Tensor, scale: Tensor,
    wide: torch.dtype, narrow_dtype: torch.dtype, centre: bool, kept_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernel of `milonga::norm_backward`: -> gradients of the sum in `wide` and, where that is another, in
    `narrow_dtype`; of weight and of bias. Empty where absent. `kept` is what the backward pass reads."""
    width, count = weight.numel(), scale.numel()
    grad_x = torch.empty(kept.shape, dtype=wide, device=kept.device)
    narrow = torch.empty(kept.shape if narrow_dtype != wide else (0,), dtype=narrow_dtype, device=kept.device)
    if count == 0:
        return grad_x, narrow, torch.zeros_like(weight), torch.zeros_like(weight[: width * biased])
    tile = _tile(count, width)
    length = -(-count * tile["num_warps"] // _WARPS // tile["ROWS"]) * tile["ROWS"]
    programs = -(-count // length)
    partial = torch.empty((programs, width * (1 + biased)), dtype=torch.float32, device=kept.device)
    (grad, grad_step), (kept, step) = rows(grad, width), rows(kept, width)
    more, more_step = (grad, grad_step) if grad_total is None else rows(grad_total, width)
    with torch.cuda.device_of(grad):
        _backward[(programs,)](
            grad, more, kept, weight.contiguous(), mean, scale, grad_x, narrow, partial, count, width,
            length, grad_step, more_step, step, ADD=grad_total is not None, CENTRE=centre, BIAS=biased,
            NARROW=narrow.numel() > 0, KEPT=_kept(kept_sum, centre or biased), **tile,
        )  # fmt: skip
    return grad_x, narrow, *sum_rows(partial, width)
