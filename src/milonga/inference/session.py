"""A session: one text, read as it comes, in a state of constant size."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from milonga.data.text import ByteCodec, Text, Utf8Stream
from milonga.errors import UserError
from milonga.inference.sampling import Sampler, Sampling
from milonga.inference.session_file import SavedSession, read_session, write_session
from milonga.models.network import LogitsOf, Network, NetworkState
from milonga.state import clone
from milonga.state import nbytes as state_nbytes

# Bytes that go through the network at once, whatever the length of what is fed: it bounds memory. On 2 CPU cores the
# demo model reads 24,000 bytes/s in pieces of 256 and 29,000 in pieces of 1024, but with the larger temporaries of 512
# and more the allocator gives back and takes again up to 13 MiB of resident memory as it goes; with 256 at most 3 MiB.
PIECE = 256


@dataclass(frozen=True, eq=False, slots=True)
class Mark:
    """A place in a text to come back to: all that a session knows there. Sessions never write into one."""

    network: Network
    state: NetworkState
    logits: Float[Tensor, " V"]  # fp32, of the next byte
    position: int
    pending: bytes  # the last bytes, where they do not yet make a whole character


class Session:
    """Reads and writes one text with a language model.

    Made by `LanguageModel.session`. The session stands behind the last byte it has read; it holds the network's state
    there and the logits of the next byte, so the first byte of any piece is scored like every other. A fresh session
    predicts all bytes alike. Reading a text in one piece, in pieces of any length or byte by byte comes to the same, up
    to rounding. An interrupted call (Ctrl-C, say) leaves the session behind the last whole piece of `PIECE` bytes.
    """

    def __init__(self, network: Network, codec: ByteCodec, fingerprint: Callable[[], str]):
        self._network, self._codec, self._fingerprint = network, codec, fingerprint
        self._device = network.embedding.weight.device
        with torch.inference_mode():
            state = network.init_state(1)
            uniform = torch.zeros(network.config.vocab_size, device=self._device)
        self._here = Mark(network, state, uniform, 0, b"")

    @property
    def position(self) -> int:
        """Bytes read so far, generated ones included."""
        return self._here.position

    @property
    def pending(self) -> bytes:
        """The last bytes read, where they are the beginning of a UTF-8 character that is not whole yet (at most 3)."""
        return self._here.pending

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: the state and the next byte's logits. Constant unless a layer attends to everything."""
        return state_nbytes((self._here.state, self._here.logits))

    def feed(self, text: Text) -> None:
        """Read a text.

        Args:
            text: bytes; or str, read as its UTF-8 bytes; or an array of byte values, 1-d, integers from 0 to 255. Any
                length, 0 included.

        Raises:
            UserError: if an array holds anything else, or a str cannot be encoded.
        """
        for piece in self._pieces(text):
            self._read(piece)

    def score(self, text: Text) -> np.ndarray:
        """Read a text and say what each byte cost.

        Returns:
            float64 `[bytes]`: bits of each byte, `-log2` of the probability the model gave it, given all before it.

        Raises:
            UserError: as `feed`.
        """
        bits = [self._score(piece) for piece in self._pieces(text)]
        return np.concatenate(bits) if bits else np.empty(0)

    def generate(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
    ) -> Generator[str, None, None]:
        """Write and read at most `n` bytes, yielded as text as soon as there is a whole character.

        Each byte is drawn when the next piece is asked for, and read before the piece is yielded: closing the generator
        leaves the session behind the last piece. A character that the n-th byte cuts stays `pending`; if the session
        goes on to write, it begins the next piece. Bytes that are not UTF-8 come out as U+FFFD.

        Args:
            n: bytes at most, >= 0.
            temperature, top_k, top_p, seed: see `Sampler`. The same seed at the same place gives the same text.

        Raises:
            UserError: if an argument is out of range (at once), or the model predicts NaN.
        """
        return self._texts(_count(n), self._sampler(temperature, top_k, top_p, seed))

    def generate_bytes(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = 0,
    ) -> Generator[bytes, None, None]:
        """As `generate`, but exactly `n` pieces of one byte each, whether they are UTF-8 or not."""
        return self._bytes(_count(n), self._sampler(temperature, top_k, top_p, seed))

    def fork(self) -> "Session":
        """A second session at the same place. The two share no memory; neither notices the other."""
        twin = Session(self._network, self._codec, self._fingerprint)
        here = self._here
        twin._here = Mark(here.network, clone(here.state), here.logits.clone(), here.position, here.pending)
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
        self._here = mark

    def save(self, path: str | Path) -> None:
        """Write everything to one file, whole or not at all. `LanguageModel.session(path)` continues bit for bit.

        Raises:
            UserError: if the file cannot be written.
        """
        here = self._here
        saved = SavedSession(
            here.state, here.logits, here.position, here.pending, self._fingerprint(), self._codec.name
        )
        write_session(Path(path), saved)

    def restore(self, path: str | Path) -> None:
        """Go to the place saved in a file. Files of another model, or damaged ones, leave the session as it is.

        Raises:
            UserError: if the file is missing, damaged, of another model or of a newer format.
        """
        like = (self._network.init_state(1), self._here.logits)
        saved = read_session(Path(path), self._fingerprint(), self._codec.name, like)
        self._here = Mark(self._network, saved.state, saved.logits, saved.position, saved.pending)

    def _pieces(self, text: Text) -> Iterator[np.ndarray]:
        ids = self._codec.encode(text)
        return (ids[start : start + PIECE] for start in range(0, len(ids), PIECE))

    def _read(self, ids: np.ndarray, wanted: LogitsOf = "last") -> tuple[Float[Tensor, "T V"], str]:
        """Read one piece `[T]`, not empty: -> (the logits behind each byte or, `[1 V]`, behind the last; its text)."""
        here = self._here
        with torch.inference_mode():
            tokens = torch.from_numpy(ids.astype(np.int64)).to(self._device)
            output = self._network(tokens[None], here.state, logits=wanted)
            assert output.logits is not None
            logits = output.logits if wanted == "last" else output.logits[0]
            behind = logits[-1].clone()  # a view would keep the logits of the whole piece
        stream = Utf8Stream(here.pending)
        text = stream.feed(ids.tobytes())
        self._here = Mark(here.network, output.state, behind, here.position + len(ids), stream.pending)
        return logits, text

    def _score(self, ids: np.ndarray) -> np.ndarray:
        """Read one piece: -> the bits of each byte."""
        first = self._here.logits[None]
        behind, _ = self._read(ids, "all")
        with torch.inference_mode():
            return _bits(torch.cat([first, behind[:-1]]), torch.from_numpy(ids.astype(np.int64)).to(self._device))

    def _sampler(self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> Sampler:
        settings = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return Sampler(settings, position=self.position)

    def _write(self, sampler: Sampler) -> tuple[int, str]:
        """Draw one byte and read it: -> (the byte, the text that it completes)."""
        byte = sampler.draw(self._here.logits.cpu().numpy())
        _, text = self._read(np.array([byte], np.uint8))
        return byte, text

    def _bytes(self, n: int, sampler: Sampler) -> Generator[bytes, None, None]:
        for _ in range(n):
            yield bytes([self._write(sampler)[0]])

    def _texts(self, n: int, sampler: Sampler) -> Generator[str, None, None]:
        for _ in range(n):
            _, text = self._write(sampler)
            if text:
                yield text


def _count(n: int) -> int:
    if n < 0:
        raise UserError(f"generate: the number of bytes must be 0 or more, got {n}")
    return n


def _bits(logits: Tensor, ids: Tensor) -> np.ndarray:
    """`-log2 softmax(logits)[id]` of each row, in float64: logits `[T V]`, ids `[T]`."""
    wide = logits.double()
    nats = wide.logsumexp(-1) - wide.gather(-1, ids[:, None])[:, 0]
    return (nats / math.log(2)).cpu().numpy()
