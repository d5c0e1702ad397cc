"""Verifying a draft without the host: the pass over it, which bytes stand, and the commit, one after the other.

The rules are those of `milonga.inference.acceptance`, with the same numbers, for B rows at once; the host sends one
array before and reads one behind.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from milonga.inference.acceptance import LANE_ACCEPT
from milonga.inference.captured import Replay, copy_state
from milonga.inference.device_drafting import Mailbox, preserving, tensors_of
from milonga.inference.device_sampling import Mode, weights_on_device
from milonga.inference.passes import commit_side_by_side, read_piece
from milonga.inference.sampling import Sampler, Uniforms
from milonga.layers.base import Trace
from milonga.models.network import Network, NetworkState
from milonga.ops.speculation import (
    Draft,
    VerdictInputs,
    Verdicts,
    Vocabulary,
    conditionals,
    decide_,
    decide_exact,
    decide_greedy,
    sure_conditionals,
    write_verdicts,
)

STREAMS = 7  # on which commits run side by side; odd, so that layers that alternate are spread
PIECE = 8  # bytes that are read together are padded to a multiple of so many


class Verdict(NamedTuple):
    """What became of one row's draft, as the host reads it."""

    drafted: bytes
    accepted: int
    byte: int | None  # the verifier's own behind them; None: undecided
    broken: bool  # the logits that decided are not finite


