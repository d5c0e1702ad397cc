"""Writing a text token by token: what comes out, when it ends, and what is known afterwards."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from milonga.data.text import TextCodec, Utf8Stream
from milonga.errors import UserError
from milonga.inference.sampling import Sampler, Sampling, log2_probabilities

Piece = TypeVar("Piece", str, bytes)
StopReason = Literal["length", "stop", "closed"]


class Logprob(NamedTuple):
    """How likely the model itself thought a token that was written, before any setting of the sampling."""

    token: bytes
    log2: float  # base-2 logarithm of its probability: minus the bits that it costs
    alternatives: tuple[tuple[bytes, float], ...]  # the likeliest tokens there and theirs, the likeliest first


class Writer(Protocol):
    """What a generation needs of a session."""

    @property
    def codec(self) -> TextCodec: ...
    @property
    def pending(self) -> bytes: ...
    @property
    def position(self) -> int: ...
    @property
    def place(self) -> object: ...
    @property
    def sampling(self) -> Sampling | None: ...
    @sampling.setter
    def sampling(self, sampling: Sampling | None) -> None: ...
    @property
    def logits(self) -> np.ndarray: ...
    def read_ids(self, ids: np.ndarray) -> None: ...
    def sampler(self, sampling: Sampling, n: int | None = None) -> Sampler: ...


class StopFinder:
    """Finds the first of some texts in bytes that come in pieces, and holds back what could still become one.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: tuple[bytes, ...]):
        self._stops, self._held = stops, b""
        self.found: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """More of the text: -> the bytes that are certain now to stand before any stop.

        Once `found` is set, what was returned is all of the text before it. Of several, the one that is complete first
        counts; of those that end together, the longest.
        """
        for index in range(len(data)):
            held = self._held + data[: index + 1]
            ending = [stop for stop in self._stops if held.endswith(stop)]
            if ending:
                self.found, self._held = max(ending, key=len), b""
                return held[: len(held) - len(self.found)]
        text = self._held + data
        keep = self._could_begin_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> bytes:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, b""
        return held

    def _could_begin_a_stop(self, text: bytes) -> int:
        """The length of the longest ending of `text` that is the beginning of a stop, and not all of one."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            ending = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(ending) for stop in self._stops):
                return length
        return 0


class Generation(Generic[Piece]):
    """A text as it is written: an iterator over its pieces, which knows afterwards how it went.

    A token is drawn when the next piece is asked for, and read before the piece is given out. Nothing that was given
    out is kept, so a text may go on for as long as one likes. The text begins where the session stands when the first
    piece is asked for; from then on until the last one the session is to be left alone.

    Attributes:
        most_bytes: it ends behind the token that makes as many, too; infinite unless set.
        tokens: tokens written so far; their bytes may not all have been given out (see `Session.generate`).
        bytes: bytes of those tokens.
        seconds: time spent drawing and reading them.
        stop_reason: `length` (all that was asked for), `stop` (a stop text), `closed` (by `close`, or interrupted),
            and None while more is to come.
        stop: the stop text that ended it.
        logprobs: of every token, where they were asked for.
        seed: of the draws.
    """

    def __init__(
        self,
        session: Writer,
        n: int,
        sampler: Sampler,
        logprobs: int | None,
        pieces: Callable[["Generation[Piece]", Generator[bytes, None, None]], Generator[Piece, None, None]],
    ):
        self._session, self._n, self._sampler, self._alternatives = session, n, sampler, logprobs
        self._pieces = pieces(self, self._drawn())
        self._place = session.place
        self.most_bytes = math.inf
        self.tokens, self.bytes, self.seconds = 0, 0, 0.0
        self.stop_reason: StopReason | None = None
        self.stop: bytes | None = None
        self.logprobs: list[Logprob] = []
        assert sampler.sampling.seed is not None
        self.seed: int = sampler.sampling.seed

    @property
    def bytes_per_second(self) -> float:
        """Of the writing alone; NaN before the first token."""
        return self.bytes / self.seconds if self.seconds > 0 else float("nan")

    def __iter__(self) -> "Generation[Piece]":
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End it here: the session stays behind the last token written."""
        self._pieces.close()
        self.stop_reason = self.stop_reason or "closed"

    def _drawn(self) -> Generator[bytes, None, None]:
        """The bytes before any stop, as soon as they are certain."""
        finder = StopFinder(stops) if (stops := self._sampler.sampling.stop) else None
        try:
            self._begin()
            while self.tokens < self._n and self.bytes < self.most_bytes:
                data = self._token()
                certain = data if finder is None else finder.feed(data)
                if finder is not None and finder.found is not None:
                    self.stop_reason, self.stop = "stop", finder.found
                    yield certain
                    return
                yield certain
            self.stop_reason = "length"
            if finder is not None:
                yield finder.rest()
        finally:  # closed, interrupted, or a broken model
            self.stop_reason = self.stop_reason or "closed"

    @property
    def pending(self) -> bytes:
        """The beginning of a character that the session's text ends in."""
        return self._session.pending

    def _begin(self) -> None:
        """Stand where the session does now: it may have moved since this was made."""
        if self._session.place is not self._place:
            self._sampler = self._session.sampler(self._sampler.sampling, self._n)
            self._place = self._session.place
        self._session.sampling = self._sampler.sampling

    def _token(self) -> bytes:
        """Draw one token and read it."""
        if self._session.place is not self._place:
            raise UserError(
                f"generate: the session was moved to position {self._session.position} while a text was being written; "
                "close that generation, or take all of it, before the session reads or goes elsewhere"
            )
        began = time.perf_counter()
        logits = self._session.logits
        token = self._sampler.draw(logits)
        data = self._session.codec.token_bytes[token]
        self._session.read_ids(np.array([token]))
        self._place = self._session.place
        if self._alternatives is not None:
            self.logprobs.append(self._logprob(logits, token, self._alternatives))
        self.tokens, self.bytes = self.tokens + 1, self.bytes + len(data)
        self.seconds += time.perf_counter() - began
        return data

    def _logprob(self, logits: np.ndarray, token: int, count: int) -> Logprob:
        scores, names = log2_probabilities(logits), self._session.codec.token_bytes
        likeliest = np.argsort(-scores, kind="stable")[:count]
        return Logprob(names[token], float(scores[token]), tuple((names[i], float(scores[i])) for i in likeliest))


def as_bytes(generation: Generation[bytes], chunks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """The bytes as they are."""
    with closing(chunks):  # what goes wrong at their end is told, not left to the collector
        for data in chunks:
            if data:
                yield data


def as_text(
    pending: bytes | None = None,
) -> Callable[[Generation[str], Generator[bytes, None, None]], Generator[str, None, None]]:
    """Whole characters behind a text that ends in `pending`; bytes that are not UTF-8 come out as U+FFFD.

    A character that the last token cuts is left to the session, unless the text ends there by a stop.

    Args:
        pending: the beginning of a character; None for what the session ends in when the first piece is asked for.
    """

    def pieces(generation: Generation[str], chunks: Generator[bytes, None, None]) -> Generator[str, None, None]:
        stream = Utf8Stream(generation.pending if pending is None else pending)
        with closing(chunks):
            for data in chunks:
                text = stream.feed(data)
                if generation.stop_reason == "stop":
                    text += stream.flush()
                if text:
                    yield text

    return pieces
