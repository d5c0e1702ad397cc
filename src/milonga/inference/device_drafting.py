"""Drafting without the host: a model's tokens are drawn, cut into bytes and fed to its next step where they are drawn.

What `ModelStream.draft` does step by step from the host, with the same numbers and so the same bytes. The host tells
beforehand how many tokens are drawn, sends one array and launches; nothing is read back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from milonga.inference.acceptance import LANE_DRAFT, LANE_END
from milonga.inference.captured import Replay, copy_state
from milonga.inference.model_drafter import ModelDrafter, ModelStream, draw_ranks
from milonga.inference.passes import decode_step, read_piece
from milonga.inference.sampling import Uniforms
from milonga.layers.base import Trace
from milonga.models.network import NetworkState
from milonga.state import named_tensors

_PAD = 4  # tokens that are read again are padded to a multiple of so many
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
    """`work`, after which these tensors hold what they held before."""

    def warm() -> None:
        kept = [tensor.clone() for tensor in tensors()]
        work()
        for tensor, before in zip(tensors(), kept, strict=True):
            tensor.copy_(before)

    return warm


def tensors_of(state: NetworkState) -> list[Tensor]:
    """The tensors of a state, those of no size left out."""
    return [tensor for _, tensor in named_tensors(state) if tensor.numel()]


class VocabularyTables:
    """A vocabulary sorted by bytes, as tensors: what bytes a token has, and what could have come at each of them.

    Args:
        drafter: whose vocabulary it is.

    Attributes:
        order: int64 `[V]`, ids by place.
        lengths: int64 `[V]`, bytes of the token at each place.
        text: int64 `[V longest]`, its bytes.
        node: int64 `[V longest]`: for each of its bytes a row of `bounds`.
        bounds: int32 `[N 257]`: `bounds[n, b]..bounds[n, b + 1]` are the places of the tokens that go on with byte b.
    """

    def __init__(self, drafter: ModelDrafter):
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
        self.size, self.longest = len(tokens), vocabulary.longest
        self.order = drafter.order
        self.lengths = torch.tensor([len(token) for token in tokens], device=device)
        self.text, self.node = torch.from_numpy(text).to(device), torch.from_numpy(node).to(device)
        self.bounds = torch.from_numpy(np.stack(bounds)).to(device)


class DraftedBytes(NamedTuple):
    """Drafts on the device, always at the same place. Column L of the first three is never read."""

    text: Int[Tensor, "B L+1"]
    node: Int[Tensor, "B L+1"]  # of every byte, see `VocabularyTables`
    step: Int[Tensor, "B L+1"]  # and which of the drawn tokens it belongs to
    count: Int[Tensor, " B"]
    sums: Float64[Tensor, "M B V+1"]  # running sums that each token was drawn from


class DeviceDrafter:
    """Static buffers in which a `ModelDrafter` drafts for B rows.

    Args:
        drafter: its network's state must not grow.
        rows: B.
        limit: L, bytes of a draft at most.
        tokens: M, tokens of a draft at most.
        greedy: whether tokens are the likeliest ones.

    Attributes:
        drafted: the drafts.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, drafter: ModelDrafter, tables: VocabularyTables, rows: int, limit: int, tokens: int, greedy: bool
    ):
        network, device = drafter.model.network, drafter.model.device
        self._drafter, self._network, self._tables, self._device = drafter, network, tables, device
        self.rows, self.limit, self.tokens, self.greedy = rows, limit, tokens, greedy
        self._tail = _TAIL + limit
        integers = {"tail": self._tail, "length": 1, "settled": 1, "limit": 1, "tokens": 1, "last": 5}
        self._mail = Mailbox(rows, integers, {"dice": limit + 1, "end": 1, "temperature": 1}, device)
        self._base, self._moving = network.init_state(rows), network.init_state(rows)
        self._behind = torch.zeros(rows, tables.size, dtype=self._wide(), device=device)
        self._next = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._live = torch.zeros(rows, dtype=torch.bool, device=device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.arange(rows, device=device)
        whole = torch.zeros(rows, limit + 1, dtype=torch.int64, device=device)
        sums = torch.zeros(0 if greedy else tokens, rows, tables.size + 1, dtype=torch.float64, device=device)
        self.drafted = DraftedBytes(whole, whole.clone(), whole.clone(), torch.zeros_like(whole[:, 0]), sums)
        self._read: dict[int, Replay[tuple[Tensor, tuple[Trace, ...]]]] = {}
        self._settle: dict[int, Replay[None]] = {}
        self._step: Replay[None] | None = None
        self._stream: ModelStream | None = None
        self._last: tuple[int, list[list[int]], list[int], tuple[Tensor, tuple[Trace, ...]]] | None = None

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._network.head.weight.dtype, torch.float32)

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

    @torch.no_grad()
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
        width = max(1, -(-max(map(len, tails)) // _PAD)) * _PAD
        assert width <= self._tail, f"{width} tokens to read again"
        settled = stream.settled(tails)
        host = self._mail.host
        for row, (tail, (tokens, limit), position, numbers) in enumerate(
            zip(tails, plans, positions, uniforms, strict=True)
        ):
            host["tail"][row, : len(tail)] = tail
            host["tail"][row, len(tail) : width] = 0
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

    @torch.no_grad()
    def settle(self) -> None:
        """Move the stream's state on behind tokens that will not be cut anew, if there are enough of them."""
        if self._stream is None or self._last is None:
            return
        width, tails, settled, (behind, trace) = self._last
        self._last = None
        if not any(settled):
            return
        counts = self._mail.device["settled"][:, 0]

        def work() -> None:
            self._network.commit_(self._base, trace, counts)
            self._behind.copy_(behind[self._rows, counts])

        if self._device.type == "cuda":
            if width not in self._settle:
                self._settle[width] = Replay(
                    work, self._device, preserving(work, lambda: [*tensors_of(self._base), self._behind])
                )
            self._settle[width]()
        else:  # without a graph the trace is another one each time
            work()
        self._stream.moved_on(tails, settled)

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
            changed = [self._next, self._live, self._drawn, *self.drafted[:4]]
            self._step = Replay(
                self._step_on,
                self._device,
                preserving(self._step_on, lambda: [*tensors_of(self._moving), *changed, self.drafted.sums]),
            )
        return self._step

    def _read_tails(self, width: int) -> tuple[Tensor, tuple[Trace, ...]]:
        """Read the last tokens again, decide whether the last of them goes on, and draw the first token."""
        mail = self._mail.device
        length, (last, lo, longer, hi, shown) = mail["length"][:, 0], mail["last"].unbind(1)
        logits, trace = read_piece(self._network, mail["tail"][:, :width].contiguous(), self._base)
        behind = torch.cat([self._behind[:, None], logits.to(self._behind.dtype)], 1)
        before = behind[self._rows, (length - 1).clamp_min(0)]
        ranks, empty, _ = self._draw_ranks(before, lo, hi, mail["end"][:, 0])
        goes_on = (longer < hi) & ~empty & (self._tables.order[ranks] != last)
        keep = length - goes_on.long()
        copy_state(self._moving, self._base)
        self._network.commit_(self._moving, trace, keep)
        self._drawn.zero_()
        self.drafted.count.zero_()
        self._live.copy_(mail["limit"][:, 0] > 0)
        none, all_ = torch.zeros_like(hi), torch.full_like(hi, self._tables.size)
        bounds = torch.where(goes_on, longer, none), torch.where(goes_on, hi, all_)
        self._draw(behind[self._rows, keep], *bounds, torch.where(goes_on, shown, none))
        return behind, trace

    def _step_on(self) -> None:
        """Feed the token drawn last, and draw the next."""
        logits = decode_step(self._network, self._next, self._moving)
        none = torch.zeros_like(self.drafted.count)
        self._draw(logits, none, none + self._tables.size, none)

    def _draw_ranks(
        self, logits: Float[Tensor, "B V"], lo: Tensor, hi: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        temperature = None if self.greedy else self._mail.device["temperature"][:, 0]
        ordered = logits.index_select(1, self._tables.order)
        return draw_ranks(ordered, torch.stack([lo, hi], 1), temperature, uniform)

    def _draw(self, logits: Float[Tensor, "B V"], lo: Tensor, hi: Tensor, shown: Tensor) -> None:
        """Draw a token of each row between two places, and write down those of its bytes that do not stand yet."""
        mail, tables, drafted = self._mail.device, self._tables, self.drafted
        limit, count = mail["limit"][:, 0], drafted.count
        uniform = mail["dice"].gather(1, count[:, None])[:, 0]
        ranks, empty, total = self._draw_ranks(logits, lo, hi, uniform)
        if total is not None:
            drafted.sums.index_copy_(0, self._drawn, total[None])
        live, lengths = self._live & ~empty, tables.lengths[ranks]
        index = torch.arange(tables.longest, device=self._device)
        place = count[:, None] + index - shown[:, None]
        shows = live[:, None] & (index >= shown[:, None]) & (index < lengths[:, None]) & (place < limit[:, None])
        place = torch.where(shows, place, self.limit)
        drafted.text.scatter_(1, place, tables.text[ranks])
        drafted.node.scatter_(1, place, tables.node[ranks])
        drafted.step.scatter_(1, place, self._drawn.expand_as(place))
        count.copy_(torch.where(live, torch.minimum(count + lengths - shown, limit), count))
        self._next[:, 0].copy_(tables.order[ranks].masked_fill(empty, 0))
        self._drawn.add_(1)
        self._live.copy_(live & (count < limit) & (self._drawn < mail["tokens"][:, 0]))

    def conditionals(self, length: int) -> tuple[Float64[Tensor, "B L"], Float64[Tensor, "B L 256"]]:
        """q of the first `length` drafted bytes of each row, and of all 256 bytes at their places; what lies behind the
        draft is arbitrary."""
        drafted, tables = self.drafted, self._tables
        bounds = tables.bounds[drafted.node[:, :length]].long()
        first = (drafted.step[:, :length] * self.rows + self._rows[:, None]) * (tables.size + 1)
        sums = drafted.sums.flatten()[first[..., None] + bounds]
        shares = sums.diff(dim=-1) / (sums[..., -1:] - sums[..., :1])
        return shares.gather(2, drafted.text[:, :length, None])[..., 0], shares
