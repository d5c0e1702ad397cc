"""Bits per byte of whole texts, streamed: by position, and beside what compressors need for the same text."""

import bz2
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from milonga.errors import UserError
from milonga.inference import LanguageModel, Session

Progress = Callable[[int, float], None]

# Where position buckets begin; the last is open.
EDGES = (0, *(1 << power for power in range(10, 21)))

# Bytes that are scored at once where the text can be cut there: a fraction of a second.
_PIECE = 1024


class Compressor(Protocol):
    """What `zlib.compressobj`, `BZ2Compressor` and `LZMACompressor` share."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


# The longest text of which all is known before xz begins, and the dictionary for it.
_SHORT = 1 << 20


class _Xz:
    """`xz -9`. It begins with its full tables, of 36 ms, only for a text that turns out longer than `_SHORT`: of short
    documents there may be millions, and a dictionary as long as the text gives the same bytes."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._long: lzma.LZMACompressor | None = None

    def compress(self, data: bytes, /) -> bytes:
        if self._long is None:
            self._head += data
            if len(self._head) <= _SHORT:
                return b""
            self._long, data = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=9), bytes(self._head)
            self._head.clear()
        return self._long.compress(data)

    def flush(self) -> bytes:
        if self._long is not None:
            return self._long.flush()
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": _SHORT}]
        return lzma.compress(self._head, format=lzma.FORMAT_XZ, filters=filters)


# Streams of constant memory (xz: up to 0.7 GB for long texts).
COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "gzip": lambda: zlib.compressobj(9, zlib.DEFLATED, 31),
    "bz2": lambda: bz2.BZ2Compressor(9),
    "xz": _Xz,
}
# The commands that they stand for.
COMMANDS = {"gzip": "gzip -9", "bz2": "bzip2 -9", "xz": "xz -9"}


@dataclass(frozen=True)
class Bucket:
    """The bytes at positions `start` to `end` - 1 of their documents; with `end` None, all from `start` on."""

    start: int
    end: int | None
    bytes: int
    bits: float

    @property
    def bits_per_byte(self) -> float:
        """Mean over the bucket."""
        return self.bits / self.bytes


@dataclass(frozen=True)
class StateSize:
    """What the session held after `bytes` bytes of a document."""

    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class DocumentScore:
    """One document, read from a fresh session."""

    name: str
    bytes: int
    bits: float
    compressed_bytes: dict[str, int]  # by compressor

    @property
    def bits_per_byte(self) -> float:
        """Mean over the document."""
        return self.bits / self.bytes

    def compressor_bits_per_byte(self, name: str) -> float:
        """What a compressor needs."""
        return 8 * self.compressed_bytes[name] / self.bytes


@dataclass(frozen=True)
class Perplexity:
    """Scores of one or more documents; totals weigh every byte alike."""

    documents: tuple[DocumentScore, ...]
    buckets: tuple[Bucket, ...]  # those that hold any bytes
    state_sizes: tuple[StateSize, ...]  # along the longest document

    @property
    def bytes(self) -> int:
        """Bytes of all documents."""
        return sum(document.bytes for document in self.documents)

    @property
    def bits_per_byte(self) -> float:
        """Bits of all documents over their bytes."""
        return sum(document.bits for document in self.documents) / self.bytes

    def compressor_bits_per_byte(self, name: str) -> float:
        """The same of a compressor, every document compressed by itself; `name` is a key of `COMPRESSORS`."""
        return 8 * sum(document.compressed_bytes[name] for document in self.documents) / self.bytes

    def context(self) -> list[dict[str, int | float]]:
        """Bits per byte by position, JSON-ready: `start` to `bytes` bytes of the document came before."""
        longest = max(document.bytes for document in self.documents)
        return [
            {
                "start": bucket.start,
                "bytes": longest if bucket.end is None else min(bucket.end, longest),
                "bits_per_byte": bucket.bits_per_byte,
                "count": bucket.bytes,
            }
            for bucket in self.buckets
        ]

    def to_json(self) -> dict[str, object]:
        """Everything, JSON-ready."""
        return {
            "bytes": self.bytes,
            "bits_per_byte": self.bits_per_byte,
            **{f"{name}_bits_per_byte": self.compressor_bits_per_byte(name) for name in COMPRESSORS},
            "context": self.context(),
            "documents": [
                {
                    "name": document.name,
                    "bytes": document.bytes,
                    "bits_per_byte": document.bits_per_byte,
                    **{f"{name}_bits_per_byte": document.compressor_bits_per_byte(name) for name in COMPRESSORS},
                }
                for document in self.documents
            ],
            "state": [{"bytes": size.bytes, "state_bytes": size.state_bytes} for size in self.state_sizes],
        }


