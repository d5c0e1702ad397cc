"""Speculative decoding of B texts at once, each at its own pace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from milonga.errors import UserError
from milonga.inference.acceptance import Accept, Decision, Rule
from milonga.inference.draft_length import DraftLength, Pace, Plan
from milonga.inference.drafters import DraftStream, SureDraft
from milonga.inference.runner import Runner
from milonga.inference.sampling import Sampler, Uniforms
from milonga.models.network import NetworkState
from milonga.state import batch_size, clone, merge, select

# A byte that the verification leaves undecided is decided by reading all bytes since the beginning of the call one by
# one, which gives bit for bit what plain decoding has there. Where there are more than so many, only the last is read.
REPLAY = 2048

Until = Callable[[int], bool]  # told every byte that is written, says whether the text ends behind it


@dataclass
class SpeculationStats:
    """What speculation did, summed over rows and calls."""

    drafted: int = 0  # bytes that were proposed
    examined: int = 0  # of these, the ones the verifier came to
    accepted: int = 0  # of these, the ones that stood
    written: int = 0  # bytes that verifications gave
    verifications: int = 0  # pieces verified: one for each row of a round
    rounds: int = 0  # passes of the verifier, all rows at once
    redone: int = 0  # bytes decided by single steps, because the two likeliest were too close (rule `greedy`)
    replayed: int = 0  # the single steps this took
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # passes, decisions and commits; of rounds launched ahead what was waited for

    @property
    def acceptance(self) -> float:
        """Share of the examined bytes that stood; 0 where none was examined."""
        return self.accepted / max(self.examined, 1)

    @property
    def bytes_per_verification(self) -> float:
        """Bytes written for each pass over a row: from 1 to 1 + draft."""
        return self.written / max(self.verifications, 1)

    def predicted_speedup(self, step_seconds: float) -> float:
        """How many times as fast as plain decoding, which takes `step_seconds` for one byte of every row: bytes of a
        verification, over the price of a round in plain steps. NaN before the first round."""
        seconds = self.draft_seconds + self.verify_seconds
        return self.bytes_per_verification * step_seconds * self.rounds / seconds if seconds > 0 else float("nan")


@dataclass(frozen=True)
class Rounds:
    """How rounds go.

    Args:
        runner: of the verifier, for all rows.
        single: of the verifier, for the single steps of one row that plain decoding takes.
        accept: the rule.
        draft: how much to draft for the next round, asked before each.
        replay: whether the rule leaves bytes undecided.
        stats: counted on.
        warmth: the temperature of the drafter's draws, from that of the texts.
    """

    runner: Runner
    single: Runner
    accept: Accept
    draft: Callable[[], DraftLength]
    replay: bool
    stats: SpeculationStats
    warmth: Callable[[float], float] = float


@dataclass(frozen=True)
class Texts:
    """B texts to go on with.

    Args:
        stream: the drafter, behind them.
        state: the verifier's, behind them: B rows.
        logits: `[B V]`, of the next bytes.
        samplers: one for each row, standing there.
        limits: bytes to write, for each row, >= 0.
        until: for each row, what ends it early.
    """

    stream: DraftStream
    state: NetworkState
    logits: Float[Tensor, "B V"]
    samplers: Sequence[Sampler]
    limits: Sequence[int]
    until: Sequence[Until] | None = None

    def check(self, rule: Rule) -> None:
        """Raises:
        UserError: if they are not all for the same number of texts, a limit is no whole number or below 0, or the
            temperatures are not one, which is 0 with rule `greedy`.
        """
        rows = {
            "logits": len(self.logits),
            "stream": len(self.stream.token_bytes),
            "samplers": len(self.samplers),
            "limits": len(self.limits),
        }
        if count := batch_size(self.state):  # of layers without a state there is none
            rows = {"state": count, **rows}
        if self.until is not None:
            rows["until"] = len(self.until)
        if len(set(rows.values())) > 1 or not rows["limits"]:
            found = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise UserError(f"speculative rows: all must be for the same number of texts, 1 or more, got {found}")
        for row, limit in enumerate(self.limits):
            if not isinstance(limit, Integral) or int(limit) < 0:
                raise UserError(f"speculative rows: limits must be whole numbers, 0 or more, got {limit} for row {row}")
        warm = sorted({sampler.sampling.temperature for sampler in self.samplers})
        if rule == "greedy" and warm != [0]:
            raise UserError(
                f"speculative rows: with rule 'greedy' samplers must have temperature 0, got {warm[-1]:g}; "
                "make them of `decoder.settings(sampling)`"
            )
        if len(warm) > 1:
            raise UserError(
                f"speculative rows: samplers must have one temperature, got {', '.join(f'{each:g}' for each in warm)}"
            )


@dataclass
class _Row:
    """One text in progress."""

    sampler: Sampler
    left: int  # bytes that it may still get
    until: Until | None
    last: int | None = None  # written, not read yet
    origin: NetworkState | None = None  # bit for bit what single steps give (None: the batch's first state) ...
    since: bytearray | None = None  # ... and the bytes read since; None: too many

    def __post_init__(self) -> None:
        seed = self.sampler.sampling.seed
        assert seed is not None
        self.uniforms, self.pace = Uniforms(seed), Pace()

    def dice(self, ahead: int, lane: int) -> float:
        """As `Dice`."""
        return self.uniforms(self.sampler.position + ahead, lane)

    def write(self, data: bytes) -> bytes:
        """What of `data` is written: as much as may be, up to the byte that ends the text."""
        for index, byte in enumerate(data):
            self.left -= 1
            self.last = byte
            if self.until is not None and self.until(byte):
                self.left = 0
            if self.left == 0:
                return data[: index + 1]
        return data


class SpeculativeRows:
    """B texts that a verifier and a drafter write together. Rows that are through ride along without moving.

    Made by `SpeculativeDecoder.rows`.
    """

    def __init__(self, rounds: Rounds, texts: Texts):
        ends = list(texts.until) if texts.until is not None else [None] * len(texts.limits)
        self._rows = [_Row(*parts) for parts in zip(texts.samplers, texts.limits, ends, strict=True)]
        self._runner, self._single, self._accept = rounds.runner, rounds.single, rounds.accept
        self._draft, self._stats, self._warmth = rounds.draft, rounds.stats, rounds.warmth
        self._stream, self._state, self._logits, self._first = texts.stream, texts.state, texts.logits, texts.state
        for row in self._rows:
            row.since = bytearray() if rounds.replay else None
        self._begun = False

    @property
    def done(self) -> bool:
        """Whether every row has all its bytes."""
        return all(row.left == 0 for row in self._rows)

    @torch.inference_mode()
    def round(self) -> list[bytes]:
        """One pass of the verifier: -> the bytes that each row got, none where it is through. The first call gives one
        byte each, from the logits that are there."""
        before = self._state, [row.last for row in self._rows]
        try:
            written = self._round() if self._begun else self._begin()
        except BaseException:  # interrupted, or a broken model: `finish` still knows what was written before
            self._go_back(before[0])
            for row, last in zip(self._rows, before[1], strict=True):
                row.last, row.left = last, 0
            raise
        self._stream.extend(written)
        return written

    def ahead(self) -> None:
        """Begin the next round where a device can work on it in the meantime: `round` then has less to wait for. What
        fails leaves everything as it was."""

    def _go_back(self, state: NetworkState) -> None:
        """Stand where the verifier's state was this, before a round that failed."""
        self._state = state

    def _begin(self) -> list[bytes]:
        self._begun = True
        host = self._logits.cpu().numpy()
        return [
            row.write(bytes([row.sampler.draw(logits)])) if row.left else b""
            for row, logits in zip(self._rows, host, strict=True)
        ]

    def _round(self) -> list[bytes]:
        if self.done:
            return [b""] * len(self._rows)
        began = time.perf_counter()
        plans = self._plans()
        limit = max(plan.bytes for plan in plans)
        dice = [row.dice for row in self._rows]
        temperature = self._warmth(self._rows[0].sampler.sampling.temperature)
        drafts = self._stream.draft(limit, temperature, dice) if limit > 0 else [SureDraft()] * len(self._rows)
        counts = [min(len(draft.text), plan.bytes) for draft, plan in zip(drafts, plans, strict=True)]
        verifying = time.perf_counter()
        fed = [
            bytes([row.last or 0]) + draft.text[:count]
            for row, draft, count in zip(self._rows, drafts, counts, strict=True)
        ]
        self._runner.ensure(self._longest() + limit)
        logits, trace = self._runner.verify(self._tokens(fed), self._state)
        host = logits.cpu().numpy()
        decisions = [
            self._accept(scores, draft, count, row.sampler) if row.left else None
            for row, scores, draft, count in zip(self._rows, host, drafts, counts, strict=True)
        ]
        texts = [draft.text[:count] for draft, count in zip(drafts, counts, strict=True)]
        written = self._write(texts, decisions)
        self._state = self._runner.commit(self._state, trace, [len(data) for data in written])
        self._decide_open(fed, decisions, written)
        self._stats.draft_seconds += verifying - began
        self._stats.verify_seconds += time.perf_counter() - verifying
        return written

    def _write(self, drafts: Sequence[bytes], decisions: Sequence[Decision | None]) -> list[bytes]:
        """What the rows get of their drafts, and of the bytes that the verifier put behind them."""
        self._count(decisions, [len(draft) for draft in drafts])
        return [
            b"" if decision is None else row.write(_stood(draft, decision))
            for row, draft, decision in zip(self._rows, drafts, decisions, strict=True)
        ]

    def _decide_open(self, fed: list[bytes], decisions: Sequence[Decision | None], written: list[bytes]) -> None:
        """Decide what the verification of `fed` left open, once the state stands behind what it wrote."""
        for index, (row, decision) in enumerate(zip(self._rows, decisions, strict=True)):
            kept = fed[index][: len(written[index])]
            if decision is not None and decision.byte is None and row.left:
                token = fed[index][decision.accepted : decision.accepted + 1]
                logits = self._redo(index, row, kept, token)
                written[index] += row.write(bytes([row.sampler.draw(logits)]))
            elif row.since is not None:
                row.since += kept
                if len(row.since) > REPLAY:
                    row.since, row.origin = None, None
        self._stats.written += sum(map(len, written))

    def _redo(self, index: int, row: _Row, kept: bytes, token: bytes) -> np.ndarray:
        """Read `token` by a single step: -> the logits behind it `[V]`. The row's state moves behind it."""
        if row.since is None:
            state, text = select(self._state, [index]), token
        else:
            state = row.origin if row.origin is not None else select(self._first, [index])
            text = bytes(row.since) + kept + token
        logits = None
        for byte in text:
            logits, state = self._single.step(self._tokens([bytes([byte])]), state)
        assert logits is not None
        if row.since is not None:
            row.origin, row.since = clone(state), bytearray()
        self._state = _with_row(self._state, index, state)
        self._stats.redone += 1
        self._stats.replayed += len(text)
        return logits[0].cpu().numpy()

    @torch.inference_mode()
    def finish(self) -> tuple[NetworkState, Float[Tensor, "B V"]]:
        """Read the last byte of every row, by a single step: -> (the state behind all that was written, the logits of
        the next bytes). No round follows."""
        if any(row.last is not None for row in self._rows):
            keep = [0 if row.last is None else 1 for row in self._rows]
            self._runner.ensure(self._longest())
            logits, trace = self._runner.verify(
                self._tokens([bytes([row.last or 0]) for row in self._rows]), self._state
            )
            self._state = self._runner.commit(self._state, trace, keep)
            moved = torch.tensor(keep, dtype=torch.bool, device=logits.device)
            self._logits = torch.where(moved[:, None], logits[:, 0], self._logits.to(logits.dtype))
            for row in self._rows:
                row.last = None
        for row in self._rows:
            row.left = 0
        return clone(self._state), self._logits.clone()  # the runner may use its buffers again

    def _longest(self) -> int:
        """Tokens of the longest text, with the last byte, which is not read yet."""
        return max(row.sampler.position for row in self._rows)

    def _tokens(self, texts: Sequence[bytes]) -> Tensor:
        longest = max(map(len, texts))
        values = np.frombuffer(b"".join(text.ljust(longest, b"\0") for text in texts), np.uint8)
        tokens = torch.from_numpy(values.reshape(len(texts), longest).astype(np.int64))
        return tokens.to(self._logits.device)

    def _plans(self) -> list[Plan]:
        """What to draft for each row: never more than it may still get, less the verifier's own byte; nor more tokens
        than bytes."""
        length, token_bytes = self._draft(), self._stream.token_bytes
        plans = [row.pace.plan(length, size) for row, size in zip(self._rows, token_bytes, strict=True)]
        most = [max(min(plan.bytes, row.left - 1), 0) for plan, row in zip(plans, self._rows, strict=True)]
        return [Plan(min(plan.tokens, count), count) for plan, count in zip(plans, most, strict=True)]

    def _count(self, decisions: Sequence[Decision | None], counts: Sequence[int]) -> None:
        stats = self._stats
        stats.rounds += 1
        for row, decision, count in zip(self._rows, decisions, counts, strict=True):
            if decision is not None:
                examined = decision.accepted + (decision.byte is not None and decision.accepted < count)
                stats.verifications += 1
                stats.drafted += count
                stats.accepted += decision.accepted
                stats.examined += examined
                row.pace.saw(examined, decision.accepted)


def _stood(draft: bytes, decision: Decision) -> bytes:
    own = b"" if decision.byte is None else bytes([decision.byte])
    return draft[: decision.accepted] + own


def _with_row(state: NetworkState, index: int, row: NetworkState) -> NetworkState:
    """The state with another row at `index`."""
    rows = next(part for layer in state for part in layer).shape[0]
    if rows == 1:
        return row
    parts = [select(state, range(index)), row, select(state, range(index + 1, rows))]
    return merge([part for part, count in zip(parts, (index, 1, rows - index - 1), strict=True) if count])
