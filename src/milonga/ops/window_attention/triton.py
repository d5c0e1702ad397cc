"""`window_attention` on a GPU: the choice of kernel and of blocks, and launches."""

from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.window_attention import triton_kernels

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30  # more than any piece has steps; sums with it stay within 31 bits
DOTS = 16  # rows of a program that takes the products of y and its gradient


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, and stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Blocks of the three kernels for one width of heads."""

    forward: Blocks
    keys: Blocks
    queries: Blocks


# Fixed rather than tuned where it runs, so that results do not depend on the GPU; measured on an H100.
HALF = {
    16: Tuning(Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    64: Tuning(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    128: Tuning(Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3)),
    256: Tuning(Blocks(64, 32, 4, 2), Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 2)),
}
SINGLE = {
    16: Tuning(Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    128: Tuning(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    256: Tuning(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def tuning(dtype: torch.dtype, width: int) -> Tuning:
    """The blocks for heads whose wider padded width is `width`."""
    table = SINGLE if dtype == torch.float32 else HALF
    return table[min((size for size in table if size >= width), default=max(table))]


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _steps_first(tensor: Tensor | None) -> Tensor | None:
    """The same with the width contiguous, as the kernels read it."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


class _Plan:
    """What the launches of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        position: Tensor | None,
        offsets: Tensor | None,
        window: int | None,
        scale: float,
    ) -> None:
        self.batch, self.time, self.heads, width = q.shape
        self.groups, value_width = v.shape[2:]
        self.sequences = self.batch if offsets is None else offsets.numel() - 1
        self.slots = 0 if past_k is None else past_k.shape[1]
        self.past = self.slots > 0 and self.sequences > 0
        self.packed = offsets is not None
        # the kernels' running maximum takes scores before their factor, so that must be positive
        self.sign = -1.0 if scale < 0 else 1.0
        self.scale = abs(scale)
        q = q if scale >= 0 else -q
        self.q, self.k, self.v, past_k, past_v = (_steps_first(t) for t in (q, k, v, past_k, past_v))
        self.past_k, self.past_v = (past_k, past_v) if self.past else (self.k, self.v)
        self.position = self.k if position is None or not self.past else position
        self.bounds = self.k if offsets is None else offsets
        self.window = NO_WINDOW if window is None else min(window, NO_WINDOW)
        self.sizes = {
            "K": _padded(width), "V": _padded(value_width), "WK": width, "WV": value_width,
            "GROUP": self.heads // max(self.groups, 1), "PACKED": self.packed,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        self.tuning = tuning(q.dtype, max(self.sizes["K"], self.sizes["V"]))
        self.empty = q.numel() == 0 or v.numel() == 0

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        return tuple(step for tensor in tensors for step in _strides(tensor))

    def grid(self, steps: int, heads: int) -> tuple[int, int, int]:
        """Programs of `steps` steps and a head each; where sequences are packed, each may have one that is empty."""
        blocks = self.time // steps + self.sequences if self.packed else -(-self.time // steps)
        return blocks, heads, 1 if self.packed else self.batch


def _launch(blocks: Blocks) -> dict[str, int]:
    return {"BM": blocks.queries, "BN": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::window_attention` on a GPU; the first half of what it returns second is `[B H T]`."""
    plan = _Plan(q, k, v, past_k, past_v, position, offsets, window, scale)
    y = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    stats = torch.empty(2, *q.shape[:3], dtype=torch.float32, device=q.device)
    if plan.empty:
        return y, stats
    with torch.cuda.device_of(q):
        triton_kernels.attention_forward[plan.grid(plan.tuning.forward.queries, plan.heads)](
            plan.q, plan.k, plan.v, plan.past_k, plan.past_v, plan.position, plan.bounds, y, stats,
            plan.time, plan.sequences, plan.window, plan.scale * LOG2_E, plan.slots, plan.heads,
            *plan.strides(plan.q, plan.k, plan.v, plan.past_k, plan.past_v),
            **plan.sizes, PAST=plan.past, **_launch(plan.tuning.forward),
        )  # fmt: skip
    return y, stats


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    position: Tensor | None,
    offsets: Tensor | None,
    window: int | None,
    scale: float,
    y: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `milonga::window_attention_backward` on a GPU: as on the CPU."""
    plan = _Plan(q, k, v, past_k, past_v, position, offsets, window, scale)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    for own, past in ((k, past_k), (v, past_v)):
        shape = (0, 0, *own.shape[2:]) if past is None else past.shape
        grads.append(torch.zeros(shape, dtype=own.dtype, device=own.device))
    if plan.empty:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), grads[3], grads[4]
    with torch.cuda.device_of(q):
        _launch_backward(plan, _steps_first(grad), y, stats, grads)
    grad_q = grads[0] if plan.sign > 0 else -grads[0]
    return grad_q, grads[1], grads[2], grads[3], grads[4]


def _launch_backward(plan: _Plan, grad: Tensor, y: Tensor, stats: Tensor, grads: list[Tensor]) -> None:
    rows = plan.batch * plan.time * plan.heads
    dots = torch.empty(rows, dtype=torch.float32, device=y.device)
    triton_kernels.attention_dots[(-(-rows // DOTS),)](
        y, grad, dots, plan.time, plan.heads, rows, *plan.strides(grad),
        V=plan.sizes["V"], WV=plan.sizes["WV"], R=DOTS, num_warps=4,
    )  # fmt: skip
    shared = (plan.time, plan.sequences, plan.window, plan.scale * LOG2_E, plan.scale, plan.slots, plan.heads)
    blocks = plan.tuning.keys
    launches = [(plan.k, plan.v, *grads[1:3], plan.grid(blocks.keys, plan.groups), False)]
    if plan.past:
        programs = (-(-plan.slots // blocks.keys), plan.groups, plan.sequences)
        launches.append((plan.past_k, plan.past_v, *grads[3:5], programs, True))
    for k, v, grad_k, grad_v, programs, ring in launches:
        triton_kernels.attention_backward_keys[programs](
            plan.q, k, v, plan.position, plan.bounds, grad, stats, dots, grad_k, grad_v, *shared,
            *plan.strides(plan.q, k, v, grad), **plan.sizes, RING=ring, **_launch(blocks),
        )  # fmt: skip
    triton_kernels.attention_backward_queries[plan.grid(plan.tuning.queries.queries, plan.heads)](
        plan.q, plan.k, plan.v, plan.past_k, plan.past_v, plan.position, plan.bounds, grad, stats, dots, grads[0],
        *shared, *plan.strides(plan.q, plan.k, plan.v, plan.past_k, plan.past_v, grad),
        **plan.sizes, PAST=plan.past, **_launch(plan.tuning.queries),
    )  # fmt: skip
