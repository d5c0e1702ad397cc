"""Parts of Triton paths: views of rows, chunks of time of one sequence, a sigmoid, sums over programs."""

from functools import cache
from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from milonga.ops.cpu_arrays import row_stride

LOG2_E = tl.constexpr(1.4426950408889634)
# Whether this Triton's Gluon has what the kernels in it need; without, their twins in Triton run.
GLUON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


@cache
def _capable(device: int) -> bool:
    """Matrix units for bfloat16 and tf32, and shared memory for two programs."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and (
        torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 150 * 2**10
    )


def runs_gluon(x: Tensor) -> bool:
    """Whether the kernels in Gluon run where x is: on an Ampere or later data-centre GPU."""
    return GLUON and x.is_cuda and _capable(x.device.index)


@overload
def rows(tensor: Tensor, width: int) -> tuple[Tensor, int]: ...


@overload
def rows(tensor: Tensor | None, width: int) -> tuple[Tensor | None, int]: ...


def rows(tensor: Tensor | None, width: int) -> tuple[Tensor | None, int]:
    """`[..., width]` with evenly spaced rows, and the distance between them; no copy where it is so already."""
    if tensor is None or tensor.is_contiguous():
        return tensor, width
    stride = row_stride(tensor)
    return (tensor.contiguous(), width) if stride is None else (tensor, stride)


def dense(tensor: Tensor | None, other: Tensor) -> Tensor:
    """`tensor` in one piece of memory; where it is absent `other`, since a kernel takes some tensor in its place."""
    return other if tensor is None else tensor.contiguous()


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number` (1 for 0)."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)), within 1e-6 of its value for |v| < 10; 0 and 1 at the ends; NaN for NaN."""
    return 1.0 / (1.0 + tl.exp2(v * -LOG2_E))


@triton.jit
def chunk_of(slot, bounds, T, sequences, length, PACKED: tl.constexpr):
    """-> (sequence, chunk within it, its number of chunks, its first row, its rows); int64 but for the first three.

    A chunk is `length` rows of one sequence. Every sequence has one at least, an empty sequence too. Packed, the
    sequence s that starts at row r has the slots from r // length + s on, of which the last may have no rows.
    """
    if PACKED:
        low = slot * 0
        high = sequences
        while low + 1 < high:
            middle = (low + high) // 2
            if tl.load(bounds + middle) // length + middle <= slot:
                low = middle
            else:
                high = middle
        sequence = low
        origin = tl.load(bounds + sequence)
        total = tl.load(bounds + sequence + 1) - origin
        chunk = (slot - origin // length - sequence).to(tl.int32)
    else:
        each = tl.maximum((T + length - 1) // length, 1)
        sequence = slot // each
        chunk = slot % each
        origin = sequence.to(tl.int64) * T
        total = origin * 0 + T
    chunks = tl.maximum((total + length - 1) // length, 1).to(tl.int32)
    return sequence, chunk, chunks, origin, total


def slots_of(batch: int, time: int, sequences: int, packed: bool, length: int) -> int:
    """Slots that `chunk_of` numbers: enough for any packing of `batch * time` rows into `sequences`."""
    return time // length + sequences if packed else batch * max(-(-time // length), 1)


@triton.jit(do_not_specialize=["count"])
def _sum_rows(values, out, rest, count, width, first_width, ROWS: tl.constexpr, CH: tl.constexpr):
    column = tl.program_id(0) * CH + tl.arange(0, CH)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, CH], tl.float32)
    for first in range(0, count, ROWS):
        at = (first + row).to(tl.int64) * width + column
        total += tl.load(values + at, mask=(first + row < count) & (column < width), other=0.0)
    at = tl.program_id(0) * CH + tl.arange(0, CH)
    found = tl.sum(total, 0)
    tl.store(out + at, found, mask=at < first_width)
    tl.store(rest + at - first_width, found, mask=(at >= first_width) & (at < width))


def sum_rows(values: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The sum over the first dimension of a contiguous fp32 `[P, D]`, in a fixed order: one launch.

    -> (its first numbers, the others), each in memory of its own.
    """
    count, width = values.shape
    out, rest = (torch.empty(size, dtype=torch.float32, device=values.device) for size in (first, width - first))
    if width:
        tall = min(power_of_two(count), 512)
        columns = min(power_of_two(width), 8192 // tall)
        with torch.cuda.device_of(values):
            _sum_rows[(-(-width // columns),)](
                values, out, rest, count, width, first, ROWS=tall, CH=columns, num_warps=16
            )  # fmt: skip
    return out, rest
