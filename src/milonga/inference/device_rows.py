"""Speculative decoding of B texts with one wait for the device a round.

A round is launched as a whole: the drafter reads its last tokens again and draws, the verifier reads the draft, decides
which bytes stand and moves behind them. Then the host reads one small array: what was written. What it cannot leave to
the device (a byte too close to call, a text that ends amid what stood) it does as `SpeculativeRows` does.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from milonga.errors import UserError
from milonga.inference.acceptance import Decision
from milonga.inference.captured import CapturedRunner, grows
from milonga.inference.device_drafting import DeviceDrafter, vocabulary_of
from milonga.inference.device_sampling import device_mode
from milonga.inference.device_verification import PIECE, DeviceVerifier
from milonga.inference.draft_length import LONGEST, Plan
from milonga.inference.drafters import Drafter, DraftStream, NgramStream
from milonga.inference.language_model import LanguageModel
from milonga.inference.model_drafter import ModelDrafter, ModelStream
from milonga.inference.runner import Runner
from milonga.inference.sampling import Sampler
from milonga.inference.speculative_rows import Rounds, SpeculativeRows, Texts
from milonga.models.network import NetworkState
from milonga.ops.speculation import Vocabulary
from milonga.state import clone

LARGEST = 1 << 28  # bytes of the tables of a vocabulary, at most
KEPT = 4  # sets of buffers, with their graphs; the one that was not used for longest goes


_Key = tuple[int, int, bool]  # rows, bytes of a draft at most, greedy


class _Flight(NamedTuple):
    """A round that is launched, whose verdicts have not been seen."""

    wait: Callable[[], float]  # -> the seconds of its draft
    seconds: float  # that launching it took


class DeviceBuffers:
    """The static buffers of a verifier and its drafter, made for the numbers of rows that are asked for.

    One set of texts stands in those of a number of rows. Where another comes, the first is sent home, and comes back
    when it goes on. Texts that nobody holds any more are forgotten.

    Args:
        verifier: the byte model.
        drafter: it or another.
        tie: for rule `greedy`, see `accept_greedy`.
    """

    def __init__(self, verifier: LanguageModel, drafter: Drafter, tie: float):
        self._verifier, self._drafter, self._tie = verifier, drafter, tie
        self._vocabulary: Vocabulary | None = None
        self._made: dict[_Key, tuple[DeviceVerifier, DeviceDrafter | None]] = {}  # the one used last comes last
        self._owners: weakref.WeakValueDictionary[_Key, DeviceRows] = weakref.WeakValueDictionary()

    @staticmethod
    def serves(verifier: LanguageModel, drafter: Drafter, runner: Runner) -> bool:
        """Whether rounds can run on the device: everything is captured, and no state grows."""
        if not isinstance(runner, CapturedRunner) or grows(verifier.network):
            return False
        if not isinstance(drafter, ModelDrafter):
            return True
        model, vocabulary = drafter.model, drafter.vocabulary
        size = 257 * 4 * len({token[:depth] for token in drafter.tokens for depth in range(len(token))})
        size += 16 * len(vocabulary) * vocabulary.longest
        captured = isinstance(drafter.runner, CapturedRunner) and model.device == verifier.device
        return captured and size <= LARGEST and not grows(model.network)

    def take(self, owner: "DeviceRows", greedy: bool, longest: int) -> tuple[DeviceVerifier, DeviceDrafter | None]:
        """The buffers, with this owner's texts in them."""
        key = owner.count, -(-(max(longest, LONGEST) + 1) // PIECE) * PIECE - 1, greedy
        made = self._made.pop(key, None)
        if made is None:
            while len(self._made) >= KEPT:
                self._drop(next(iter(self._made)))
            made = self._make(*key)
        self._made[key] = verifier, drafter = made
        before = self._owners.get(key)
        if before is not owner:
            if before is not None:
                before.leave()
            owner.leave()  # buffers of another size
            self.give_back(owner)
            self._send_streams_home()
            self._owners[key] = owner
            verifier.load(owner.state)
        return verifier, drafter

    def give_back(self, owner: "DeviceRows") -> None:
        """These texts are through."""
        for key in [key for key, other in self._owners.items() if other is owner]:
            del self._owners[key]

    def _send_streams_home(self) -> None:
        """Texts that nobody holds may have left a stream that somebody does."""
        for key, (_, drafter) in self._made.items():
            if drafter is not None and key not in self._owners:
                drafter.leave()

    def _drop(self, key: _Key) -> None:
        """Free a set of buffers; the texts in it, if any, are sent home."""
        verifier, drafter = self._made.pop(key)
        owner = self._owners.pop(key, None)
        if owner is not None:
            owner.leave()
        if drafter is not None:
            drafter.leave()
            drafter.free()
        verifier.free()

    def _make(self, rows: int, limit: int, greedy: bool) -> tuple[DeviceVerifier, DeviceDrafter | None]:
        network, tie = self._verifier.network, self._tie if greedy else 0.0
        if not isinstance(self._drafter, ModelDrafter):
            return DeviceVerifier(network, rows, limit, tie=tie), None
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._drafter)
        drafter = DeviceDrafter(self._drafter, self._vocabulary, rows, limit, limit, greedy)
        verifier = DeviceVerifier(network, rows, limit, drafts=(drafter.drafted, self._vocabulary), tie=tie)
        return verifier, drafter


