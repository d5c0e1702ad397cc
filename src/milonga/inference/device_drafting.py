"""Drafting without the host: a model's tokens are drawn, cut into bytes and fed to its next step where they are drawn.

What `ModelStream.draft` does step by step from the host, with the same numbers and so the same bytes. The host tells
beforehand how many tokens are drawn, sends one array and launches; nothing is read back.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from milonga.inference.acceptance import LANE_DRAFT, LANE_END
from milonga.inference.captured import Replay, copy_state
from milonga.inference.model_drafter import ModelDrafter, ModelStream
from milonga.inference.passes import decode_step, read_piece
from milonga.inference.sampling import Uniforms
from milonga.layers.base import Trace
from milonga.models.network import NetworkState
from milonga.ops.speculation import Draft, DraftInputs, Vocabulary, begin_draft_, draw_token_
from milonga.state import named_tensors

_PAD = 8  # tokens that are read again are padded to a multiple of so many
_TAIL = 80  # of them at most, beside those of a round's bytes


class Mailbox:
    """One array that goes to the device in one transfer: columns with names, int64 or float64.

    Args:
        rows: B.
        integers, floats: names and widths of the columns.

    Attributes:
        host: NumPy views `[B width]` to write to, before `send`.
        device: the same there, always at the same place.
    """

    def __init__(self, rows: int, integers: Mapping[str, int], floats: Mapping[str, int], device: torch.device):
        width = sum(integers.values()) + sum(floats.values())
        self._there = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self._here = torch.zeros(rows, width, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        start, numbers = 0, self._here.numpy()
        for kind, columns in ((torch.int64, integers), (torch.float64, floats)):
            for name, count in columns.items():
                part = slice(start, start + count)
                self.host[name] = numbers[:, part] if kind == torch.int64 else numbers[:, part].view(np.float64)
                self.device[name] = self._there[:, part].view(kind)
                start += count

    def send(self) -> None:
        """Begin the transfer. The host's side is not to be written before the device has been waited for."""
        self._there.copy_(self._here, non_blocking=True)


def preserving(work: Callable[[], object], tensors: Callable[[], Sequence[Tensor]]) -> Callable[[], None]:
    """`work`, after which these tensors hold what they held before, also where it was interrupted."""

    def warm() -> None:
        kept = [tensor.clone() for tensor in tensors()]
        try:
            work()
        finally:
            for tensor, before in zip(tensors(), kept, strict=True):
                tensor.copy_(before)

    return warm


def tensors_of(state: NetworkState) -> list[Tensor]:
    """The tensors of a state, those of no size left out."""
    return [tensor for _, tensor in named_tensors(state) if tensor.numel()]


def vocabulary_of(drafter: ModelDrafter) -> Vocabulary:
    """The drafter's vocabulary, on its device."""
    vocabulary, device = drafter.vocabulary, drafter.model.device
    tokens = [drafter.tokens[token] for token in vocabulary.order.tolist()]
    text = np.zeros((len(tokens), vocabulary.longest), np.int64)
    node = np.zeros_like(text)
    numbers: dict[bytes, int] = {}
    bounds: list[np.ndarray] = []
    for place, token in enumerate(tokens):
        text[place, : len(token)] = np.frombuffer(token, np.uint8)
        for depth in range(len(token)):
            prefix = token[:depth]
            if prefix not in numbers:
                numbers[prefix] = len(bounds)
                bounds.append(vocabulary.bounds(*vocabulary.range(prefix), depth)[1:].astype(np.int32))
            node[place, depth] = numbers[prefix]
    lengths = np.array([len(token) for token in tokens], np.int64)
    tables = (torch.from_numpy(table).to(device) for table in (lengths, text, node, np.stack(bounds)))
    return Vocabulary(drafter.order, *tables)


