"""Speculative decoding: a drafter proposes bytes, a byte model checks a whole draft in one forward pass.

The verifier's state stands behind all of a text but its last byte. A round reads that byte and the draft in one piece
from this state, decides which of them stand (`milonga.inference.acceptance`), and commits exactly those, without
reading them again. So a round costs one pass of the verifier and gives one byte more than stood of the draft.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from milonga.data.text import Text, text_bytes
from milonga.errors import UserError
from milonga.inference.acceptance import (
    RULES,
    TIE_FP32,
    TIE_FP64,
    Accept,
    Rule,
    accept_exact,
    accept_greedy,
    accept_top_k,
)
from milonga.inference.device_rows import DeviceBuffers, DeviceRows
from milonga.inference.draft_length import DraftLength, draft_length, is_count
from milonga.inference.drafters import Drafter, DraftStream
from milonga.inference.generation import Generation, Piece, StopFinder, as_bytes, as_text
from milonga.inference.language_model import LanguageModel
from milonga.inference.marks import Mark
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.runner import NetworkRunner, Runner
from milonga.inference.sampling import Sampler, Sampling
from milonga.inference.session import Session
from milonga.inference.session_arguments import tokens_asked
from milonga.inference.speculative_rows import Rounds, SpeculationStats, SpeculativeRows, Texts, Until
from milonga.models.network import NetworkState

DRAFT = 8  # bytes drafted for a round where nothing else is said


class SpeculativeDecoder:
    """Writes as the verifier would, faster: its passes are over whole drafts.

    Args:
        verifier: a model of bytes, of any layers.
        drafter: `ModelDrafter` or `NgramDrafter`.
        rule: which drafted bytes stand. `exact`: the text has the very distribution of plain sampling with the same
            settings. `greedy`: the text is that of plain decoding at temperature 0, which it implies. `top_k`: those
            among the `top` likeliest; lossy, the text is neither the verifier's nor the drafter's.
        draft: bytes drafted for a round, 1 or more; or `AdaptiveDraft`, `"adaptive"` for one of the usual prices.
        top: for rule `top_k`, 1 or more.
        tie: for rule `greedy`: where the best logit leads by no more than this share of the largest, the byte is
            decided by single steps. None: `TIE_FP32` or `TIE_FP64`; of networks in bf16 and fp16 0, for none: there the
            text is that of the verification's own arithmetic, and may part from plain decoding where rounding decides.
        runner: runs the verifier's network; None for the plain one.

    Attributes:
        stats: counts over all calls so far; to be set anew at will.

    Raises:
        UserError: if the verifier is not a model of bytes, or a setting is out of range.
    """

    def __init__(
        self,
        verifier: LanguageModel,
        drafter: Drafter,
        *,
        rule: Rule = "exact",
        draft: DraftLength | Literal["adaptive"] = DRAFT,
        top: int = 3,
        tie: float | None = None,
        runner: Runner | None = None,
    ):
        if list(verifier.codec.token_bytes) != [bytes([byte]) for byte in range(256)]:
            raise UserError(
                f"speculative decoding: the verifier {verifier.path or 'in memory'} reads '{verifier.codec.name}' "
                "tokens; it has to be a model of bytes (a model of subwords can be the drafter)"
            )
        if rule not in RULES:
            raise UserError(f"speculative decoding: rule must be one of {', '.join(RULES)}, got '{rule}'")
        if not is_count(top) or (tie is not None and not 0 <= tie < 1):
            raise UserError(
                f"speculative decoding: top must be a whole number, at least 1, and tie in [0, 1), got {top} and {tie}"
            )
        self.verifier, self.drafter, self.rule = verifier, drafter, rule
        self.draft: DraftLength = draft_length(draft)
        dtype = verifier.network.embedding.weight.dtype
        self.tie = {torch.float32: TIE_FP32, torch.float64: TIE_FP64}.get(dtype, 0.0) if tie is None else tie
        self.stats = SpeculationStats()
        self._runner = runner or NetworkRunner(verifier.network)
        rules: dict[Rule, Accept] = {
            "exact": accept_exact,
            "greedy": accept_greedy(self.tie),
            "top_k": accept_top_k(top),
        }
        self._accept = rules[rule]
        on_device = rule != "top_k" and DeviceBuffers.serves(verifier, drafter, self._runner)
        self._buffers = DeviceBuffers(verifier, drafter, self.tie) if on_device else None

    def generate(
        self,
        session: Session,
        n: int,
        sampling: Sampling | None = None,
        *,
        context: Text | None = None,
        stream: DraftStream | None = None,
    ) -> "SpeculativeGeneration[str]":
        """Write and read at most `n` bytes, given out as text, one round's bytes at a time.

        Args:
            session: of the verifier. It moves when the generation ends or is closed, behind all that was written; till
                then it is to stay where it is.
            n: bytes at most, >= 0.
            sampling: as for `Session.generate`; all its settings hold. With rule `greedy` the temperature is 0.
            context: the text that the session has read, or the end of it, for the drafter to read. None for the last
                bytes that the session remembers, at most 1024. The less the drafter knows, the fewer bytes stand; the
                text is as good.
            stream: instead, the drafter where an earlier generation left it, which knows.

        Raises:
            UserError: if the session is another model's, or a setting is out of range (at once); if the session was
                fed or moved before the generation ended: it stays where it was moved, without what was written.
        """
        start = self._start(session, n, sampling, context, stream)
        return SpeculativeGeneration(*start, as_text(session.pending))

    def generate_bytes(
        self,
        session: Session,
        n: int,
        sampling: Sampling | None = None,
        *,
        context: Text | None = None,
        stream: DraftStream | None = None,
    ) -> "SpeculativeGeneration[bytes]":
        """As `generate`, but the bytes, whether they are UTF-8 or not."""
        return SpeculativeGeneration(*self._start(session, n, sampling, context, stream), as_bytes)

    def rows(
        self,
        state: NetworkState,
        logits: Float[Tensor, "B V"],
        stream: DraftStream,
        samplers: Sequence[Sampler],
        limits: Sequence[int],
        until: Sequence[Until] | None = None,
    ) -> SpeculativeRows:
        """Write B texts at once.

        Args:
            state: the verifier's behind the texts, B rows.
            logits: of the next bytes.
            stream: `drafter.start(texts)`.
            samplers: one for each row, standing there (`Session.sampler`), of one temperature; with rule `greedy` 0
                (`settings` sees to it).
            limits: bytes to write, for each row, >= 0.
            until: for each row, told every byte that is written, says whether the text ends behind it.

        Raises:
            UserError: if one of them is of another number of rows, a limit is out of range, or a temperature is not as
                said.
        """
        texts = Texts(stream, state, logits, samplers, limits, until)
        texts.check(self.rule)
        rounds = Rounds(
            self._runner,
            NetworkRunner(self.verifier.network),
            self._accept,
            lambda: self.draft,
            self.rule == "greedy" and self.tie > 0,
            self.stats,
            self.drafter.temperature if isinstance(self.drafter, ModelDrafter) else float,
        )
        if self._buffers is not None and DeviceRows.serves(stream, samplers):
            return DeviceRows(self._buffers, rounds, texts)
        return SpeculativeRows(rounds, texts)

    def settings(self, sampling: Sampling | None) -> Sampling:
        """The settings that hold: with rule `greedy` the temperature is 0."""
        given = sampling or Sampling()
        return dataclasses.replace(given, temperature=0.0) if self.rule == "greedy" else given

    def _start(
        self, session: Session, n: int, sampling: Sampling | None, context: Text | None, stream: DraftStream | None
    ) -> tuple["SpeculativeDecoder", Session, int, Sampler, DraftStream]:
        n, here = tokens_asked(n), session.mark()
        if here.network is not self.verifier.network:
            raise UserError("speculative decoding: the session belongs to another model than the verifier")
        sampler = session.sampler(self.settings(sampling), n)
        session.sampling = sampler.sampling
        if stream is None:
            read = session.codec.decode(here.recent) if context is None else text_bytes(context)
            stream = self.drafter.start([read])
        return self, session, n, sampler, stream


class SpeculativeGeneration(Generation[Piece]):
    """A text as it is written by a `SpeculativeDecoder`: see `Generation`.

    Attributes:
        stream: the drafter, behind what was written so far: for a generation that goes on.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        session: Session,
        n: int,
        sampler: Sampler,
        stream: DraftStream,
        pieces: Callable[[Generation[Piece], Generator[bytes, None, None]], Generator[Piece, None, None]],
    ):
        super().__init__(session, n, sampler, None, pieces)
        self._decoder, self._speculated, self.stream = decoder, session, stream
        self._start: Mark | None = session.mark()

    def _drawn(self) -> Generator[bytes, None, None]:
        """The bytes before any stop, as soon as they are certain: as many at a time as a round gives."""
        finder = StopFinder(stops) if (stops := self._sampler.sampling.stop) else None
        certain = bytearray()

        def until(byte: int) -> bool:
            data = bytes([byte])
            certain.extend(data if finder is None else finder.feed(data))
            return finder is not None and finder.found is not None

        start, self._start = self._start, None
        assert start is not None
        text, limit = bytearray(), int(min(self._n, self.most_bytes))
        rows = self._decoder.rows(start.state, start.logits[None], self.stream, [self._sampler], [limit], [until])
        failed: BaseException | None = None
        try:
            while not rows.done:
                self._expect_at(start)
                began = time.perf_counter()
                (new,) = rows.round()
                text += new
                self.tokens, self.bytes = len(text), len(text)
                if finder is not None and finder.found is not None:
                    self.stop_reason, self.stop = "stop", finder.found
                elif rows.done:
                    self.stop_reason = "length"
                    certain += finder.rest() if finder is not None else b""
                given = bytes(certain)
                certain.clear()
                if len(text) > 1:  # the first byte is there at once, whatever is to be compiled
                    failed = _failure(rows.ahead)
                self.seconds += time.perf_counter() - began
                yield given  # before anything that went wrong, so that nobody misses it
                if failed is not None:
                    raise failed
            self.stop_reason = self.stop_reason or "length"
        finally:  # through, closed, interrupted, or a broken model
            self.stop_reason = self.stop_reason or "closed"
            if text and not sys.is_finalizing():  # at the end of the process there is nothing left to work with
                state, logits = rows.finish()
                self._expect_at(start)
                ids = self._speculated.codec.encode(bytes(text))
                self._speculated.rewind(start.advanced(ids, state, logits[0].clone(), self._speculated.codec))
            try:
                if failed is not None and not isinstance(failed, Exception):  # an interrupt, though nobody asked again
                    raise failed
            finally:
                del failed  # its traceback holds this frame

    def _expect_at(self, start: Mark) -> None:
        """Only from there does what was written follow."""
        if self._speculated.mark() is not start:
            raise UserError(
                "generate: the session was fed or moved before the text was ended, and stays there without what was "
                "written; close() the generation first, which brings the session behind its text, then feed it"
            )


def _failure(work: Callable[[], None]) -> BaseException | None:
    """Do it: -> what went wrong."""
    try:
        work()
    except BaseException as failed:
        return failed
    return None
