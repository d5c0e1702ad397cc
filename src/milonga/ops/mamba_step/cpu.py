"""The kernel of `mamba_step` called with tensors: tables of their addresses, and the tensors that it fills."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.mamba_step import cpu_kernels as places
from milonga.ops.mamba_step.reference import StepResult, StepWeights, StoredWeight

# An empty array of the dtype of stored weights: what the kernel is compiled for.
_LIKE = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.int8: np.empty(0, np.int8),
}
COUNTERS = 2 * places.PARTS * places.LINE
# Elementary operations a weight for the pool's estimate: a thread reads 10 to 25 GB/s, and computes in its shadow.
_WORK = {torch.float32: 0.5, torch.bfloat16: 0.3, torch.int8: 0.2}


class PreparedWeights(NamedTuple):
    """The weights of a layer as the kernel reads them, where they lie; `kept` holds them there."""

    like: np.ndarray
    table: np.ndarray  # [1, LAYER_SIZE]; of several layers [layers, LAYER_SIZE]
    work: int
    sizes: tuple[int, int, int, int, int]  # D, E, N, R, W
    kept: tuple[Tensor, ...]


def prepare(weights: StepWeights) -> PreparedWeights:
    """The table of a layer's weights. It holds copies of conv_weight and of A, and reads the others where they lie."""
    products = (weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj)
    stored = [_still(product.weight) for product in products]
    scales = [None if product.scale is None else _still(product.scale) for product in products]
    inner, states = weights.A.shape
    width, rank, taps = stored[0].shape[1], stored[2].shape[1], weights.conv_weight.shape[1]
    rest = [
        _still(weights.conv_weight.detach().t()),
        _still(weights.conv_bias),
        weights.A.detach() * float(places.LOG2_E),
        _still(weights.D),
        _still(weights.dt_bias),
    ]
    addresses = [tensor.data_ptr() for tensor in stored]
    addresses += [0 if scale is None else scale.data_ptr() for scale in scales]
    addresses += [tensor.data_ptr() for tensor in rest]
    table = np.array([[*addresses, width, inner, states, rank, taps, 0, 0]], np.int64)
    assert table.shape[1] == places.LAYER_SIZE
    count = sum(tensor.numel() for tensor in stored)
    kept = (*stored, *(scale for scale in scales if scale is not None), *rest)
    work = int(count * _WORK[stored[0].dtype]) + 8 * inner * states
    return PreparedWeights(_LIKE[stored[0].dtype], table, work, (width, inner, states, rank, taps), kept)


def join(layers: Sequence[PreparedWeights], norms: Sequence[tuple[Tensor, float]]) -> PreparedWeights:
    """Layers of the same sizes, stored in one way, one behind the other; before each an RMS norm (weight fp32, eps)."""
    table = np.concatenate([layer.table for layer in layers])
    weights, eps = [_still(weight) for weight, _ in norms], torch.tensor([eps for _, eps in norms], dtype=torch.float32)
    table[:, places.NORM] = [weight.data_ptr() for weight in weights]
    table[:, places.EPS] = eps.data_ptr() + 4 * np.arange(len(layers))
    kept = (*(tensor for layer in layers for tensor in layer.kept), *weights, eps)
    return PreparedWeights(layers[0].like, table, sum(layer.work for layer in layers), layers[0].sizes, kept)


def _still(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def forward(prepared: PreparedWeights, x: Tensor, conv: Tensor, ssm: Tensor) -> StepResult:
    """One step of `x [B D]` after the state `conv [B W-1 E]`, `ssm [B E N]`; all fp32."""
    _, inner, states, rank, _ = prepared.sizes
    rows = x.shape[0]
    x, conv, ssm = x.contiguous(), conv.contiguous(), ssm.contiguous()
    low = rank + 2 * states
    column, u, dt = (torch.empty(rows, inner, dtype=torch.float32) for _ in range(3))
    small = torch.empty(rows * (low + 2 * inner), dtype=torch.float32)  # dt's input, B and C; then the gate; then y
    conv_after, ssm_after = torch.empty_like(conv), torch.empty_like(ssm)
    y = torch.empty_like(x)
    tensors = (x, conv, ssm, column, u, dt, small, conv_after, ssm_after, y)
    call = np.array([[*(tensor.data_ptr() for tensor in tensors), rows, 0, 0]], np.int64)
    counters = np.zeros((1, COUNTERS), np.int64)
    cpu_pool.share(places.steps, prepared.work, prepared.like, prepared.table, call, counters)
    B = small.as_strided((rows, states), (low, 1), rank)
    return StepResult(y, conv_after, ssm_after, column, u, dt, B)


def forward_run(
    prepared: PreparedWeights, x: Tensor, branch: Tensor | None, convs: Sequence[Tensor], ssms: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """`x = x + branch; branch = layer(norm(x))` for every layer of `join`, all fp32.

    -> (x, branch, the states behind them). The states of a call share their memory.
    """
    width, inner, states, rank, taps = prepared.sizes
    rows, count = x.shape[0], len(convs)
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    convs, ssms = [conv.contiguous() for conv in convs], [ssm.contiguous() for ssm in ssms]
    low = rank + 2 * states
    scratch = torch.empty(rows * (low + 5 * inner), dtype=torch.float32)
    conv_after = torch.empty(count, rows, taps - 1, inner, dtype=torch.float32)
    ssm_after = torch.empty(count, rows, inner, states, dtype=torch.float32)
    between = torch.empty(
        2, count, rows, width, dtype=torch.float32
    )  # of every layer the sum before it, and its output
    sums, outputs = between.unbind(0)
    column = scratch.data_ptr()
    u, dt, small = (column + 4 * rows * inner * place for place in (1, 2, 3))
    conv_at, ssm_at, sum_at, y_at = (tensor.data_ptr() for tensor in (conv_after, ssm_after, sums, outputs))
    conv_step, ssm_step, step = 4 * rows * (taps - 1) * inner, 4 * rows * inner * states, 4 * rows * width
    source, added = x.data_ptr(), 0 if branch is None else branch.data_ptr()
    calls = []
    for conv, ssm in zip(convs, ssms, strict=True):
        before = conv.data_ptr(), ssm.data_ptr()
        calls.append((source, *before, column, u, dt, small, conv_at, ssm_at, y_at, rows, added, sum_at))
        source, added = sum_at, y_at
        conv_at, ssm_at, sum_at, y_at = conv_at + conv_step, ssm_at + ssm_step, sum_at + step, y_at + step
    call = np.array(calls, np.int64)
    counters = np.zeros((count, COUNTERS), np.int64)
    cpu_pool.share(places.steps, prepared.work, prepared.like, prepared.table, call, counters)
    return sums[-1].clone(), outputs[-1].clone(), conv_after.unbind(0), ssm_after.unbind(0)


def compile_kernels() -> None:
    """Compile the step for all three kinds of weights, for the cache."""
    inner = torch.ones(1)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        scale = torch.ones(3) if dtype == torch.int8 else None

        def stored(features: int, dtype: torch.dtype = dtype, scale: Tensor | None = scale) -> StoredWeight:
            return StoredWeight(torch.zeros(features, 1, dtype=dtype), None if scale is None else scale[:features])

        weights = StepWeights(
            stored(2), torch.zeros(1, 2), inner, stored(3), stored(1), -torch.ones(1, 1), inner, inner, stored(1)
        )
        forward(prepare(weights), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
