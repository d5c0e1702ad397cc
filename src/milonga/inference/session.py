"""A session: one text, read as it comes, in a state of constant size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milonga.data.text import Text, TextCodec
from milonga.errors import UserError
from milonga.inference.generation import Generation, as_bytes, as_text
from milonga.inference.in_place import InPlace, last_ids
from milonga.inference.marks import KeptMarks, Mark
from milonga.inference.sampling import Sampler, Sampling
from milonga.inference.session_arguments import Stops, alternatives, sampler_at, settings_of, tokens_asked
from milonga.inference.session_file import read_session, write_session
from milonga.models.network import LogitsOf, Network
from milonga.state import clone

# Tokens that go through the network at once, whatever the length of what is fed: it bounds memory. On 2 CPU cores the
# demo model reads 24,000 bytes/s in pieces of 256 and 29,000 in pieces of 1024, but with the larger temporaries of 512
# and more the allocator gives back and takes again up to 13 MiB of resident memory as it goes; with 256 at most 3 MiB.
PIECE = 256
# A GPU is idle on pieces of 256. Activations of 8192 tokens take about 1 GiB at a width of 2048 in bf16.
CUDA_PIECE = 8192
# On a CPU what is left of a piece at either end of a text is read in powers of two, and under this length at once:
# oneDNN keeps compiled products of every length it meets, 680 MiB for all up to 255 with a model of 20,000 parameters.
_SHORT = 8
# Tokens that are read in place, at most, until the state is brought home: where a step was interrupted they are read
# again. No more than a mark remembers.
SETTLED = 512
# Where all logits of a piece are looked at, at most so many numbers: 128 MiB in float64.
_SCORED = 1 << 24

Progress = Callable[[int], None]


def piece_length(device: torch.device) -> int:
    """Tokens that a session on this device reads at once. Pieces end where the position is a multiple of it, so a text
    is cut at the same places whether it is read from the beginning or from such a place on."""
    return CUDA_PIECE if device.type == "cuda" else PIECE


class Session:
    """Reads and writes one text with a language model.

    Made by `LanguageModel.session`. The session stands behind the last token it has read; it holds the network's state
    there and the logits of the next token, so the first one of any piece is scored like every other. A fresh session
    predicts all tokens alike. Reading a text in one piece, in pieces of any length or token by token comes to the same,
    up to rounding. An interrupted call (Ctrl-C, say) leaves the session behind the last whole piece that went through
    the network (`piece_length`).

    Attributes:
        codec: what turns text into the model's tokens. Of a model of bytes, tokens are bytes.
    """

    def __init__(
        self, network: Network, codec: TextCodec, fingerprint: Callable[[], str], in_place: InPlace | None = None
    ):
        self._network, self._fingerprint, self._in_place = network, fingerprint, in_place
        self.codec = codec
        self._sampling: tuple[Sampling, int] | None = None  # of the last text written, and the byte it began at
        weight = network.embedding.weight
        self._device = weight.device
        with torch.inference_mode():
            state = network.init_state(1)
            wide = torch.promote_types(weight.dtype, torch.float32)
            uniform = torch.zeros(network.config.vocab_size, dtype=wide, device=self._device)
        # Where the session stands. While single tokens are read in place its state is behind: `_here` has the true one.
        self._place = self._settled = Mark(network, state, uniform, 0, b"", 0)
        self._kept: KeptMarks | None = None

    @property
    def _here(self) -> Mark:
        """Where the session stands, with its state."""
        self.settle()
        return self._place

    @_here.setter
    def _here(self, mark: Mark) -> None:
        if self._in_place is None:
            self._place = self._settled = mark
            return
        with self._in_place.lock:
            if self._in_place.holds(self):
                self._in_place.leave()
            self._place = self._settled = mark

    def settle(self) -> None:
        """Hold the state itself, where it stood in buffers shared with other sessions."""
        if self._in_place is None or self._place is self._settled:
            return
        with self._in_place.lock:
            place, behind = self._place, self._place.position - self._settled.position
            if self._in_place.holds(self):
                self._place = self._settled = replace(place, state=self._in_place.take(place.position))
            elif behind > 0:  # interrupted within a step: read again what was read in place
                self._here = self._settled
                self._through(last_ids(place.recent, behind))
                self._place = self._settled = replace(self._place, recent=place.recent)  # it has not moved

    @property
    def position(self) -> int:
        """Tokens read so far, written ones included: bytes, for a model of bytes."""
        return self._place.position

    @property
    def bytes_read(self) -> int:
        """Bytes of the tokens read so far."""
        return self._place.bytes_read

    @property
    def pending(self) -> bytes:
        """The last bytes read, where they are the beginning of a UTF-8 character that is not whole yet (at most 3)."""
        return self._place.pending

    @property
    def place(self) -> object:
        """An object that stays the same as long as the session neither reads nor goes elsewhere."""
        return self._place.recent

    @property
    def sampling(self) -> Sampling | None:
        """The settings and the seed of the last `generate`, here or before the session was saved, without what is
        written of `forced`; None if there was none. With nothing read since, `generate(n, session.sampling)` goes on as
        if that had not ended, but for `valid_utf8`, which had it end on a whole character, and a `stop` that lies
        across the place: each call looks for it in its own text."""
        if self._sampling is None:
            return None
        sampling, began = self._sampling
        return sampling.behind(self.bytes_read - began)

    @sampling.setter
    def sampling(self, sampling: Sampling | None) -> None:
        self._sampling = None if sampling is None else (sampling, self.bytes_read)

    @property
    def logits(self) -> np.ndarray:
        """fp32 at least `[V]`: of the next token, before any softmax; a copy on the CPU."""
        return self._place.logits.cpu().numpy().copy()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: the state, the next token's logits, and marks kept by `keep_marks`. Constant unless a
        layer attends to everything, or while marks are still being added."""
        others = self._kept.nbytes if self._kept is not None else 0
        counted = self._kept is not None and self._here in self._kept
        return others + (0 if counted else self._here.nbytes)

    def feed(self, text: Text, *, progress: Progress | None = None) -> None:
        """Read a text. With a codec of subwords each call's text is cut into tokens by itself.

        Args:
            text: bytes; or str, read as its UTF-8 bytes; or an array of byte values, 1-d, integers from 0 to 255. Any
                length, 0 included.
            progress: called after each piece with the bytes of this text read so far.

        Raises:
            UserError: if an array holds anything else, or a str cannot be encoded.
        """
        self.read_ids(self.codec.encode(text), progress=progress)

    def read_ids(self, ids: np.ndarray, *, progress: Progress | None = None) -> None:
        """Read tokens by their ids.

        Args:
            ids: integers `[T]` from 0 to V - 1.
            progress: as for `feed`.

        Raises:
            UserError: if they are something else.
        """
        began = self.bytes_read
        for piece in self._pieces(self.codec.checked_ids(ids), piece_length(self._device)):
            self._read(piece)
            if progress is not None:
                progress(self.bytes_read - began)

    def score(self, text: Text, *, progress: Progress | None = None) -> np.ndarray:
        """Read a text and say what each token cost.

        Returns:
            float64 `[tokens]`: bits of each token (of a model of bytes, byte), `-log2` of the probability the model
            gave it, given all before it.

        Raises:
            UserError: as `feed`.
        """
        ids, began = self.codec.encode(text), self.bytes_read
        length = min(piece_length(self._device), max(1, _SCORED // self.codec.vocab_size))
        bits = []
        for piece in self._pieces(ids, length):
            bits.append(self._score(piece))
            if progress is not None:
                progress(self.bytes_read - began)
        return np.concatenate(bits) if bits else np.empty(0)

    def generate(
        self,
        n: int,
        sampling: Sampling | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
        stop: Stops = (),
        logprobs: int | None = None,
    ) -> Generation[str]:
        """Write and read at most `n` tokens, given out as text as soon as there is a whole character.

        Each token is drawn when the next piece is asked for, and read before the piece is given out: closing the
        generation leaves the session behind the last token drawn. It begins where the session stands when the first
        piece is asked for; between two pieces the session must not be moved. A character that the n-th token cuts stays
        `pending`; if the session goes on to write, it begins the next piece. What is not UTF-8 comes out as U+FFFD.

        A stop text is not given out, nor is anything that could still become one; the session has read it.

        Args:
            n: tokens at most, >= 0: bytes, for a model of bytes.
            sampling: all the settings.
            temperature, top_k, top_p, seed, stop: the commonest of them, instead; see `Sampling`. The same seed at the
                same place gives the same text.
            logprobs: keep every token's log-probability in the generation's `logprobs`, and those of so many of the
                likeliest tokens, >= 0; None for none.

        Raises:
            UserError: if an argument is out of range (at once), the model predicts NaN, or the session was moved.
        """
        settings, n = settings_of(sampling, temperature, top_k, top_p, seed, stop), tokens_asked(n)
        return Generation(self, n, self._writing(n, settings), alternatives(logprobs), as_text())

    def generate_bytes(
        self,
        n: int,
        sampling: Sampling | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
        stop: Stops = (),
        logprobs: int | None = None,
    ) -> Generation[bytes]:
        """As `generate`, but the bytes of each token, UTF-8 or not: `n` pieces unless a stop ends it."""
        settings, n = settings_of(sampling, temperature, top_k, top_p, seed, stop), tokens_asked(n)
        return Generation(self, n, self._writing(n, settings), alternatives(logprobs), as_bytes)

    def sampler(self, sampling: Sampling, n: int | None = None) -> Sampler:
        """A sampler that stands where the session does, to draw at most `n` tokens.

        Raises:
            UserError: if the settings leave nothing to write here.
        """
        return sampler_at(self._place, self.codec, sampling, n)

    def fork(self) -> "Session":
        """A second session at the same place. The two share no memory; neither notices the other. It keeps no marks."""
        twin, here = Session(self._network, self.codec, self._fingerprint, self._in_place), self._here
        twin._here = replace(here, state=clone(here.state), logits=here.logits.clone())
        twin._sampling = self._sampling
        return twin

    def mark(self) -> Mark:
        """This place, to come back to with `rewind`. It keeps the state alive: one state's size of memory."""
        return self._here

    def rewind(self, mark: Mark) -> None:
        """Go to a marked place of this session or of another one of the same model, as if nothing was read since.

        Raises:
            ValueError: if the mark belongs to another model.
        """
        if mark.network is not self._network:
            raise ValueError("rewind: the mark was made with another model")
        self._go(mark)

    def keep_marks(self, limit: int = 32) -> None:
        """From here on mark places automatically, for `rewind_to`: at most `limit`, close together near the end of the
        text and ever wider apart before, at least one piece (`piece_length`). Each takes one state's size of memory.

        Raises:
            UserError: if the limit is below 1.
        """
        self._kept = KeptMarks(self._here, limit, piece_length(self._device))

    def rewind_to(self, position: int) -> int:
        """Go to the last place kept at or before a position, and say which that is; the text from there to the position
        can be fed again.

        Args:
            position: tokens, from the oldest mark's to the session's own.

        Raises:
            UserError: if no marks are kept, or the position lies before the oldest or behind the session.
        """
        if self._kept is None:
            raise UserError("rewind_to: no marks are kept; call keep_marks before reading")
        if position > self.position:
            raise UserError(
                f"rewind_to: position {position} has not been reached yet, the session is at {self.position}"
            )
        if position < self.position:
            self._here = self._kept.latest(position)
        return self.position

    def save(self, path: str | Path) -> None:
        """Write everything to one file, whole or not at all. `LanguageModel.session(path)` continues bit for bit.

        Raises:
            UserError: if the file cannot be written.
        """
        write_session(Path(path), self._here, self.sampling, self._fingerprint(), self.codec)

    def restore(self, path: str | Path) -> None:
        """Go to the place saved in a file. Files of another model, or damaged ones, leave the session as it is.

        Raises:
            UserError: if the file is missing, damaged, of another model or of a newer format.
        """
        like = replace(self._here, state=self._network.init_state(1))
        mark, sampling = read_session(Path(path), self._fingerprint(), self.codec, like)
        self._go(mark)
        self.sampling = sampling

    def _go(self, mark: Mark) -> None:
        """Stand at a mark. Marks kept on the way there stay; if it is on another way, keeping them starts anew."""
        if self._kept is not None:
            if mark in self._kept:
                self._kept.latest(mark.position)
            else:
                self._kept = self._kept.restarted(mark)
        self._here = mark

    def _writing(self, n: int, settings: Sampling) -> Sampler:
        sampler = self.sampler(settings, n)
        self.sampling = sampler.sampling
        return sampler

    def _pieces(self, ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
        """Cut where the position is a multiple of `length`; on a CPU what is shorter also into powers of two."""
        start = 0
        while start < len(ids):
            count = min(length - self.position % length, len(ids) - start)
            if self._device.type == "cpu" and _SHORT <= count < length:
                count = 1 << (count.bit_length() - 1)
            yield ids[start : start + count]
            start += count

    def _read(self, ids: np.ndarray, wanted: LogitsOf = "last") -> Tensor:
        """Read one piece `[T]`, not empty: -> the logits behind each token `[T V]` or, `[1 V]`, behind the last."""
        if self._in_place is not None and len(ids) == 1 and wanted == "last" and self._kept is None:
            return self._step(self._in_place, ids)
        return self._through(ids, wanted)

    def _step(self, in_place: InPlace, ids: np.ndarray) -> Tensor:
        """Read one token in place: -> the logits behind it `[1 V]`."""
        with in_place.lock:
            behind = self._place.position - self._settled.position
            if behind >= SETTLED or (behind > 0 and not in_place.holds(self)):
                self.settle()
            place = self._place
            try:
                logits = in_place.step(self, int(ids[0]), place.position, self._settled.state, place.logits)
                self._place = place.advanced(ids, self._settled.state, logits, self.codec)
            except BaseException:
                in_place.leave()  # nobody knows whether the buffers have moved on
                raise
        return logits[None]

    def _through(self, ids: np.ndarray, wanted: LogitsOf = "last") -> Tensor:
        """Read one piece through the network: -> as `_read`."""
        here = self._here
        with torch.inference_mode():
            tokens = torch.from_numpy(ids.astype(np.int64)).to(self._device)
            output = self._network(tokens[None], here.state, logits=wanted)
            assert output.logits is not None and output.state is not None
            logits = output.logits if wanted == "last" else output.logits[0]
            behind = logits[-1].clone()  # a view would keep the logits of the whole piece
        self._here = here.advanced(ids, output.state, behind, self.codec)
        if self._kept is not None:
            self._kept.offer(self._here)
        return logits

    def _score(self, ids: np.ndarray) -> np.ndarray:
        """Read one piece: -> the bits of each token."""
        first = self._here.logits[None]
        behind = self._read(ids, "all")
        with torch.inference_mode():
            return _bits(torch.cat([first, behind[:-1]]), torch.from_numpy(ids.astype(np.int64)).to(self._device))


def _bits(logits: Tensor, ids: Tensor) -> np.ndarray:
    """`-log2 softmax(logits)[id]` of each row, in float64: logits `[T V]`, ids `[T]`."""
    wide = logits.double()
    nats = wide.logsumexp(-1) - wide.gather(-1, ids[:, None])[:, 0]
    return (nats / math.log(2)).cpu().numpy()
