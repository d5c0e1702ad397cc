"""Decoding with everything in place: static buffers, and on a GPU a CUDA graph of each step.

A step of a small model is hundreds of kernels of microseconds each; launched one by one from Python they take several
times as long as they run. Here a step is captured once for each number of rows and replayed. Everywhere else in this
library states are values; only here are they buffers that steps write into. On a CPU the same code runs as it stands.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from milonga.errors import UserError
from milonga.inference.device_sampling import Mode, draw_on_device
from milonga.inference.passes import decode_step, read_piece
from milonga.inference.runner import NetworkRunner, Runner
from milonga.layers.attention import buffer_capacity
from milonga.layers.base import Trace
from milonga.models.network import Network, NetworkState
from milonga.ops.gpu.capture import captured_into
from milonga.state import batch_size, clone, map_tensors, named_tensors, nbytes

Result = TypeVar("Result")

# Steps that are drawn on the device before the host looks at what was drawn.
RUN = 64


class Replay(Generic[Result]):
    """Work on static buffers: called as it is, or captured in a CUDA graph on the first call and then replayed.

    Args:
        work: reads and writes tensors that stay where they are; its results do too, and are overwritten by each call.
        warm: the same kernels on other memory, called before capturing; None where `work` may run any number of times.
        device: where the work runs. Only on a GPU is it captured.
    """

    def __init__(self, work: Callable[[], Result], device: torch.device, warm: Callable[[], object] | None = None):
        self._work, self._warm, self._device = work, warm or work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        if self._device.type != "cuda":
            return self._work()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._result  # type: ignore[return-value]

    def _capture(self) -> None:
        with torch.cuda.device(self._device):
            stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream):  # compiles kernels, fills caches and workspaces
                    for _ in range(2):
                        self._warm()
            finally:
                here.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # collecting takes longer than capturing, and pays where buffers that nobody holds may be in the way
            free, whole = torch.cuda.mem_get_info(self._device)
            with captured_into(graph, collect=free < whole // 2):
                self._result = self._work()
        self._graph = graph


def grows(network: Network) -> bool:
    """Whether the network's state grows with the text, as full attention's does."""
    with torch.no_grad():
        empty = network.init_state(1)
        return nbytes(network.resized(empty, 1)) > nbytes(empty)


def copy_state(target: NetworkState, source: NetworkState) -> None:
    """Copy into buffers of the same shapes, or of more capacity: one kernel for all tensors of a pair of dtypes, and of
    shapes that are the same (PyTorch copies one by one what is mixed)."""
    alike: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for (_, mine), (_, its) in zip(named_tensors(target), named_tensors(source), strict=True):
        if its.numel():
            same = mine.ndim < 2 or mine.shape[1] == its.shape[1]
            targets, sources = alike.setdefault((mine.dtype, its.dtype, same), ([], []))
            targets.append(mine if same else mine[:, : its.shape[1]])
            sources.append(its)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


class Decoder:
    """Static buffers for a number of rows, and the steps that run on them.

    A row is one text. Steps run over the first `n` rows for any `n` that was given as a bucket. The buffers are public:
    fill `tokens`, call `step`, read `logits`.

    Args:
        network: in eval mode, its weights fixed.
        rows: of the buffers.
        capacity: tokens that a state which grows has room for; not needed by others.
        buckets: numbers of rows that steps run over; None for powers of two up to `rows`, and `rows`.

    Attributes:
        state: the network's state of all rows.
        tokens: int64 `[rows 1]`, what the next step reads.
        logits: fp32 at least `[rows V]`, behind the last step.

    Raises:
        UserError: if a number is below 1, or a bucket above `rows`.
    """

    @torch.no_grad()
    def __init__(
        self, network: Network, rows: int, *, capacity: int | None = None, buckets: Sequence[int] | None = None
    ):
        if rows < 1 or (capacity is not None and capacity < 1):
            raise UserError(f"batch: rows and capacity must be at least 1, got {rows} and {capacity}")
        self.network, self.rows = network, rows
        self.device = network.embedding.weight.device
        self.buckets = sorted(set(buckets or [*(1 << i for i in range(rows.bit_length())), rows]))
        if self.buckets[0] < 1 or self.buckets[-1] > rows:
            raise UserError(f"batch: buckets must lie in 1..{rows}, got {self.buckets}")
        self.grows = grows(network)
        self.capacity = capacity or RUN
        self.state: NetworkState = network.resized(network.init_state(rows), self.capacity)
        vocabulary, wide = network.config.vocab_size, torch.promote_types(network.head.weight.dtype, torch.float32)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.logits = torch.zeros(rows, vocabulary, dtype=wide, device=self.device)
        # what draws on the device: settings of each row, the numbers drawn with, what was drawn
        self.temperature = torch.ones(rows, dtype=torch.float64, device=self.device)
        self.top_k = torch.full((rows,), vocabulary, dtype=torch.int64, device=self.device)
        self.top_p = torch.ones(rows, dtype=torch.float64, device=self.device)
        self.uniforms = torch.zeros(RUN, rows, dtype=torch.float64, device=self.device)
        self.drawn = torch.zeros(RUN, rows, dtype=torch.int64, device=self.device)
        self._count = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._steps: dict[tuple[int, Mode | None], Replay[None]] = {}

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds `count` rows."""
        return next(size for size in self.buckets if size >= count)

    @torch.no_grad()
    def step(self, rows: int, *, capture: bool = True) -> None:
        """Read `tokens` of the first `rows`, a bucket: `state` and `logits` are then behind them.

        Without `capture` every kernel is launched from here, as on a CPU: to compare with.
        """
        if capture:
            self._replay(rows, None)()
        else:
            self._work(rows, None, self._rows(0, rows))

    @torch.no_grad()
    def run(self, rows: int, steps: int, mode: Mode) -> Int[Tensor, "steps rows"]:
        """Draw and read `steps` tokens of the first `rows`, a bucket, without the host: -> the ids, on the device.

        Draws from `logits` with the rows of `uniforms`; at most `RUN` steps.
        """
        assert 0 < steps <= RUN
        self._count.zero_()
        replay = self._replay(rows, mode)
        for _ in range(steps):
            replay()
        return self.drawn[:steps, :rows].clone()

    @torch.no_grad()
    def advance(self, rows: int, mode: Mode) -> None:
        """One step of a run, whose number among at most `RUN` the device counts for itself."""
        self._replay(rows, mode)()

    @torch.no_grad()
    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row in a state that grows: doubled, and its steps captured anew."""
        if not self.grows or capacity <= self.capacity:
            return
        while self.capacity < capacity:
            self.capacity *= 2
        self.state = self.network.resized(self.state, self.capacity)
        self._steps.clear()

    @torch.no_grad()
    def load(self, row: int, state: NetworkState, logits: Float[Tensor, " V"]) -> None:
        """Put a text's state `[1 ...]` and its next logits into a row."""
        self.clear(row)
        if self.grows and nbytes(state) > nbytes(self.state) // self.rows:
            state = self.network.resized(state, self.capacity)
        copy_state(self._rows(row, row + 1), state)
        self.logits[row].copy_(logits)

    @torch.no_grad()
    def take(self, row: int, length: int) -> tuple[NetworkState, Float[Tensor, " V"]]:
        """A copy of a row that has read `length` tokens: its state `[1 ...]` and its logits."""
        state = self._rows(row, row + 1)
        if self.grows:  # only as much of the buffers as is written, doubled as elsewhere
            state = self.network.resized(state, buffer_capacity(length))
        return clone(state), self.logits[row].clone()

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        copy_state(self._rows(target, target + 1), self._rows(source, source + 1))
        for buffer in (self.logits, self.tokens, self.temperature, self.top_k, self.top_p):
            buffer[target].copy_(buffer[source])

    @torch.no_grad()
    def clear(self, first: int, last: int | None = None) -> None:
        """Make rows empty: nothing is left of the texts that were there."""
        last = first + 1 if last is None else last
        tensors = [tensor for _, tensor in named_tensors(self._rows(first, last)) if tensor.numel()]
        tensors += [self.logits[first:last], self.tokens[first:last]]
        torch._foreach_zero_(tensors)

    def _rows(self, first: int, last: int) -> NetworkState:
        return map_tensors(lambda tensor: tensor[first:last], self.state)

    def _replay(self, rows: int, mode: Mode | None) -> Replay[None]:
        if (rows, mode) not in self._steps:
            assert rows in self.buckets
            state = self._rows(0, rows)
            scratch: list[NetworkState] = []

            def work() -> None:
                self._work(rows, mode, state)

            def warm() -> None:
                if not scratch:
                    scratch.append(self.network.resized(self.network.init_state(rows), min(self.capacity, 1024)))
                logits, count = self.logits.clone(), self._count.clone()
                tokens, drawn = self.tokens.clone(), self.drawn.clone()
                self._work(rows, mode, scratch[0])
                for buffer, kept in zip(
                    (self.logits, self._count, self.tokens, self.drawn), (logits, count, tokens, drawn), strict=True
                ):
                    buffer.copy_(kept)

            self._steps[rows, mode] = Replay(work, self.device, warm)
        return self._steps[rows, mode]

    def _work(self, rows: int, mode: Mode | None, state: NetworkState) -> None:
        if mode is not None:
            uniform = self.uniforms[:, :rows].index_select(0, self._count)[0]
            settings = (self.temperature[:rows], self.top_k[:rows], self.top_p[:rows])
            ids = draw_on_device(self.logits[:rows], *settings, uniform, mode)
            self.tokens[:rows, 0].copy_(ids)
            self.drawn[:, :rows].index_copy_(0, self._count, ids[None])
            self._count.add_(1).remainder_(RUN)
        self.logits[:rows].copy_(decode_step(self.network, self.tokens[:rows], state))


