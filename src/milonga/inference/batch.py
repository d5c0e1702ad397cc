"""Many texts written at once: they join and leave while others go on, and nothing is padded."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from milonga.data.text import Text, TextCodec
from milonga.errors import UserError
from milonga.inference.captured import RUN, Decoder
from milonga.inference.device_sampling import device_mode
from milonga.inference.generation import StopFinder
from milonga.inference.marks import Mark
from milonga.inference.sampling import Sampler, Sampling, Uniforms, number_from_zero
from milonga.inference.session import Session, piece_length
from milonga.models.network import Network
from milonga.segments import Segments
from milonga.state import merge, select

Ended = Literal["length", "stop", "error"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """One text of a batch."""

    number: int


@dataclass(frozen=True, slots=True)
class Event:
    """What a step wrote of one text.

    Attributes:
        ticket: which text.
        data: bytes that are certain to stand before any stop text; may be empty.
        ended: why this is the last event of the text; None if it goes on. `error`: the model predicts NaN behind it, or
            its settings leave nothing to write there. The other texts go on.
        error: what went wrong then.
    """

    ticket: Ticket
    data: bytes
    ended: Ended | None = None
    error: str | None = None


@dataclass(slots=True)
class _Text:
    """A text from when it joins to when it leaves."""

    ticket: Ticket
    sampling: Sampling
    n: int | None
    place: Mark  # where it stands; once it has a row, without the state and the logits
    unread: np.ndarray  # ids of a prompt that are still to be read
    sampler: Sampler  # stands behind the prompt
    uniforms: Uniforms
    finder: StopFinder | None
    written: int = 0
    fresh: list[int] = field(default_factory=list)  # ids written since `place`

    @property
    def position(self) -> int:
        """Tokens read and written."""
        return self.place.position + len(self.fresh)


class Batch:
    """Texts that are written together, one token of each in a step.

    Made by `LanguageModel.batch`. Each text has its own settings, seed and length, and gives what a session alone
    gives, up to the rounding of products, whose order of summation may depend on how many rows there are. With `exact`
    it does not: what a text gives is the same to the last bit whoever else is there.

    Args:
        network: in eval mode.
        codec: the network's.
        session: makes a fresh session of the model.
        max_rows: texts that are written at once; others wait.
        exact: every step runs over `max_rows` rows, whoever is there, and every prompt is read by itself in the pieces
            that a session would read: what a text gives does not depend on the others to the last bit.
        keep: texts that ended by themselves whose sessions `leave` still gives: the newest. None: 4 times `max_rows`.

    Raises:
        UserError: if `max_rows` is below 1, or `keep` below 0.
    """

    def __init__(
        self,
        network: Network,
        codec: TextCodec,
        session: Callable[[], Session],
        *,
        max_rows: int = 16,
        exact: bool = False,
        keep: int | None = None,
    ):
        if keep is not None and keep < 0:
            raise UserError(f"batch: keep must be 0 or more, got {keep}")
        self._network, self.codec, self._session, self.exact = network, codec, session, exact
        self._device = network.embedding.weight.device
        buckets = [max_rows] if exact else None
        if buckets is None and self._device.type == "cpu":  # without graphs any number of rows will do
            buckets = list(range(1, max_rows + 1))
        self._decoder = Decoder(network, max_rows, capacity=2 * RUN, buckets=buckets)
        self._rows: list[_Text] = []  # text i has row i; rows behind the last text are idle
        self._waiting: deque[_Text] = deque()
        self._left: dict[Ticket, Session] = {}  # ended by themselves, not yet taken out; the oldest first
        self._keep = 4 * max_rows if keep is None else keep
        self._tickets, self._idle = 0, 0

    @property
    def rows(self) -> int:
        """Texts that have a row now."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Texts whose prompt is not read yet, or that wait for a row."""
        return len(self._waiting)

    def join(self, text: Session | Text, sampling: Sampling | None = None, n: int | None = None) -> Ticket:
        """Let a text be written from the next step on: a session goes on from where it stands and is not changed, a
        prompt is read first.

        Args:
            text: a session of this model, or bytes, str or an array of byte values.
            sampling: its settings; by default `Sampling()`.
            n: tokens at most; None for no limit.

        Raises:
            UserError: if n is not a whole number from 0 on, the settings leave nothing to write, or the text cannot be
                read.
            ValueError: if the session is of another model.
        """
        n = None if n is None else number_from_zero(n, "the number of tokens", "batch")
        ids = np.empty(0, np.int64)
        if isinstance(text, Session):
            place = text.mark()
            if place.network is not self._network:
                raise ValueError("batch: the session is of another model")
        elif self.exact:
            session = self._session()
            session.feed(text)
            place = session.mark()
        else:
            place, ids = self._session().mark(), self.codec.encode(text)
        chosen, unread = sampling or Sampling(), np.asarray(ids, np.int64)
        behind = place.advanced(unread, place.state, place.logits, self.codec) if len(unread) else place
        sampler = self._at(behind).sampler(chosen, n)  # what cannot be written is refused here
        chosen = sampler.sampling
        assert chosen.seed is not None
        finder = StopFinder(chosen.stop) if chosen.stop else None
        ticket = Ticket(self._tickets)
        self._waiting.append(_Text(ticket, chosen, n, place, unread, sampler, Uniforms(chosen.seed), finder))
        self._tickets += 1
        return ticket

    def step(self) -> list[Event]:
        """One token of every text that has a row, drawn on the host in float64 as a session draws: -> what was written.

        Prompts are read a piece at a time between the steps, so that texts in flight do not wait for a long one. A text
        for which nothing can be drawn ends with an event that says so; its session stands before that token.
        """
        events = self._admit()
        logits = self._decoder.logits[: len(self._rows)].cpu().numpy()
        chosen, broken = {}, {}
        for row, (text, scores) in enumerate(zip(self._rows, logits, strict=True)):
            try:
                chosen[text.ticket] = text.sampler.choose(scores)
            except UserError as error:
                broken[row] = str(error)
        events += self._break(broken)
        if not self._rows:
            return events
        ids = [chosen[text.ticket] for text in self._rows]  # rows have moved up where texts ended
        rows = self._make_room(1)
        self._decoder.tokens[: len(ids), 0].copy_(torch.tensor(ids))
        self._decoder.step(rows)
        return events + self._written(np.array([ids]))

    def run(self, steps: int = RUN) -> list[Event]:
        """As many steps as `steps`, drawn on the device without waiting for it: for throughput.

        Fewer where a text reaches its length before. Where settings need the host (see `device_mode`) or have stop
        texts, this is one `step`. The numbers drawn with are the same, so the text is. A model that predicts NaN within
        a run is noticed at the end of it: what this run gave of that text is not to be trusted.

        Raises:
            UserError: if `steps` is below 1.
        """
        if steps < 1:
            raise UserError(f"batch: steps must be at least 1, got {steps}")
        events = self._admit()
        events += self._break(self._broken())
        mode = device_mode([text.sampling for text in self._rows])
        if not self._rows or mode is None or any(text.finder is not None for text in self._rows):
            return events + self.step()
        left = [text.n - text.written for text in self._rows if text.n is not None]
        count = min([steps, RUN, *left])
        self._set_up(count)
        rows = self._make_room(count)
        drawn = self._decoder.run(rows, count, mode)[:, : len(self._rows)].cpu().numpy()
        return events + self._written(drawn, self._broken())

    def leave(self, ticket: Ticket) -> Session:
        """Take a text out, ended or not: -> a session that stands behind the last token written, or what is read of its
        prompt.

        Raises:
            UserError: if it is not there: it has left already, or ended so long ago that it is not kept (see `keep`).
        """
        if ticket in self._left:
            return self._left.pop(ticket)
        for row, text in enumerate(self._rows):
            if text.ticket == ticket:
                return self._remove(row)
        for text in self._waiting:
            if text.ticket == ticket:
                self._waiting.remove(text)
                return self._at(text.place)
        raise UserError(f"batch: there is no text {ticket.number} here; it may have left already, or ended long ago")

    def events(self) -> Iterator[Event]:
        """Step until every text that joined with a length has ended; texts without one leave before or go on."""
        while any(text.n is not None or text.finder is not None for text in (*self._rows, *self._waiting)):
            yield from self.step()

    def _at(self, place: Mark) -> Session:
        session = self._session()
        session.rewind(place)
        return session

    def _admit(self) -> list[Event]:
        """Read a piece of the prompts that have a row to come, and give rows to those that are read: -> events of texts
        of length 0."""
        events: list[Event] = []
        free = self._decoder.rows - len(self._rows)
        coming = [self._waiting[i] for i in range(min(free, len(self._waiting)))]
        reading = [text for text in coming if len(text.unread)]
        if reading:
            self._read(reading)
        for text in coming:
            if len(text.unread):
                continue
            self._waiting.remove(text)
            if text.n == 0:
                self._end(text.ticket, self._at(text.place))
                events.append(Event(text.ticket, b"", "length"))
                continue
            self._decoder.ensure(text.place.position + 1)
            self._decoder.load(len(self._rows), text.place.state, text.place.logits)
            text.place = _without_state(text.place)
            self._rows.append(text)
        return events

    def _end(self, ticket: Ticket, session: Session) -> None:
        """A text ended by itself: its session can be taken out until `keep` others have ended."""
        self._left[ticket] = session
        while len(self._left) > self._keep:
            del self._left[next(iter(self._left))]

    def _broken(self) -> dict[int, str]:
        """The rows from whose logits nothing can be drawn, and why."""
        best = self._decoder.logits[: len(self._rows)].amax(-1)
        return {
            row: f"generate: the model predicts {top} for the next token; its weights are damaged"
            for row, top in enumerate(best.tolist())
            if not math.isfinite(top)
        }

    def _break(self, broken: dict[int, str]) -> list[Event]:
        """End the texts of these rows, where they stand."""
        events = []
        for row in sorted(broken, reverse=True):
            text = self._rows[row]
            rest = text.finder.rest() if text.finder is not None else b""
            events.append(Event(text.ticket, rest, "error", broken[row]))
            self._end(text.ticket, self._remove(row))
        return events

    @torch.inference_mode()
    def _read(self, texts: list[_Text]) -> None:
        """The next tokens of these prompts, packed end to end: at most a piece in all."""
        budget, lengths = piece_length(self._device), []
        for text in texts:
            lengths.append(min(len(text.unread), budget))
            budget -= lengths[-1]
        read = [(text, length) for text, length in zip(texts, lengths, strict=True) if length]
        tokens = np.concatenate([text.unread[:length] for text, length in read])
        state = merge([text.place.state for text, _ in read])
        segments = Segments.from_lengths([length for _, length in read])
        packed = torch.from_numpy(tokens)[None].to(self._device)
        output = self._network(packed, state, segments, logits="last")
        assert output.logits is not None and output.state is not None
        for index, (text, length) in enumerate(read):
            behind, logits = select(output.state, [index]), output.logits[index].clone()
            text.place = text.place.advanced(text.unread[:length], behind, logits, self.codec)
            text.unread = text.unread[length:]

    def _make_room(self, steps: int) -> int:
        """Ready the buffers for `steps` more tokens of every row: -> the rows that are run."""
        self._decoder.ensure(max(text.position for text in self._rows) + steps)
        rows = self._decoder.bucket(len(self._rows))
        if rows > len(self._rows):  # idle rows run along; they begin anew before they come to anything
            self._idle += steps
            if self._idle > RUN:
                self._decoder.clear(len(self._rows), self._decoder.rows)
                self._idle = steps
        return rows

    def _set_up(self, count: int) -> None:
        """The settings of every row and the numbers to draw with, on the device."""
        vocabulary, rows = self._network.config.vocab_size, len(self._rows)
        settings = [text.sampling for text in self._rows]
        numbers = np.zeros((count, rows))
        for row, text in enumerate(self._rows):
            for step in range(count):
                numbers[step, row] = text.uniforms(text.position + step)
        decoder = self._decoder
        with torch.no_grad():
            decoder.temperature[:rows].copy_(torch.tensor([s.temperature for s in settings], dtype=torch.float64))
            decoder.top_k[:rows].copy_(torch.tensor([min(s.top_k or vocabulary, vocabulary) for s in settings]))
            decoder.top_p[:rows].copy_(torch.tensor([s.top_p or 1.0 for s in settings], dtype=torch.float64))
            decoder.uniforms[:count, :rows].copy_(torch.from_numpy(numbers))

    def _written(self, drawn: np.ndarray, broken: Mapping[int, str] | None = None) -> list[Event]:
        """Account for the ids `[steps rows]` that were drawn and read: -> events, the texts that end taken out."""
        events, ended = [], []
        for step, ids in enumerate(drawn, start=1):
            for row, text in enumerate(self._rows):
                token, error = int(ids[row]), (broken or {}).get(row) if step == len(drawn) else None
                text.sampler.accept(token)
                text.fresh.append(token)
                text.written += 1
                data, why = self.codec.token_bytes[token], None
                if text.finder is not None:
                    data = text.finder.feed(data)
                    why = "stop" if text.finder.found is not None else None
                if why is None and (error is not None or text.written == text.n):
                    why = "length" if error is None else "error"
                    data += text.finder.rest() if text.finder is not None else b""
                if why is not None:
                    ended.append(row)
                events.append(Event(text.ticket, data, why, error if why == "error" else None))
        for text in self._rows:
            if len(text.fresh) >= 4 * RUN:
                text.place = _moved(text, self.codec)
                text.fresh = []
        for row in sorted(ended, reverse=True):
            ticket = self._rows[row].ticket
            self._end(ticket, self._remove(row))
        return events

    def _remove(self, row: int) -> Session:
        """Take the text of a row out; the last row takes its place, and what that held is cleared."""
        text = self._rows[row]
        state, logits = self._decoder.take(row, text.position)
        place, last = _moved(text, self.codec), len(self._rows) - 1
        if row != last:
            self._decoder.move(last, row)
            self._rows[row] = self._rows[last]
        self._rows.pop()
        self._decoder.clear(last)
        whole = replace(place, state=state, logits=logits)
        session = self._at(whole)
        session.sampling = text.sampler.rest
        return session


def _without_state(place: Mark) -> Mark:
    return replace(place, state=(), logits=place.logits[:0])


def _moved(text: _Text, codec: TextCodec) -> Mark:
    """Where a text with a row stands, without its state."""
    if not text.fresh:
        return text.place
    return text.place.advanced(np.array(text.fresh), (), text.place.logits, codec)
