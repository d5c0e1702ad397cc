"""`selective_scan` on the CPU: tensors to arrays, the choice of blocks, and sums over jobs in a fixed order."""

import torch
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows
from milonga.ops.selective_scan.checkpoints import CHUNK, checkpoint_shape, first_checkpoints
from milonga.ops.selective_scan.cpu_kernels import LANES, scan, scan_backward
from milonga.segments import sequence_bounds

# Channels a job: wide enough to keep rows of memory together, narrow enough for this many jobs.
BLOCKS = (128, 64, 32)
JOBS = 8
# Parts into which sums over channels, and over sequences, are cut in the backward pass. They bound its memory (each
# part of dB and dC is `[B T N]`) and the threads it can use. Fixed, so that results do not depend on the thread count.
PARTS = 16
# The pool's estimate of work: two states of an element cost the forward pass about one elementary operation.
_WORK, _WORK_BACKWARD = 0.5, 2


def _block(sequences: int, width: int) -> int:
    for block in BLOCKS[:-1]:
        if sequences * -(-width // block) >= JOBS:
            return block
    return BLOCKS[-1]


def _bounds(x: Tensor, offsets: Tensor | None) -> Tensor:
    return sequence_bounds(x.shape[0], x.shape[1], None) if offsets is None else offsets


def _total(parts: Tensor) -> Tensor:
    """Sum over the first dimension, one part after the other."""
    if parts.shape[0] == 0:
        return parts.new_zeros(parts.shape[1:])
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `milonga::selective_scan` on the CPU."""
    bounds = _bounds(x, offsets)
    width, states = A.shape
    sequences = bounds.numel() - 1
    y = torch.empty(x.shape, dtype=torch.float32)
    final = torch.empty((sequences, width, states), dtype=torch.float32)
    kept = torch.empty(checkpoint_shape(x.shape[0] * x.shape[1], sequences, width, states, save), dtype=torch.float32)
    block = _block(sequences, width)
    inputs = (*rows(x, width), *rows(dt, width), *rows(z, width), *rows(B, states), *rows(C, states))
    inputs += (flat(A), flat(D), flat(dt_bias), flat(initial), bounds.numpy())
    sizes = (width, states, block, CHUNK, kept.shape[1])
    jobs = sequences * -(-width // block)
    cpu_pool.run(scan, jobs, int(x.numel() * states * _WORK), *inputs, *sizes, flat(y), flat(final), flat(kept))
    return y.to(x.dtype), final, kept


def backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: bool,
    offsets: Tensor | None,
    kept: Tensor,
    gated: bool = False,
) -> tuple[Tensor, ...]:
    """Kernel of `milonga::selective_scan_backward` on the CPU: gradients of x, dt, A, B, C, D, z, dt_bias, initial; y.

    That of an absent argument is an empty tensor, and so is y without `gated`; else the forward pass is run again.
    """
    bounds = _bounds(x, offsets)
    width, states = A.shape
    sequences = bounds.numel() - 1
    block = _block(sequences, width)
    groups = min(-(-width // block), PARTS)
    spans = max(1, min(sequences, -(-PARTS // max(groups, 1))))
    grad_x, grad_dt = (torch.empty(x.shape, dtype=torch.float32) for _ in range(2))
    grad_z = torch.empty(x.shape if z is not None else (0,), dtype=torch.float32)
    grad_B, grad_C = (torch.empty((groups, *B.shape), dtype=torch.float32) for _ in range(2))
    grad_A = torch.empty((spans, width, states), dtype=torch.float32)
    grad_D, grad_bias = (torch.empty((spans, width), dtype=torch.float32) for _ in range(2))
    grad_initial = torch.empty((sequences, width, states) if initial else (0,), dtype=torch.float32)
    upstream = torch.zeros(x.shape, dtype=torch.float32) if grad_y is None else grad_y
    inputs = (*rows(upstream, width), flat(grad_final), *rows(x, width), *rows(dt, width), *rows(z, width))
    inputs += (*rows(B, states), *rows(C, states), flat(A), flat(D), flat(dt_bias), bounds.numpy(), flat(kept))
    sizes = (width, states, block, CHUNK, kept.shape[1], groups, spans)
    outputs = (grad_x, grad_dt, grad_z, grad_B, grad_C, grad_A, grad_D, grad_bias, grad_initial)
    work = x.numel() * states * _WORK_BACKWARD
    cpu_pool.run(scan_backward, groups * spans, work, *inputs, *sizes, *map(flat, outputs))
    return (
        grad_x.to(x.dtype),
        grad_dt.to(x.dtype),
        _total(grad_A),
        _total(grad_B).to(x.dtype),
        _total(grad_C).to(x.dtype),
        grad_x.new_empty(0) if D is None else _total(grad_D),
        grad_z.to(x.dtype),
        grad_x.new_empty(0) if dt_bias is None else _total(grad_bias),
        grad_initial,
        _forward_again(x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept) if gated else x.new_empty(0),
    )


def _forward_again(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: bool,
    offsets: Tensor | None,
    kept: Tensor,
) -> Tensor:
    """y; what sequences started from is found among the checkpoints, where a vector of channels lies together."""
    start = None
    if initial:
        width, states = A.shape
        tiles = first_checkpoints(kept, x.shape[0], x.shape[1], offsets).unflatten(1, (-1, states, LANES))
        start = tiles.transpose(2, 3).flatten(1, 2)[:, :width].contiguous()
    return forward(x, dt, A, B, C, D, z, dt_bias, start, offsets, False)[0]


def compile_kernels() -> None:
    """Compile both kernels (or load them from Numba's cache) by running them on a few numbers."""
    x, A, B = torch.zeros(1, 1, 1), -torch.ones(1, 1), torch.zeros(1, 1, 1)
    _, final, kept = forward(x, x, A, B, B, None, None, None, None, None, True)
    backward(x, final, x, x, A, B, B, None, None, None, False, None, kept)