def _padded(tails: list[list[int]]) -> int:
    return max(1, -(-max(map(len, tails)) // _PAD)) * _PAD


class DeviceDrafter:
    """Static buffers in which a `ModelDrafter` drafts for B rows. As `DeviceVerifier`, called in inference mode.

    Args:
        drafter: its network's state must not grow.
        vocabulary: `vocabulary_of` it.
        rows: B.
        limit: L, bytes of a draft at most.
        tokens: M, tokens of a draft at most.
        greedy: whether tokens are the likeliest ones.

    Attributes:
        drafted: the drafts.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, drafter: ModelDrafter, vocabulary: Vocabulary, rows: int, limit: int, tokens: int, greedy: bool):
        network, device = drafter.model.network, drafter.model.device
        self._drafter, self._network, self._vocabulary, self._device = drafter, network, vocabulary, device
        self.rows, self.limit, self.tokens, self.greedy = rows, limit, tokens, greedy
        self._tail, size = _TAIL + limit, len(vocabulary.order)
        integers = {"tail": self._tail, "length": 1, "last": 5, "limit": 1, "tokens": 1, "settled": 1}
        self._mail = Mailbox(rows, integers, {"dice": limit + 1, "end": 1, "temperature": 1}, device)
        mail = self._mail.device
        self._inputs = DraftInputs(*(mail[name] for name in DraftInputs._fields))
        self._base, self._moving = network.init_state(rows), network.init_state(rows)
        self._behind = torch.zeros(rows, size, dtype=self._wide(), device=device)
        self._before = network.init_state(rows), torch.zeros_like(self._behind)  # what `undo` goes back to
        whole = torch.zeros(rows, limit + 1, dtype=torch.int64, device=device)
        number = whole[:, 0].contiguous()
        sums = torch.zeros(0 if greedy else tokens, rows, size + 1, dtype=torch.float64, device=device)
        self.drafted = Draft(  # no two fields share memory
            text=whole,
            node=whole.clone(),
            step=whole.clone(),
            count=number.clone(),
            live=number.clone(),
            drawn=number.clone(),
            next=number.clone()[:, None],
            keep=number.clone(),
            first=torch.zeros(rows, 3, dtype=torch.int64, device=device),
            sums=sums,
        )
        self._read: dict[int, Replay[tuple[Tensor, tuple[Trace, ...]]]] = {}
        self._settle: dict[int, Replay[None]] = {}
        self._step: Replay[None] | None = None
        self._stream: ModelStream | None = None
        self._last: tuple[int, list[list[int]], list[int], tuple[Tensor, tuple[Trace, ...]]] | None = None
        self._settled: tuple[list[list[int]], list[int]] | None = None

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._network.head.weight.dtype, torch.float32)

    def free(self) -> None:
        """Let go of the graphs, which hold this drafter: with the last reference to it its memory is free."""
        self._read.clear()
        self._settle.clear()
        self._step, self._last = None, None

    @torch.no_grad()
    def take(self, stream: ModelStream) -> None:
        """Draft for this stream's texts from here on; that of the one before is where it was left."""
        if self._stream is stream:
            return
        self.leave()
        copy_state(self._base, stream.state)
        self._behind.copy_(stream.behind)
        self._stream = stream

    @torch.no_grad()
    def leave(self) -> None:
        """Give the stream its state back."""
        if self._stream is not None:
            self._stream.move(self._base, self._behind)
        self._stream = None

    def draft(
        self,
        plans: Sequence[tuple[int, int]],
        positions: Sequence[int],
        uniforms: Sequence[Uniforms],
        temperature: float,
    ) -> None:
        """Begin a draft behind the stream's texts.

        Args:
            plans: for each row tokens and bytes at most; 0 bytes for none.
            positions: of the next byte of each text.
            uniforms: of each row.
            temperature: of the draws.
        """
        stream = self._stream
        assert stream is not None
        tails = stream.tail_ids()
        if _padded(tails) > self._tail:  # it went on for long without a draft
            self.leave()
            stream.catch_up()
            self.take(stream)
            tails = stream.tail_ids()
        width = _padded(tails)
        assert width <= self._tail, f"{width} tokens to read again"
        settled = stream.settled(tails)
        host = self._mail.host
        for row, (tail, (tokens, limit), position, numbers) in enumerate(
            zip(tails, plans, positions, uniforms, strict=True)
        ):
            host["tail"][row, :width] = tail + [0] * (width - len(tail))
            host["length"][row], host["settled"][row] = len(tail), settled[row]
            host["limit"][row], host["tokens"][row] = limit, tokens
            host["last"][row] = self._ending(tail)
            host["dice"][row] = numbers.span(position, self.limit + 1, LANE_DRAFT)
            host["end"][row] = numbers(position, LANE_END)
        host["temperature"][:] = temperature
        self._mail.send()
        self._last = width, tails, settled, self._reading(width)()
        for _ in range(max(tokens for tokens, _ in plans) - 1):
            self._stepping()()

    def skip(self) -> None:
        """Draft nothing for any row."""
        self._last = None
        self.drafted.count.zero_()

    def settle(self) -> None:
        """Begin to move the stream's state on behind tokens that will not be cut anew, if there are enough of them. The
        stream knows of it from `stay` on; until then `undo` takes it back."""
        if self._stream is None or self._last is None:
            return
        width, tails, settled, (behind, trace) = self._last
        self._last = None
        if not any(settled):
            return
        counts = self._mail.device["settled"][:, 0]

        def work() -> None:
            copy_state(self._before[0], self._base)
            self._before[1].copy_(self._behind)
            self._network.commit_(self._base, trace, counts)
            index = counts[:, None, None].expand(-1, 1, behind.shape[2])
            self._behind.copy_(behind.gather(1, index)[:, 0])

        if self._device.type == "cuda":
            if width not in self._settle:
                self._settle[width] = Replay(
                    work, self._device, preserving(work, lambda: [*tensors_of(self._base), self._behind])
                )
            self._settle[width]()
        else:  # without a graph the trace is another one each time
            work()
        self._settled = tails, settled

    def stay(self) -> None:
        """What was settled stands."""
        if self._stream is not None and self._settled is not None:
            self._stream.moved_on(*self._settled)
        self._settled = None

    def undo(self) -> None:
        """Go back to before what was settled, if there was anything since `stay`."""
        if self._settled is not None:
            copy_state(self._base, self._before[0])
            self._behind.copy_(self._before[1])
        self._settled = self._last = None

    def _ending(self, tail: list[int]) -> tuple[int, int, int, int, int]:
        """Of the last token: its id; its range of the sorted vocabulary, longer ones from the second on; its bytes."""
        if not tail:
            return -1, 0, 0, 0, 0
        text = self._drafter.tokens[tail[-1]]
        lo, longer, hi = self._drafter.places(text)
        return tail[-1], lo, longer, hi, len(text)

    def _reading(self, width: int) -> Replay[tuple[Tensor, tuple[Trace, ...]]]:
        if width not in self._read:
            self._read[width] = Replay(lambda: self._read_tails(width), self._device)
        return self._read[width]

    def _stepping(self) -> Replay[None]:
        if self._step is None:
            changed = [*tensors_of(self._moving), *self.drafted]
            self._step = Replay(self._step_on, self._device, preserving(self._step_on, lambda: changed))
        return self._step

    def _read_tails(self, width: int) -> tuple[Tensor, tuple[Trace, ...]]:
        """Read the last tokens again, decide whether the last of them goes on, and draw the first token."""
        tail = self._mail.device["tail"][:, :width].contiguous()
        logits, trace = read_piece(self._network, tail, self._base)
        behind = torch.cat([self._behind[:, None], logits.to(self._behind.dtype)], 1)
        begin_draft_(behind, self._inputs, self._vocabulary, self.drafted, self.greedy)
        copy_state(self._moving, self._base)
        self._network.commit_(self._moving, trace, self.drafted.keep)
        draw_token_(behind, self._inputs, self._vocabulary, self.drafted, True, self.greedy)
        return behind, trace

    def _step_on(self) -> None:
        """Feed the token drawn last, and draw the next."""
        logits = decode_step(self._network, self.drafted.next, self._moving)
        draw_token_(logits[:, None], self._inputs, self._vocabulary, self.drafted, False, self.greedy)
