"""`window_attention` on a GPU: the choice of kernel and of blocks, and launches.

Three ways, chosen in `_way` and measured in docs/performance.md: few steps after a past are decoded (`triton_decode`),
causal attention over everything in half precision goes forward in cuDNN where the GPU is a Hopper or later (and
backward too if the order of sums may vary), and all else, windows, packed sequences, rings and fp32 among it, takes the
kernels of `triton_kernels`.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from milonga.ops.gpu.triton_parts import dense
from milonga.ops.window_attention import triton_decode, triton_kernels

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30  # more than any piece has steps; sums with it stay within 31 bits
DECODED = 16  # most steps of a piece that is decoded
DECODED_ROWS = 128  # most pairs of a step and a head that a decoding program has
SPLITS = 64  # most programs that share the keys of a decoded row
SHORTEST_SPLIT = 128
LIBRARY_STEPS = 512  # fewest steps for which the library is asked


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
    128: Tuning(Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(128, 64, 8, 3)),
    256: Tuning(Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 2)),
}
# The same where a Hopper's copy engine reads the blocks of the backward pass (`_described`): no addresses are kept, and
# smaller blocks leave registers and shared memory for a second program on the multiprocessor.
DESCRIBED = {**HALF, 128: HALF[128]._replace(keys=Blocks(64, 64, 4, 2), queries=Blocks(64, 64, 4, 2))}
SINGLE = {
    16: Tuning(Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    128: Tuning(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    256: Tuning(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def tuning(dtype: torch.dtype, width: int, described: bool = False) -> Tuning:
    """The blocks for heads whose wider padded width is `width`; `described`: where tensor descriptors are read."""
    table = SINGLE if dtype == torch.float32 else DESCRIBED if described else HALF
    return table[min((size for size in table if size >= width), default=max(table))]


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _steps_first(tensor: Tensor) -> Tensor:
    """The same with the width contiguous, as the kernels read it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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
        self.negative = scale < 0
        self.scale = abs(scale)
        q = self.signed(q)
        self.q, self.k, self.v = _steps_first(q), _steps_first(k), _steps_first(v)
        # what is absent needs some tensor in its place
        self.past_k = self.k if past_k is None else _steps_first(past_k)
        self.past_v = self.v if past_v is None else _steps_first(past_v)
        self.position = dense(position if self.past else None, self.k)
        self.bounds = self.k if offsets is None else offsets
        self.window = NO_WINDOW if window is None else min(window, NO_WINDOW)
        self.sizes = {
            "K": _padded(width), "V": _padded(value_width), "WK": width, "WV": value_width,
            "GROUP": self.heads // max(self.groups, 1), "PACKED": self.packed,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        }  # fmt: skip
        widest = max(self.sizes["K"], self.sizes["V"])
        self.tuning, self.described_tuning = tuning(q.dtype, widest), tuning(q.dtype, widest, described=True)
        self.empty = q.numel() == 0 or v.numel() == 0

    def signed(self, queries: Tensor) -> Tensor:
        """The queries that go with the positive scale, or from their gradient that of the ones given."""
        return -queries if self.negative else queries

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        return tuple(step for tensor in tensors for step in tensor.stride()[:3])

    def grid(self, steps: int, heads: int) -> tuple[int, int, int]:
        """Programs of `steps` steps and a head each; where sequences are packed, each may have one that is empty."""
        blocks = self.time // steps + self.sequences if self.packed else -(-self.time // steps)
        return blocks, heads, 1 if self.packed else self.batch

    def query_launches(self, steps: int) -> list[tuple[tuple[int, int, int], int, int, bool]]:
        """Launches that take all queries in blocks of `steps`: (grid, first step, end, whether the past is seen).

        From the step `window - 1` of a sequence on no query sees the past. A kernel that never looks there takes those:
        looking costs registers even where nothing is found.
        """
        blocks, heads, batch = self.grid(steps, self.heads)
        seeing = min(-(-(self.window - 1) // steps), -(-self.time // steps)) if self.past else 0
        ranges = [(0, seeing, True), (seeing, -(-self.time // steps), False)]
        return [
            ((blocks if self.packed else end - first, heads, batch), first * steps, end * steps, past)
            for first, end, past in ranges
            if first < end
        ]


@cache
def _has_library(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()


def _way(plan: _Plan, window: int | None) -> Literal["decode", "library", "own"]:
    """Which kernels run. They differ in rounding, and the library's backward pass promises no fixed order of sums."""
    q, v = plan.q, plan.v
    # wide heads in fp32 leave shared memory for half of the rows
    rows = DECODED_ROWS // (2 if q.dtype == torch.float32 and max(plan.sizes["K"], plan.sizes["V"]) > 128 else 1)
    if plan.past and not plan.packed and plan.time <= DECODED and plan.time * plan.sizes["GROUP"] <= rows:
        return "decode"
    half, square = q.dtype in (torch.bfloat16, torch.float16), q.shape[3] == v.shape[3]
    fits = half and square and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    plain = not plan.packed and not plan.past and (window is None or window >= plan.time)
    if fits and plain and plan.time >= LIBRARY_STEPS and q.device.type == "cuda" and _has_library(q.device):
        return "library"
    return "own"


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
    way = _way(plan, window)
    if way == "library":
        return _library_forward(plan, stats)
    with torch.cuda.device_of(q):
        if way == "decode":
            _decode(plan, y, stats)
            return y, stats
        for programs, low, high, past in plan.query_launches(plan.tuning.forward.queries):
            triton_kernels.attention_forward[programs](
                plan.q, plan.k, plan.v, plan.past_k, plan.past_v, plan.position, plan.bounds, y, stats,
                plan.time, plan.sequences, plan.window, plan.scale * LOG2_E, plan.slots, plan.heads, low, high,
                *plan.strides(plan.q, plan.k, plan.v, plan.past_k, plan.past_v),
                **plan.sizes, PAST=past, ALL=past and window is None, **_launch(plan.tuning.forward),
            )  # fmt: skip
    return y, stats


def _decode(plan: _Plan, y: Tensor, stats: Tensor) -> None:
    sizes = {name: value for name, value in plan.sizes.items() if name != "PACKED"}
    length = max(SHORTEST_SPLIT, -(-plan.slots // (SPLITS * SHORTEST_SPLIT)) * SHORTEST_SPLIT)
    splits = -(-plan.slots // length)
    rows = _padded(plan.time * sizes["GROUP"])
    programs = (plan.groups, splits, plan.sequences)
    parts = torch.empty(*programs, rows, sizes["V"], dtype=torch.float32, device=y.device)
    logs = torch.empty(*programs, rows, dtype=torch.float32, device=y.device)
    single, large = plan.q.dtype == torch.float32, max(sizes["K"], sizes["V"]) > 128
    triton_decode.decode_splits[programs](
        plan.q, plan.k, plan.v, plan.past_k, plan.past_v, plan.position, parts, logs,
        plan.window, plan.scale * LOG2_E, plan.slots, length, splits, plan.heads,
        *plan.strides(plan.q, plan.k, plan.v, plan.past_k, plan.past_v),
        **sizes, T=plan.time, R=rows, BN=32 if single or large else 64, num_warps=4,
        num_stages=1 if single and large else 3,
    )  # fmt: skip
    triton_decode.decode_sum[(plan.heads, plan.time, plan.sequences)](
        parts, logs, y, stats, splits, plan.heads, V=sizes["V"], WV=sizes["WV"], GROUP=sizes["GROUP"],
        T=plan.time, R=rows, SPLITS=_padded(splits), num_warps=4,
    )  # fmt: skip


def _library_forward(plan: _Plan, stats: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's attention. Statistics: natural logarithms of the sums in the second half, in base 2 in the first."""
    q, k, v = (t.transpose(1, 2) for t in (plan.q, plan.k, plan.v))
    y, logs, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=plan.scale
    )
    both = stats.view(2, plan.batch, plan.heads, plan.time, 1)
    both[1].copy_(logs)
    torch.mul(logs, LOG2_E, out=both[0])
    return y.transpose(1, 2).contiguous(), stats


def _library_backward(plan: _Plan, grad: Tensor, y: Tensor, stats: Tensor) -> list[Tensor]:
    q, k, v, grad, y = (t.transpose(1, 2) for t in (plan.q, plan.k, plan.v, grad, y))
    logs = stats.view(2, plan.batch, plan.heads, plan.time, 1)[1]
    seed = torch.zeros((), dtype=torch.int64, device=y.device)  # of a dropout that there is not
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, y, logs, seed, seed, None, None, None, plan.time, plan.time, 0.0, True, scale=plan.scale
    )
    return [gradient.transpose(1, 2).contiguous() for gradient in gradients]


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
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `milonga::window_attention_backward` on a GPU: as on the CPU."""
    plan = _Plan(q, k, v, past_k, past_v, position, offsets, window, scale)
    grads: list[Tensor]
    past_grads = [
        own.new_zeros(0, 0, *own.shape[2:]) if past is None else torch.zeros_like(past).contiguous()
        for own, past in ((k, past_k), (v, past_v))
    ]
    if not plan.empty and _way(plan, window) == "library" and not deterministic:
        grads = _library_backward(plan, _steps_first(grad), y, stats)
        return plan.signed(grads[0]), grads[1], grads[2], past_grads[0], past_grads[1]
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if plan.empty:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), past_grads[0], past_grads[1]
    with torch.cuda.device_of(q):
        _launch_backward(plan, _steps_first(grad), y, stats, [*grads, *past_grads])
    return plan.signed(grads[0]), grads[1], grads[2], past_grads[0], past_grads[1]


def _launch_backward(plan: _Plan, grad: Tensor, y: Tensor, stats: Tensor, grads: list[Tensor]) -> None:
    dots = torch.empty(plan.batch, plan.heads, plan.time, dtype=torch.float32, device=y.device)
    shared = (plan.time, plan.sequences, plan.window, plan.scale * LOG2_E, plan.scale, plan.slots, plan.heads)
    # blocks for descriptors spill in a launch that sees the past, which takes addresses
    wished = (plan.tuning if plan.past else plan.described_tuning).queries
    described = _described(plan, plan.k, plan.v, wished.keys)
    blocks = plan.tuning.queries if described is None else wished
    # first, as it leaves what the other kernel reads in `dots`
    for programs, low, high, past in plan.query_launches(blocks.queries):
        k, v = (plan.k, plan.v) if past or described is None else described
        triton_kernels.attention_backward_queries[programs](
            plan.q, k, v, plan.past_k, plan.past_v, plan.position, plan.bounds, y, grad, stats, dots, grads[0],
            *shared, low, high, *plan.strides(plan.q, plan.k, plan.v, plan.past_k, plan.past_v, grad),
            **plan.sizes, PAST=past, TMA=described is not None and not past, **_launch(blocks),
        )  # fmt: skip
    described = _described(plan, plan.q, grad, plan.described_tuning.keys.queries)
    blocks = (plan.tuning if described is None else plan.described_tuning).keys
    launches = [(plan.k, plan.v, *grads[1:3], plan.grid(blocks.keys, plan.groups), False)]
    if plan.past:
        programs = (-(-plan.slots // blocks.keys), plan.groups, plan.sequences)
        launches.append((plan.past_k, plan.past_v, *grads[3:5], programs, True))
    q, upstream = described or (plan.q, grad)
    for k, v, grad_k, grad_v, programs, ring in launches:
        triton_kernels.attention_backward_keys[programs](
            q, k, v, plan.position, plan.bounds, upstream, stats, dots, grad_k, grad_v, *shared,
            *plan.strides(plan.q, k, v, grad), **plan.sizes, RING=ring, TMA=described is not None, **_launch(blocks),
        )  # fmt: skip


def _described(plan: _Plan, keys: Tensor, values: Tensor, steps: int) -> list[TensorDescriptor] | None:
    """Two tensors as a Hopper's copy engine reads them, in blocks of `steps`; None where it cannot.

    `keys` are as wide as k (so is q), `values` as v (so is the upstream gradient).

    No block may reach into the next row of the batch: zero times a NaN from there is NaN.
    """
    whole = plan.batch == 1 or plan.time % steps == 0
    if plan.packed or plan.q.dtype == torch.float32 or not whole or plan.batch * plan.time >= 1 << 31:
        return None
    if plan.q.device.type == "cuda" and torch.cuda.get_device_capability(plan.q.device) < (9, 0):
        return None
    found = []
    for tensor, padded in ((keys, plan.sizes["K"]), (values, plan.sizes["V"])):
        _, time, heads, width = tensor.shape
        row, step, head, _ = tensor.stride()
        joined = width == padded <= 256 and head == width and (row == time * step or plan.batch == 1)
        # steps that share memory are no rows of a matrix, as of a gradient that is the same for all of them
        if not joined or step < heads * width or tensor.data_ptr() % 16 or step * tensor.element_size() % 16:
            return None
        shape = [plan.batch * time, heads * width]
        found.append(TensorDescriptor(tensor, shape, [step, 1], [steps, width]))
    return found
