"""Verifying a draft without the host: the pass over it, which bytes stand, and the commit, one after the other.

The rules are those of `milonga.inference.acceptance`, with the same numbers, for B rows at once; the host sends one
array before and reads one behind.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from milonga.inference.acceptance import LANE_ACCEPT
from milonga.inference.captured import Replay, copy_state
from milonga.inference.device_drafting import Mailbox, preserving, tensors_of
from milonga.inference.device_sampling import Mode, pick_on_device, weights_on_device
from milonga.inference.passes import read_piece
from milonga.inference.sampling import Sampler, Uniforms
from milonga.layers.base import Trace
from milonga.models.network import Network, NetworkState

PIECE = 8  # bytes that are read together are padded to a multiple of so many

Conditionals = Callable[[int], tuple[Float64[Tensor, "B L"], Float64[Tensor, "B L 256"]]]
"""q of the first L drafted bytes of each row, and of all 256 bytes at their places."""


class Verdict(NamedTuple):
    """What became of one row's draft, as the host reads it."""

    drafted: bytes
    accepted: int
    byte: int | None  # the verifier's own behind them; None: undecided
    broken: bool  # the logits that decided are not finite


def decide_greedy(
    logits: Float[Tensor, "B T V"], text: Int[Tensor, "B L"], count: Int[Tensor, " B"], share: float
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """As `accept_greedy`: -> (drafted bytes that stand, the byte behind them, whether that is undecided)."""
    best = logits.argmax(-1)
    stands = (best[:, :-1] == text) & (torch.arange(text.shape[1], device=text.device) < count[:, None])
    clear = torch.ones_like(best, dtype=torch.bool)
    if share > 0:
        wide = logits.double()
        largest = wide.abs().masked_fill(~wide.isfinite(), 0.0).amax(-1, keepdim=True)
        lowered = wide.scatter_add(2, best[..., None], -share * largest)
        clear = lowered.argmax(-1) == best
        stands = stands & clear[:, :-1]
    accepted = stands.long().cumprod(1).sum(1)
    at = accepted[:, None]
    return accepted, best.gather(1, at)[:, 0], ~clear.gather(1, at)[:, 0]


def decide_exact(
    p: Float64[Tensor, "B T 256"],
    text: Int[Tensor, "B L"],
    count: Int[Tensor, " B"],
    q: Float64[Tensor, "B L"],
    shares: Float64[Tensor, "B L 256"],
    accept: Float64[Tensor, "B L+1"],
    draw: Float64[Tensor, "B L+1"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """As `accept_exact`: -> (drafted bytes that stand, the byte behind them).

    Args:
        p: the verifier's distribution before each drafted byte and behind the last.
        text, count: the draft, and how many of its bytes are looked at.
        q, shares: of each drafted byte and of all 256 at its place.
        accept, draw: uniform numbers, to accept with and to draw a byte of the verifier's own.
    """
    rows, length = torch.arange(text.shape[0], device=text.device), text.shape[1]
    there = p[:, :length].gather(2, text[..., None])[..., 0]
    stands = (accept[:, :length] * q < there) & (torch.arange(length, device=text.device) < count[:, None])
    accepted = stands.long().cumprod(1).sum(1)
    at = p[rows, accepted]
    rest = (at - shares[rows, accepted.clamp_max(length - 1)]).clamp_min(0.0)
    fell = (accepted < count) & (rest > 0).any(1)
    own = pick_on_device(torch.where(fell[:, None], rest, at), draw.gather(1, accepted[:, None])[:, 0])
    return accepted, own


def sure_conditionals(text: Int[Tensor, "B L"]) -> tuple[Float64[Tensor, "B L"], Float64[Tensor, "B L 256"]]:
    """Of a draft without dice: all on the drafted byte."""
    shares = (text[..., None] == torch.arange(256, device=text.device)).double()
    return torch.ones_like(text, dtype=torch.float64), shares


class DeviceVerifier:
    """Static buffers in which a byte model verifies drafts of B rows and moves behind what stood.

    Args:
        network: its state must not grow.
        rows: B.
        limit: L, bytes of a draft at most.
        text, count: `[B L+1]` and `[B]`, drafts on the device; None: the host sends them.
        conditionals: of the drafts; None for drafts without dice.
        tie: see `accept_greedy`.

    Attributes:
        state: of the network, behind all that was written but the last byte of each row.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        network: Network,
        rows: int,
        limit: int,
        *,
        text: Int[Tensor, "B L+1"] | None = None,
        count: Int[Tensor, " B"] | None = None,
        conditionals: Conditionals | None = None,
        tie: float = 0.0,
    ):
        self.network, self.rows, self.limit, self._tie = network, rows, limit, tie
        self._device = network.embedding.weight.device
        integers = {"last": 1, "active": 1, "top_k": 1, "count": 1, "text": limit + 1}
        floats = {"accept": limit + 1, "draw": limit + 1, "temperature": 1, "top_p": 1}
        self._mail = Mailbox(rows, integers, floats, self._device)
        self._sends_text = text is None
        self._text = self._mail.device["text"] if text is None else text
        self._count = self._mail.device["count"][:, 0] if count is None else count
        self._conditionals = conditionals
        self.state: NetworkState = network.init_state(rows)
        self._before = network.init_state(rows)  # the state before the last pass
        self._keep = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._result = torch.zeros(rows, limit + 5, dtype=torch.int64, device=self._device)
        self._answer = torch.zeros(rows, limit + 5, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        self._passes: dict[tuple[int, Mode], Replay[tuple[Trace, ...]]] = {}
        self._again: dict[tuple[int, Mode], Replay[None]] = {}
        self._last: tuple[tuple[int, Mode], tuple[Trace, ...]] | None = None
        self._moved = False

    @torch.no_grad()
    def load(self, state: NetworkState) -> None:
        """Stand behind other texts."""
        copy_state(self.state, state)
        self._moved = False

    @torch.no_grad()
    def verify(
        self,
        longest: int,
        mode: Mode,
        lasts: Sequence[int],
        active: Sequence[bool],
        samplers: Sequence[Sampler],
        uniforms: Sequence[Uniforms],
        drafts: Sequence[bytes] | None = None,
    ) -> None:
        """Begin to read the last byte and the draft of every row, decide, and move on.

        Args:
            longest: bytes of a draft at most, this time.
            mode: how the samplers draw, see `device_mode`.
            lasts: the byte of each row that is written and not read.
            active: rows that are through do not move.
            samplers: where each row stands.
            uniforms: of each row.
            drafts: where the host sends them.
        """
        length = -(-(longest + 1) // PIECE) * PIECE
        assert length <= self.limit + 1
        host = self._mail.host
        host["last"][:, 0], host["active"][:, 0] = lasts, active
        for row, (sampler, numbers) in enumerate(zip(samplers, uniforms, strict=True)):
            settings, position = sampler.sampling, sampler.position
            host["accept"][row] = numbers.span(position, self.limit + 1, LANE_ACCEPT)
            host["draw"][row] = numbers.span(position, self.limit + 1)
            host["temperature"][row], host["top_p"][row] = settings.temperature, settings.top_p or 1.0
            host["top_k"][row] = settings.top_k or self.network.config.vocab_size
            if drafts is not None:
                host["text"][row, : len(drafts[row])] = np.frombuffer(drafts[row], np.uint8)
                host["count"][row] = len(drafts[row])
        self._mail.send()
        key = length, mode
        if key not in self._passes:
            changed = [*tensors_of(self.state), *tensors_of(self._before), self._keep, self._result]
            work = self._passing(length, mode)
            self._passes[key] = Replay(work, self._device, preserving(work, lambda: changed))
        self._last = key, self._passes[key]()
        self._moved = True
        self._answer.copy_(self._result, non_blocking=True)

    def verdicts(self) -> list[Verdict]:
        """What came of it. The device must have been waited for."""
        found = []
        for numbers in self._answer.tolist():
            accepted, byte, undecided, broken, count = numbers[:5]
            found.append(Verdict(bytes(numbers[5 : 5 + count]), accepted, None if undecided else byte, bool(broken)))
        return found

    @torch.no_grad()
    def undo(self) -> None:
        """Go back to before the last pass, if there was one since `load`."""
        if self._moved:
            copy_state(self.state, self._before)
            self._moved = False

    @torch.no_grad()
    def keep(self, counts: Sequence[int]) -> None:
        """Stand behind the first `counts[b]` bytes of the last piece instead."""
        assert self._last is not None and self._moved
        key, trace = self._last
        self._keep.copy_(torch.tensor(counts, dtype=torch.int64))

        def work() -> None:
            copy_state(self.state, self._before)
            self.network.commit_(self.state, trace, self._keep)

        if self._device.type == "cuda":
            if key not in self._again:
                self._again[key] = Replay(work, self._device)  # may be done any number of times
            self._again[key]()
        else:  # without a graph the trace is another one each time
            work()

    def _passing(self, length: int, mode: Mode) -> Callable[[], tuple[Trace, ...]]:
        """One pass over `length` bytes of each row: -> its trace."""
        mail, text = self._mail.device, self._text[:, : length - 1]

        def work() -> tuple[Trace, ...]:
            copy_state(self._before, self.state)
            fed = torch.cat([mail["last"], text], 1)
            logits, trace = read_piece(self.network, fed, self.state)
            count = self._count.clamp_max(length - 1)
            accepted, own, undecided = self._decide(logits, text, count, mode)
            looked_at = torch.arange(length, device=self._device) <= accepted[:, None]
            broken = (looked_at & ~logits.amax(2).isfinite()).any(1)
            moved = (accepted + 1 - undecided.long()) * mail["active"][:, 0]
            self._keep.copy_(moved)
            self.network.commit_(self.state, trace, self._keep)
            facts = torch.stack([accepted, own, undecided.long(), broken.long(), count], 1)
            self._result[:, : 4 + length].copy_(torch.cat([facts, text], 1))
            return trace

        return work

    def _decide(
        self, logits: Float[Tensor, "B T V"], text: Int[Tensor, "B L"], count: Int[Tensor, " B"], mode: Mode
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
        mail, length = self._mail.device, text.shape[1]
        if mode == "greedy":
            return decide_greedy(logits, text, count, self._tie)
        settings = (mail[name].expand(-1, logits.shape[1]).flatten() for name in ("temperature", "top_k", "top_p"))
        weights = weights_on_device(logits.flatten(0, 1), *settings, mode).view_as(logits)
        p = weights / weights.sum(-1, keepdim=True)
        q, shares = sure_conditionals(text) if self._conditionals is None else self._conditionals(length)
        accepted, own = decide_exact(p, text, count, q, shares, mail["accept"], mail["draw"])
        return accepted, own, torch.zeros_like(own, dtype=torch.bool)