class _Buckets:
    """Sums of bits and counts of bytes by position."""

    def __init__(self) -> None:
        self.bits, self.bytes = [0.0] * len(EDGES), [0] * len(EDGES)

    def add(self, position: int, bits: np.ndarray) -> None:
        """The bits of consecutive bytes, the first of which `position` bytes precede."""
        inner = [edge - position for edge in EDGES if position < edge < position + len(bits)]
        for start, end in pairwise([0, *inner, len(bits)]):
            index = bisect_right(EDGES, position + start) - 1
            self.bits[index] += float(bits[start:end].sum())
            self.bytes[index] += end - start

    def result(self) -> tuple[Bucket, ...]:
        """Those that hold any bytes."""
        ends = (*EDGES[1:], None)
        rows = zip(EDGES, ends, self.bytes, self.bits, strict=True)
        return tuple(Bucket(start, end, count, bits) for start, end, count, bits in rows if count)


def evaluate_perplexity(
    lm: LanguageModel, documents: Iterable[tuple[str, Iterable[bytes]]], *, progress: Progress | None = None
) -> Perplexity:
    """Score every byte of each document, given all bytes of the document before it, at constant memory.

    A model of subwords reads each document in the tokens that its codec gives for the whole of it; a token's bits count
    for its bytes in equal shares.

    Args:
        lm: the model.
        documents: (name, pieces of bytes) of each; pieces may have any lengths and are read once, in order.
        progress: called with the bytes of text scored so far and their bits per byte, a few times a second.

    Raises:
        UserError: if there is no document, or one is empty.
    """
    reading = _Reading(lm, progress)
    for name, pieces in documents:
        reading.document(name, pieces)
    if not reading.scores:
        raise UserError("evaluate: there is no text to score")
    return Perplexity(tuple(reading.scores), reading.buckets.result(), tuple(reading.longest))


class _Reading:
    """What is known while documents are read."""

    def __init__(self, lm: LanguageModel, progress: Progress | None):
        self.lm, self.progress = lm, progress
        self.buckets = _Buckets()
        self.scores: list[DocumentScore] = []
        self.longest: list[StateSize] = []
        self.bytes, self.bits = 0, 0.0

    def document(self, name: str, pieces: Iterable[bytes]) -> None:
        """Read and score one document."""
        session, bits_before = self.lm.session(), self.bits
        compressors = {key: make() for key, make in COMPRESSORS.items()}
        compressed = dict.fromkeys(compressors, 0)
        sizes = [StateSize(0, session.nbytes)]
        for piece in self.lm.codec.cut(pieces, _PIECE):
            self._score(session, piece)
            for key, compressor in compressors.items():
                compressed[key] += len(compressor.compress(piece))
            if session.bytes_read >= 2 * sizes[-1].bytes:
                sizes.append(StateSize(session.bytes_read, session.nbytes))
        if session.bytes_read == 0:
            raise UserError(f"evaluate: {name} is empty: there is nothing to score")
        if sizes[-1].bytes < session.bytes_read:
            sizes.append(StateSize(session.bytes_read, session.nbytes))
        for key, compressor in compressors.items():
            compressed[key] += len(compressor.flush())
        self.scores.append(DocumentScore(name, session.bytes_read, self.bits - bits_before, compressed))
        if not self.longest or sizes[-1].bytes > self.longest[-1].bytes:
            self.longest = sizes

    def _score(self, session: Session, piece: bytes) -> None:
        bits = session.score(piece)
        if np.isnan(bits).any():
            raise UserError(
                "evaluate: the model predicts NaN: its weights are damaged; use an older checkpoint of the run"
            )
        lengths = self.lm.codec.token_lengths[self.lm.codec.encode(piece)]
        self.buckets.add(session.bytes_read - len(piece), np.repeat(bits / lengths, lengths))
        self.bits += float(bits.sum())
        self.bytes += len(piece)
        if self.progress is not None:
            self.progress(self.bytes, self.bits / self.bytes)
