"""`swiglu` on a GPU: a program is a tile of rows and neighbouring columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.gpu.triton_parts import power_of_two, rows, sigmoid

# Elements of a tile and its widest row.
_TILE, _WIDEST = 4096, 1024


@triton.jit
def _places(count, width, ROWS: tl.constexpr, CH: tl.constexpr):
    """-> (rows `[ROWS 1]` int64, columns `[1 CH]`, which exist)."""
    blocks = tl.cdiv(width, CH)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * CH + tl.arange(0, CH)[None, :]
    return row, column, (row < count) & (column < width)


@triton.jit(do_not_specialize=["count"])
def _forward(gate, up, y, count, width, gate_step, up_step, ROWS: tl.constexpr, CH: tl.constexpr):
    row, column, live = _places(count, width, ROWS, CH)
    g = tl.load(gate + row * gate_step + column, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, g * sigmoid(g) * u, mask=live)


@triton.jit(do_not_specialize=["count"])
def _backward(
    grad, gate, up, grad_gate, grad_up, count, width, grad_step, gate_step, up_step, out_step,
    ROWS: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    row, column, live = _places(count, width, ROWS, CH)
    d = tl.load(grad + row * grad_step + column, mask=live, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_step + column, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + column, mask=live, other=0.0).to(tl.float32)
    s = sigmoid(g)
    out = row * out_step + column
    tl.store(grad_gate + out, d * u * s * tl.fma(g, 1.0 - s, 1.0), mask=live)
    tl.store(grad_up + out, d * g * s, mask=live)


def _tiles(count: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile."""
    columns = min(power_of_two(width), _WIDEST)
    tall = min(_TILE // columns, power_of_two(count))
    grid = (-(-count // tall) * -(-width // columns),)
    return grid, {"ROWS": tall, "CH": columns, "num_warps": 4 if tall * columns >= 1024 else 1}


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Kernel of `milonga::swiglu` on a GPU."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    width = gate.shape[-1]
    count = y.numel() // width
    (gate, gate_step), (up, up_step) = rows(gate, width), rows(up, width)
    grid, tile = _tiles(count, width)
    with torch.cuda.device_of(gate):
        _forward[grid](gate, up, y, count, width, gate_step, up_step, **tile)
    return y


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::swiglu_backward` on a GPU."""
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if grad_gate.numel():
        _launch_backward(grad, gate, up, grad_gate, grad_up, gate.shape[-1])
    return grad_gate, grad_up


def _launch_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, out_step: int) -> None:
    """Both gradients have rows `out_step` apart."""
    width = gate.shape[-1]
    count = gate.numel() // width
    (grad, grad_step), (gate, gate_step), (up, up_step) = (rows(value, width) for value in (grad, gate, up))
    grid, tile = _tiles(count, width)
    with torch.cuda.device_of(gate):
        _backward[grid](
            grad, gate, up, grad_gate, grad_up, count, width, grad_step, gate_step, up_step, out_step, **tile
        )


def forward_fused(both: Tensor) -> Tensor:
    """Kernel of `milonga::swiglu_fused` on a GPU."""
    width = both.shape[-1] // 2
    return forward(both[..., :width], both[..., width:])


def backward_fused(grad: Tensor, both: Tensor) -> Tensor:
    """Kernel of `milonga::swiglu_fused_backward` on a GPU: both gradients side by side."""
    out = torch.empty(both.shape, dtype=both.dtype, device=both.device)
    width = both.shape[-1] // 2
    if out.numel():
        halves = (both[..., :width], both[..., width:], out[..., :width], out[..., width:])
        _launch_backward(grad, *halves, 2 * width)
    return out