class CapturedRunner:
    """A `Runner` of speculative decoding whose verification, commit and step are captured.

    The states that it returns are its own two buffers in turn: one lives until the commit after the next. Clone what is
    to be kept for longer. States from elsewhere are copied in. So it serves one set of texts at a time.

    Args:
        network: in eval mode, its weights fixed.
        rows: B of every call.
        capacity: tokens that a state which grows has room for at first (see `ensure`); not needed by others.
    """

    PAD = 4  # pieces are padded to a multiple of so many tokens, so that few graphs serve all lengths

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, network: Network, rows: int = 1, *, capacity: int = RUN):
        self.network, self.rows, self.capacity, self._grows = network, rows, capacity, grows(network)
        self.device = network.embedding.weight.device
        first = network.resized(network.init_state(rows), capacity)
        self._states = [first, clone(first)]
        self._tokens: dict[int, Tensor] = {}
        self._keep = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._verify: dict[tuple[int, int], Replay[tuple[Tensor, tuple[Trace, ...]]]] = {}
        self._commit: dict[tuple[int, int], Replay[None]] = {}
        self._step: dict[int, Replay[Tensor]] = {}
        self._last: tuple[int, int] | None = None  # buffer and length of the last verification

    @torch.no_grad()
    def verify(
        self, tokens: Int[Tensor, "B T"], state: NetworkState
    ) -> tuple[Float[Tensor, "B P V"], tuple[Trace, ...]]:
        """As `Runner.verify`. Logits and trace are overwritten by the next verification of as many tokens."""
        length = -(-tokens.shape[1] // self.PAD) * self.PAD
        index = self._place(state)
        buffer = self._tokens_of(length)
        buffer[:, : tokens.shape[1]].copy_(tokens)
        if (index, length) not in self._verify:
            mine = self._states[index]

            def work() -> tuple[Tensor, tuple[Trace, ...]]:
                return read_piece(self.network, buffer, mine)

            self._verify[index, length] = Replay(work, self.device)
        self._last = index, length
        return self._verify[index, length]()

    @torch.no_grad()
    def commit(self, state: NetworkState, trace: tuple[Trace, ...], keep: Sequence[int] | Tensor) -> NetworkState:
        """As `Runner.commit`, of the last verification. A `keep` on a GPU is read there, without waiting for it."""
        assert self._last is not None
        index, length = self._last
        mine, other = self._states[index], self._states[1 - index]
        self._keep.copy_(torch.as_tensor(keep, dtype=torch.int64), non_blocking=True)
        if (index, length) not in self._commit:

            def work() -> None:
                copy_state(other, mine)
                self.network.commit_(other, trace, self._keep)

            self._commit[index, length] = Replay(work, self.device)
        if self.device.type == "cuda":
            self._commit[index, length]()
        else:  # without a graph the trace is another one each time
            copy_state(other, mine)
            self.network.commit_(other, trace, self._keep)
        return other

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "B 1"], state: NetworkState) -> tuple[Float[Tensor, "B V"], NetworkState]:
        """As `Runner.step`: the state is advanced in place."""
        index = self._place(state)
        mine, buffer = self._states[index], self._tokens_of(1)
        buffer.copy_(tokens)
        if index not in self._step:
            scratch = clone(mine)
            self._step[index] = Replay(
                lambda: decode_step(self.network, buffer, mine),
                self.device,
                lambda: decode_step(self.network, buffer, scratch),
            )
        return self._step[index]().clone(), mine

    @torch.inference_mode(False)
    @torch.no_grad()
    def ensure(self, capacity: int) -> None:
        """As `Runner.ensure`: doubled, and its graphs captured anew. States returned before have the room too."""
        if not self._grows or capacity <= self.capacity:
            return
        while self.capacity < capacity:
            self.capacity *= 2
        for state in self._states:
            larger = self.network.resized(state, self.capacity)
            for (_, mine), (_, new) in zip(named_tensors(state), named_tensors(larger), strict=True):
                if new is not mine:
                    # the same tensor, with other memory: whoever holds the state has the room
                    mine.set_(new.untyped_storage(), new.storage_offset(), new.shape, new.stride())
        self._verify.clear()
        self._commit.clear()
        self._step.clear()
        self._last = None  # its trace belongs to a graph that is no more

    def _tokens_of(self, length: int) -> Tensor:
        if length not in self._tokens:
            self._tokens[length] = torch.zeros(self.rows, length, dtype=torch.int64, device=self.device)
        return self._tokens[length]

    def _place(self, state: NetworkState) -> int:
        """The buffer that holds `state`: it is one of them, or copied into one."""
        for index, mine in enumerate(self._states):
            if state is mine:
                return index
        if batch_size(state) not in (0, self.rows):
            raise ValueError(f"captured: the state must have {self.rows} rows, got {batch_size(state)}")
        self.ensure(_room(self._states[0], state))
        copy_state(self._states[0], state)
        return 0


def _room(mine: NetworkState, its: NetworkState) -> int:
    """Slots of the buffers of `its` that grow; 0 where none do, or none are larger than mine."""
    pairs = zip(named_tensors(mine), named_tensors(its), strict=True)
    return max((b.shape[1] for (_, a), (_, b) in pairs if b.ndim > 1 and b.shape[1] > a.shape[1]), default=0)


def runner_for(network: Network, rows: int = 1) -> Runner:
    """What runs a network for one generation of `rows` texts at a time: captured on a GPU, plain on a CPU."""
    if network.embedding.weight.device.type == "cuda":
        return CapturedRunner(network, rows)
    return NetworkRunner(network)


__all__ = [
    "RUN",
    "CapturedRunner",
    "Decoder",
    "Replay",
    "copy_state",
    "decode_step",
    "grows",
    "read_piece",
    "runner_for",
]