class DeviceVerifier:
    """Static buffers in which a byte model verifies drafts of B rows and moves behind what stood.

    Rounds call it in inference mode: an entry to that for each call would take as long as what is called.

    Args:
        network: its state must not grow.
        rows: B.
        limit: L, bytes of a draft at most.
        drafts: on the device, of this vocabulary; None: the host sends them, without dice.
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
        drafts: tuple[Draft, Vocabulary] | None = None,
        tie: float = 0.0,
    ):
        self.network, self.rows, self.limit, self._tie = network, rows, limit, tie
        self._device = network.embedding.weight.device
        integers = {"last": 1, "active": 1, "top_k": 1, "count": 1, "text": limit + 1}
        floats = {"accept": limit + 1, "draw": limit + 1, "temperature": 1, "top_p": 1}
        self._mail = Mailbox(rows, integers, floats, self._device)
        mail = self._mail.device
        self._draft, self._vocabulary = drafts or (None, None)
        self._text = mail["text"] if self._draft is None else self._draft.text
        self._count = mail["count"][:, 0] if self._draft is None else self._draft.count
        self._inputs = VerdictInputs(mail["active"], mail["accept"], mail["draw"], mail["temperature"])
        self.state: NetworkState = network.init_state(rows)
        self._before = network.init_state(rows)  # the state before the last pass
        self._verdicts = Verdicts(
            torch.zeros(rows, limit + 5, dtype=torch.int64, device=self._device),
            torch.zeros(rows, dtype=torch.int64, device=self._device),
        )
        cuda = self._device.type == "cuda"
        self._answer = torch.zeros(rows, limit + 5, dtype=torch.int64, pin_memory=cuda)
        self._streams = [torch.cuda.Stream(self._device) for _ in range(STREAMS)] if cuda else []
        self._passes: dict[tuple[int, Mode], Replay[tuple[Trace, ...]]] = {}
        self._moves: dict[tuple[int, Mode], Replay[None]] = {}
        self._again: dict[tuple[int, Mode], Replay[None]] = {}
        self._last: tuple[tuple[int, Mode], tuple[Trace, ...]] | None = None
        self._moved = False

    def free(self) -> None:
        """Let go of the graphs, which hold this verifier: with the last reference to it its memory is free."""
        self._passes.clear()
        self._moves.clear()
        self._again.clear()
        self._last = None

    @torch.no_grad()
    def load(self, state: NetworkState) -> None:
        """Stand behind other texts."""
        copy_state(self.state, state)
        self._moved = False

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
        """Begin to read the last byte and the draft of every row, and to decide; `move` moves on.

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
            self._passes[key] = Replay(self._passing(length, mode), self._device)
        self._last = key, self._passes[key]()
        self._answer.copy_(self._verdicts.result, non_blocking=True)

    def move(self) -> None:
        """Begin to move behind what stands. Apart from `verify`: the host need not wait for it to see the verdicts."""
        assert self._last is not None
        key, trace = self._last

        def work() -> None:
            copy_state(self._before, self.state)
            commit_side_by_side(self.network, self.state, trace, self._verdicts.keep, self._streams)

        if self._device.type == "cuda":
            if key not in self._moves:
                changed = [*tensors_of(self.state), *tensors_of(self._before)]
                self._moves[key] = Replay(work, self._device, preserving(work, lambda: changed))
            self._moves[key]()
        else:  # without a graph the trace is another one each time
            work()
        self._moved = True

    def stay(self) -> None:
        """What was passed so far stands: `undo` does not go back behind it."""
        self._moved = False

    def verdicts(self) -> list[Verdict]:
        """What came of it. The device must have been waited for."""
        found = []
        for numbers in self._answer.tolist():
            accepted, byte, undecided, broken, count = numbers[:5]
            found.append(Verdict(bytes(numbers[5 : 5 + count]), accepted, None if undecided else byte, bool(broken)))
        return found

    def undo(self) -> None:
        """Go back to before the last pass, if there was one since `load` or `stay`."""
        if self._moved:
            copy_state(self.state, self._before)
            self._moved = False

    def keep(self, counts: Sequence[int]) -> None:
        """Stand behind the first `counts[b]` bytes of the last piece instead."""
        assert self._last is not None and self._moved
        key, trace = self._last
        self._verdicts.keep.copy_(torch.tensor(counts, dtype=torch.int64))

        def work() -> None:
            copy_state(self.state, self._before)
            self.network.commit_(self.state, trace, self._verdicts.keep)

        if self._device.type == "cuda":
            if key not in self._again:
                self._again[key] = Replay(work, self._device)  # may be done any number of times
            self._again[key]()
        else:  # without a graph the trace is another one each time
            work()

    def _passing(self, length: int, mode: Mode) -> Callable[[], tuple[Trace, ...]]:
        """One pass over `length` bytes of each row, and its verdicts: -> its trace. The state stays."""
        mail, text = self._mail.device, self._text[:, : length - 1]

        def work() -> tuple[Trace, ...]:
            fed = torch.cat([mail["last"], text], 1)
            logits, trace = read_piece(self.network, fed, self.state)
            self._decide(logits, text, mode)
            return trace

        return work

    def _decide(self, logits: Float[Tensor, "B T V"], text: Int[Tensor, "B L"], mode: Mode) -> None:
        if mode == "plain" or (mode == "greedy" and self._tie == 0):
            drawn = (None, None) if mode == "greedy" else (self._draft, self._vocabulary)
            decide_(logits, text, self._count, *drawn, self._inputs, self._verdicts, mode == "greedy")
            return
        mail, count = self._mail.device, self._count.clamp_max(text.shape[1])
        if mode == "greedy":
            accepted, own, undecided = decide_greedy(logits, text, count, self._tie)
        else:
            temperature, top_k, top_p = (
                mail[name].expand(-1, logits.shape[1]).flatten() for name in ("temperature", "top_k", "top_p")
            )
            weights = weights_on_device(logits.flatten(0, 1), temperature, top_k, top_p, mode).view_as(logits)
            p = weights / weights.sum(-1, keepdim=True)
            if self._draft is None or self._vocabulary is None:
                q, shares = sure_conditionals(text)
            else:
                q, shares = conditionals(self._draft, self._vocabulary, text.shape[1])
            accepted, own = decide_exact(p, text, count, q, shares, mail["accept"], mail["draw"])
            undecided = torch.zeros_like(own, dtype=torch.bool)
        write_verdicts(logits, text, count, accepted, own, undecided.long(), self._inputs, self._verdicts)
