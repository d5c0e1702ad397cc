"""One step: losses of a batch, gradients, clipping, update. Micro-batches give the gradient of the whole batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor, nn

from milonga.data.windows import IGNORED, Batch
from milonga.models import Network, NetworkOutput, NetworkState
from milonga.segments import Segments
from milonga.state import batch_size, detach, merge, select
from milonga.training.optimizer import Optimizer

_CLIP_EPS = 1e-6  # as in `torch.nn.utils.clip_grads_with_norm_`
Forward = Callable[..., NetworkOutput]  # a network, or what `torch.compile` made of it


class Piece(NamedTuple):
    """A micro-batch: some rows of a batch, or some sequences of a packed one, and the rows of the state beside it."""

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    segments: Segments | None
    rows: slice


class Gradient(NamedTuple):
    """What both passes gave beside the parameters' `grad`; the first two stay on the device, nothing waits for them."""

    nats: Float64[Tensor, ""]  # sum of the losses
    norm: Float[Tensor, ""]  # of the gradients of all parameters together, not clipped
    tokens: int  # targets
    state: NetworkState | None


class StepResult(NamedTuple):
    """What a step computed: `nats` is the sum over `tokens` targets, `state` is detached (None without one)."""

    nats: float
    tokens: int
    grad_norm: float
    state: NetworkState | None


def micro_batches(batch: Batch, count: int) -> Iterator[Piece]:
    """The batch in up to `count` pieces: equal shares of rows, or of a packed row runs of whole sequences."""
    if batch.segments is None:
        share = -(-batch.tokens.shape[0] // count)
        for first in range(0, batch.tokens.shape[0], share):
            rows = slice(first, first + share)
            yield Piece(batch.tokens[rows], batch.targets[rows], None, rows)
        return
    offsets = batch.segments.offsets
    wanted = torch.arange(1, count, dtype=torch.int64) * batch.segments.total // count
    bounds = [0, *torch.searchsorted(offsets, wanted).tolist(), batch.segments.count]
    for first, last in pairwise(bounds):
        start, end = int(offsets[first]), int(offsets[last])
        if end > start:
            segments = Segments(offsets[first : last + 1] - start)
            yield Piece(batch.tokens[:, start:end], batch.targets[:, start:end], segments, slice(first, last))


def backward(
    network: Forward,
    batch: Batch,
    state: NetworkState | None,
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
    accumulation: int = 1,
) -> tuple[Float64[Tensor, ""], int, NetworkState | None]:
    """Add the gradient of the mean loss over all targets of the batch: -> (sum of losses in nats, targets, next state).

    The sum stays on the device, so that nothing here waits for it. The gradient does not depend on `accumulation` but
    for rounding. With a state (one row per sequence) training carries it from step to step: the next state is returned,
    cut from the graph.
    """
    tokens = count_targets(batch)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    states: list[NetworkState] = []
    for piece in micro_batches(batch, accumulation):
        before = state
        if state is not None and accumulation > 1:
            before = select(state, list(range(*piece.rows.indices(batch_size(state)))))
        total, after = piece_backward(network, piece, before, max(1, tokens), device=device, precision=precision)
        nats += total
        if after is not None and state is not None:
            states.append(after)
    if state is None:
        return nats, tokens, None
    return nats, tokens, states[0] if len(states) == 1 else merge(states)


def count_targets(batch: Batch) -> int:
    """Targets of a batch that count."""
    return int((batch.targets != IGNORED).sum())


def piece_backward(
    network: Forward,
    piece: Piece,
    state: NetworkState | None,
    count: int | Float32[Tensor, ""],
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
) -> tuple[Float32[Tensor, ""], NetworkState | None]:
    """Both passes over a micro-batch, its losses divided by `count`: -> (sum of losses in nats, next state, cut)."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = network(
            piece.tokens.to(device, torch.int64, non_blocking=True),
            state,
            segments=piece.segments,
            targets=piece.targets.to(device, torch.int64, non_blocking=True),
        )
    assert output.losses is not None, "targets give losses"
    total = output.losses.sum(dtype=torch.float32)
    (total / count).backward()
    return total.detach(), None if state is None else detach(output.state)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """The norm of all gradients together, on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def gradient(
    network: Forward,
    parameters: Sequence[nn.Parameter],
    batch: Batch,
    state: NetworkState | None,
    *,
    device: torch.device,
    precision: Literal["fp32", "bf16"] = "fp32",
    accumulation: int = 1,
) -> Gradient:
    """`backward`, each kernel launched from here, and the norm. The parameters have no `grad` before."""
    nats, tokens, after = backward(network, batch, state, device=device, precision=precision, accumulation=accumulation)
    return Gradient(nats, gradient_norm(parameters), tokens, after)


GradientOf = Callable[..., Gradient]  # `gradient`, or a `CapturedGradient` in its place


def training_step(
    network: Forward,
    optimizer: Optimizer,
    batch: Batch,
    state: NetworkState | None = None,
    *,
    device: torch.device,
    lr: float,
    clip: float | None = 1.0,
    precision: Literal["fp32", "bf16"] = "fp32",
    accumulation: int = 1,
    gradient_of: GradientOf = gradient,
) -> StepResult:
    """One update of the weights from one batch.

    `gradient_of` computes the gradients: `gradient`, or a `CapturedGradient`, the same one at every step.
    Where the loss or the gradient's norm is NaN or infinite nothing is updated: the caller sees it in the result.
    """
    optimizer.zero_grad()
    parameters = list(optimizer.names.values())
    nats, length, tokens, after = gradient_of(
        network, parameters, batch, state, device=device, precision=precision, accumulation=accumulation
    )
    numbers = torch.stack([nats, length.double()])
    optimizer.set_learning_rate(lr)
    if optimizer.decides:  # the device goes on with the update while the host waits for the numbers before it
        seen = _Seen(numbers)
        scale = None if clip is None else ((length.float() + _CLIP_EPS) / clip).clamp_min(1.0)
        optimizer.step(scale, (~numbers.isfinite().all()).float())
        loss, norm = seen.wait()
    else:
        loss, norm = numbers.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            if clip is not None and norm > clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, length)
            optimizer.step()
    return StepResult(loss, tokens, norm, after)


class _Seen:
    """A few numbers on their way to the host; what is launched after them is not waited for."""

    def __init__(self, numbers: Tensor):
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[float]:
        """The one place of a step that waits for the device."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()


def enter(network: Network, rows: NetworkState, batch: Batch) -> NetworkState:
    """The state with which a batch begins, a row per sequence: -> what `training_step` takes.

    The sequence that starts row r goes on from `rows[r]`, unless the row is fresh; every other one starts empty.
    """
    count = batch.fresh.numel() if batch.segments is None else batch.segments.count
    index = [batch.fresh.numel()] * count  # the empty row, appended below
    for row, (sequence, fresh) in enumerate(zip(batch.first.tolist(), batch.fresh.tolist(), strict=True)):
        if not fresh:
            index[sequence] = row
    if index == list(range(batch.fresh.numel())):
        return rows
    weight = network.embedding.weight
    return select(merge([rows, network.init_state(1, device=weight.device, dtype=weight.dtype)]), index)


def leave(state: NetworkState, batch: Batch) -> NetworkState:
    """The state of each row after a batch, from the states of its sequences: what the next batch goes on from."""
    return state if batch.segments is None else select(state, batch.last)