class DeviceRows(SpeculativeRows):
    """`SpeculativeRows` whose rounds run on the device. Arguments as there, and the buffers."""

    def __init__(self, buffers: DeviceBuffers, rounds: Rounds, texts: Texts):
        super().__init__(rounds, texts)
        mode = device_mode([sampler.sampling for sampler in texts.samplers])
        assert mode is not None
        self._buffers, self._mode = buffers, mode
        self._verifier: DeviceVerifier | None = None
        self._drafter: DeviceDrafter | None = None
        self._flight: _Flight | None = None
        self.count, self._room = len(texts.samplers), 0
        self._device = device = texts.logits.device
        self._times = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if device.type == "cuda" else None

    @staticmethod
    def serves(stream: DraftStream, samplers: Sequence[Sampler]) -> bool:
        """Whether the device draws as these samplers do, from what such a stream drafts."""
        return isinstance(stream, ModelStream | NgramStream) and device_mode([s.sampling for s in samplers]) is not None

    @property
    def state(self) -> NetworkState:
        """The verifier's, behind all but the last byte of every text."""
        assert self._flight is None
        return self._state

    @torch.inference_mode()
    def ahead(self) -> None:
        """As `SpeculativeRows.ahead`: launches the next round."""
        if self._begun and self._flight is None and not self.done:
            try:
                self._flight = self._take_off()
            except BaseException:
                self._go_back(self._state)
                raise

    def leave(self) -> None:
        """Take the states home: others come into the buffers."""
        self._turn_back()
        if self._verifier is not None and self._state is self._verifier.state:
            self._state = clone(self._state)
        if self._drafter is not None:
            self._drafter.leave()
        self._verifier = self._drafter = None

    def _go_back(self, state: NetworkState) -> None:
        """As there: undoes the round that was launched last, once the device is through with it, since what it still
        reads is the host's to write again from here on."""
        super()._go_back(state)
        self._flight = None
        if self._times is not None:
            torch.cuda.current_stream(self._device).synchronize()
        if self._verifier is not None and state is self._verifier.state:
            self._verifier.undo()
        if self._drafter is not None:
            self._drafter.undo()

    def _turn_back(self) -> None:
        """Nobody wants the round that is under way any more."""
        if self._flight is not None:
            self._go_back(self._state)

    def finish(self) -> tuple[NetworkState, Float[Tensor, "B V"]]:
        """As `SpeculativeRows.finish`."""
        self._turn_back()
        found = super().finish()
        self.leave()
        self._buffers.give_back(self)
        return found

    def _round(self) -> list[bytes]:
        if self.done:
            return [b""] * len(self._rows)
        flight, began = self._flight or self._take_off(), time.perf_counter()
        self._flight = None
        drafting = flight.wait()
        verifier = self._verifier
        assert verifier is not None
        if self._drafter is not None:
            self._drafter.stay()
        verdicts = verifier.verdicts()
        if any(verdict.broken and row.left for verdict, row in zip(verdicts, self._rows, strict=True)):
            raise UserError("generate: the model predicts nan or infinity for the next token; its weights are damaged")
        decisions = [
            Decision(verdict.accepted, verdict.byte) if row.left else None
            for verdict, row in zip(verdicts, self._rows, strict=True)
        ]
        drafts = [verdict.drafted for verdict in verdicts]
        for row, draft, decision in zip(self._rows, drafts, decisions, strict=True):
            if decision is not None:
                for byte in (*draft[: decision.accepted], *([] if decision.byte is None else [decision.byte])):
                    row.sampler.accept(byte)
        fed = [bytes([row.last or 0]) + draft for row, draft in zip(self._rows, drafts, strict=True)]
        written = self._write(drafts, decisions)
        moved = [0 if d is None else d.accepted + (d.byte is not None) for d in decisions]
        keep = [len(data) for data in written]
        if keep != moved:  # a text ended amid what stood
            verifier.keep(keep)
        self._decide_open(fed, decisions, written)
        seconds = flight.seconds + time.perf_counter() - began
        drafting = min(drafting, seconds)  # the device may have been at it while nobody waited
        self._stats.draft_seconds += drafting
        self._stats.verify_seconds += seconds - drafting
        return written

    def _take_off(self) -> _Flight:
        """Launch a round."""
        if self._verifier is not None:
            self._verifier.stay()  # what fails from here on undoes this round, not the one before
        began = time.perf_counter()
        plans = self._plans()
        wait = self._launch(self._come_in(max(plan.bytes for plan in plans)), plans)
        return _Flight(wait, time.perf_counter() - began)

    def _come_in(self, longest: int) -> DeviceVerifier:
        self._room = max(self._room, longest)  # a text near its end stays where it is
        verifier, self._drafter = self._buffers.take(self, self._mode == "greedy", self._room)
        if self._state is not verifier.state:  # after a byte that single steps decided
            verifier.load(self._state)
            self._state = verifier.state
        self._verifier = verifier
        return verifier

    def _launch(self, verifier: DeviceVerifier, plans: Sequence[Plan]) -> Callable[[], float]:
        """Draft and verify: -> what waits for the verdicts, and tells the seconds of the draft."""
        drafts, began = None, time.perf_counter()
        samplers, uniforms = [row.sampler for row in self._rows], [row.uniforms for row in self._rows]
        mark = self._marking()
        mark(0)
        temperature = self._warmth(samplers[0].sampling.temperature)
        longest = max(plan.bytes for plan in plans)
        if isinstance(self._stream, ModelStream):
            assert self._drafter is not None
            self._drafter.take(self._stream)
            if longest:
                self._drafter.draft(plans, [sampler.position for sampler in samplers], uniforms, temperature)
            else:
                self._drafter.skip()
        elif longest:
            dice = [row.dice for row in self._rows]
            found = self._stream.draft(longest, temperature, dice)
            drafts = [draft.text[: plan.bytes] for draft, plan in zip(found, plans, strict=True)]
        else:
            drafts = [b""] * len(plans)
        mark(1)
        drafted = time.perf_counter()
        lasts, active = [row.last or 0 for row in self._rows], [row.left > 0 for row in self._rows]
        verifier.verify(longest, self._mode, lasts, active, samplers, uniforms, drafts)
        mark(2)
        verifier.move()
        if self._drafter is not None:
            self._drafter.settle()
        if self._times is None:
            return lambda: drafted - began
        first, second, last = self._times

        def wait() -> float:
            last.synchronize()
            return first.elapsed_time(second) / 1e3

        return wait

    def _marking(self) -> Callable[[int], None]:
        """-> what notes a time of a round, of 0 to 2, where the device comes to it."""
        if self._times is None:
            return lambda number: None
        times, stream = self._times, torch.cuda.current_stream(self._device)
        return lambda number: times[number].record(stream)
