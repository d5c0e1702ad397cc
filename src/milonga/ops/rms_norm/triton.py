"""`rms_norm` on a GPU, with or without a residual added first: a program is a tile of whole rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.gpu.triton_parts import power_of_two, rows

# Programs of the backward pass: each leaves a row of sums for the weight's gradient. Fixed, so that results do not
# depend on the GPU.
_PROGRAMS = 1024


@triton.jit(do_not_specialize=["count"])
def _forward(
    x, residual, weight, y, total, scale, count, width, x_step, residual_step, eps,
    ROWS: tl.constexpr, CH: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """With ADD, x + residual, rounded, goes to `total` and is what is normalised."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CH)[None, :]
    values = ()
    for part in tl.static_range(PARTS):
        at = column + part * CH
        live = (row < count) & (at < width)
        value = tl.load(x + row * x_step + at, mask=live, other=0.0)
        if ADD:
            other = tl.load(residual + row * residual_step + at, mask=live, other=0.0)
            value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        values = values + (value,)
    squares = tl.zeros([ROWS, CH], tl.float32)
    for part in tl.static_range(PARTS):
        if ADD:
            at = column + part * CH
            tl.store(total + row * width + at, values[part], mask=(row < count) & (at < width))
        value = values[part].to(tl.float32)
        squares = tl.fma(value, value, squares)
    factor = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / width + eps)
    tl.store(scale + row, factor, mask=row < count)
    for part in tl.static_range(PARTS):
        at = column + part * CH
        w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        out = values[part].to(tl.float32) * factor * w
        tl.store(y + row * width + at, out, mask=(row < count) & (at < width))


@triton.jit(do_not_specialize=["count", "length"])
def _backward(
    grad, grad_total, x, weight, scale, grad_x, partial, count, width, length, grad_step, total_step, x_step,
    ROWS: tl.constexpr, CH: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """`length` rows, `ROWS` at a turn. With ADD, `grad_total` is added to the gradient of x."""
    column = tl.arange(0, CH)[None, :]
    first = tl.program_id(0).to(tl.int64) * length
    end = tl.minimum(first + length, count)
    weights = ()
    sums = ()
    for part in tl.static_range(PARTS):
        at = column + part * CH
        weights = weights + (tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros([ROWS, CH], tl.float32),)
    for turn in range((length + ROWS - 1) // ROWS):
        row = first + turn * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < end
        values = ()
        upstream = ()
        for part in tl.static_range(PARTS):
            at = column + part * CH
            live = inside & (at < width)
            values = values + (tl.load(x + row * x_step + at, mask=live, other=0.0),)
            upstream = upstream + (tl.load(grad + row * grad_step + at, mask=live, other=0.0),)
        more = ()
        if ADD:
            for part in tl.static_range(PARTS):
                at = column + part * CH
                live = inside & (at < width)
                more = more + (tl.load(grad_total + row * total_step + at, mask=live, other=0.0),)
        factor = tl.load(scale + row, mask=inside, other=0.0)
        products = tl.zeros([ROWS, CH], tl.float32)
        grown = ()
        for part in tl.static_range(PARTS):
            value = values[part].to(tl.float32)
            g = upstream[part].to(tl.float32)
            products = tl.fma(g * weights[part], value, products)
            grown = grown + (tl.fma(g * factor, value, sums[part]),)
        sums = grown
        shift = tl.sum(products, 1)[:, None] * factor * factor * factor / width
        for part in tl.static_range(PARTS):
            at = column + part * CH
            out = upstream[part].to(tl.float32) * weights[part] * factor - values[part].to(tl.float32) * shift
            if ADD:
                out += more[part].to(tl.float32)
            tl.store(grad_x + row * width + at, out, mask=inside & (at < width))
    for part in tl.static_range(PARTS):
        at = part * CH + tl.arange(0, CH)
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + at, tl.sum(sums[part], 0), mask=at < width)


def _tile(count: int, width: int) -> dict[str, int]:
    """Rows and columns of a tile: wide rows in parts, so that few lanes are idle; several narrow rows together."""
    warps = 1 if width <= 256 else 2 if width <= 1024 else 4 if width <= 4096 else 8 if width <= 16384 else 16
    columns = min(power_of_two(width), 128 * warps if width > 256 else 256)
    tall = min(256 // columns, power_of_two(count)) if columns < 256 else 1
    return {"ROWS": tall, "CH": columns, "PARTS": -(-width // columns), "num_warps": warps}


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm` on a GPU."""
    y, _, scale = _launch_forward(x, None, weight, eps)
    return y, scale


def forward_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `milonga::rms_norm_add` on a GPU."""
    return _launch_forward(x, residual, weight, eps)


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> (y, x + residual or y, scale)."""
    width = weight.numel()
    count = x.numel() // width if width else 0
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        x, x_step = rows(x, width)
        other, other_step = (x, x_step) if residual is None else rows(residual, width)
        tile = _tile(count, width)
        with torch.cuda.device_of(x):
            _forward[(-(-count // tile["ROWS"]),)](
                x, other, weight.contiguous(), y, total, scale, count, width, x_step, other_step, eps,
                ADD=residual is not None, **tile,
            )  # fmt: skip
    return y, total, scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm_backward` on a GPU."""
    return backward_add(grad, None, x, weight, scale)


def backward_add(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::rms_norm_add_backward` on a GPU: (gradient of x and of residual, gradient of weight)."""
    width, count = weight.numel(), scale.numel()
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if count == 0:
        return grad_x, torch.zeros_like(weight)
    tile = _tile(count, width)
    length = -(-count // _PROGRAMS // tile["ROWS"]) * tile["ROWS"]
    programs = -(-count // length)
    partial = torch.empty((programs, width), dtype=torch.float32, device=total.device)
    (grad, grad_step), (total, step) = rows(grad, width), rows(total, width)
    more, more_step = (grad, grad_step) if grad_total is None else rows(grad_total, width)
    with torch.cuda.device_of(grad):
        _backward[(programs,)](
            grad, more, total, weight.contiguous(), scale, grad_x, partial, count, width, length,
            grad_step, more_step, step, ADD=grad_total is not None, **tile,
        )  # fmt: skip
    # fixed order: PyTorch's sum over the first dimension of a contiguous tensor uses no atomics
    return grad_x, partial.sum(0)
