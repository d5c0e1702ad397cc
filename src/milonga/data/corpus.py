"""Documents prepared once into a memory-mapped cache, and views of them."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import overload

import numpy as np

from milonga.data.corpus_cache import (
    BYTES,
    DOCUMENTS,
    FORMAT,
    NAMES,
    TOKENS,
    CacheWriter,
    Progress,
    inputs_key,
    read_index,
    stored_codec,
    stored_key,
)
from milonga.data.permutation import mix
from milonga.data.readers import find_sources
from milonga.data.text import ByteCodec, TextCodec
from milonga.errors import UserError
from milonga.files import FolderLock, remove_partials

_BLOCK = 1 << 20  # tokens that are looked at at once


class Names(Sequence[str]):
    """The documents' names, read from the cache when asked for: there may be millions.

    Args:
        text: all names end to end, uint8.
        ends: int64 [D + 1], where each name starts and the last ends.
        ids: int64 [documents of the view], which of the D; None is all of them.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray, ids: np.ndarray | None = None):
        self._text, self._ends, self._ids = text, ends, ids

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._ids is None else len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        i = index % len(self)
        if self._ids is not None:
            i = int(self._ids[i])
        return bytes(self._text[int(self._ends[i]) : int(self._ends[i + 1])]).decode("utf-8", "surrogateescape")

    def take(self, ids: np.ndarray) -> "Names":
        """The names of some of these documents."""
        return Names(self._text, self._ends, ids if self._ids is None else self._ids[ids])


class Corpus:
    """Documents, end to end, memory-mapped; or some of the documents of such a corpus.

    Attributes:
        tokens: the ids of the whole cache, of the codec's dtype; a view shares them.
        starts: int64 [documents], where each document starts in `tokens`.
        offsets: int64 [documents + 1], where each document starts among the documents of this view, and their total.
        names: the documents' names.
        fingerprint: SHA-256 of the content (tokens, boundaries and tokenizer), as 64 hexadecimal digits.
        separator: bytes that follow each document when windows are cut.
        skipped: names of some files that held no text and are not in the corpus (at most 1000 are kept).
        codec: what made the tokens; documents are encoded one by one.
        document_bytes: int64 [documents], the bytes of each document's text.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        offsets: np.ndarray,
        names: Names,
        fingerprint: str,
        separator: bytes = b"",
        skipped: tuple[str, ...] = (),
        codec: TextCodec | None = None,
        document_bytes: np.ndarray | None = None,
    ):
        self.tokens, self.starts, self.offsets, self.names = tokens, starts, offsets, names
        self.fingerprint, self.separator, self.skipped = fingerprint, separator, skipped
        self.codec: TextCodec = codec or ByteCodec()
        assert document_bytes is not None or self.codec.name == ByteCodec.name, "only bytes count themselves"
        self.document_bytes = np.diff(offsets) if document_bytes is None else document_bytes

    @classmethod
    def build(
        cls,
        paths: Iterable[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        text_field: str = "text",
        separator: bytes = b"",
        exclude: Iterable[str | os.PathLike[str]] = (),
        codec: TextCodec | None = None,
        progress: Progress | None = None,
    ) -> "Corpus":
        """Read files, folders, globs and archives into `folder`, or open what an earlier call put there.

        The cache is used again as long as the same files (path, size, time of change) are asked for. Memory stays
        constant whatever their size. One process builds at a time.

        Args:
            paths: see `milonga.data.readers.find_sources`; `bundled:train` and `bundled:heldout` are names too.
            folder: holds the cache, see `milonga.data.corpus_cache`.
            text_field: the field of `.jsonl` lines and the column of `.parquet` files that hold the text.
            separator: bytes that follow each document when windows are cut; not part of the cache.
            exclude: files found in `paths` that are to be left out, such as the held-out ones.
            codec: what encodes each document, by itself; None for bytes.
            progress: called with bytes of the source files read so far, and their total.

        Raises:
            UserError: for files that are missing, empty, damaged or not text; when no text is left; when another
                process builds in `folder`; when the disk is full.
        """
        left_out = {os.path.realpath(source.path) for source in find_sources(exclude)} if exclude else set()
        sources = [source for source in find_sources(paths) if os.path.realpath(source.path) not in left_out]
        if not sources:
            raise UserError("data: every file to train on is held out: name others for one of the two")
        codec = codec or ByteCodec()
        key = inputs_key(sources, text_field, codec)
        folder = Path(folder)
        if stored_key(folder) != key:
            with FolderLock(folder):
                remove_partials(folder)
                if stored_key(folder) != key:  # another process may have been quicker
                    CacheWriter(folder, key, codec).write(sources, text_field, progress)
        return cls.open(folder, separator=separator)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, separator: bytes = b"") -> "Corpus":
        """The corpus that `build` put into `folder`; the files it was made from are not needed.

        Raises:
            UserError: if there is none, it is damaged, or a newer version wrote it.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index is None:
            raise UserError(f"data: {folder} holds no prepared corpus (or a damaged one): build it from its files")
        if index["format"] > FORMAT:
            raise UserError(f"data: {folder} was prepared by a newer version of milonga: update, or remove the folder")
        codec = stored_codec(folder, index)
        table = np.memmap(folder / DOCUMENTS, dtype="<i8", mode="r").reshape(-1, 2)
        offsets, ends = table[:, 0], table[:, 1]
        tokens = np.memmap(folder / TOKENS, dtype=codec.dtype.newbyteorder("<"), mode="r")
        names = Names(np.memmap(folder / NAMES, dtype=np.uint8, mode="r"), ends)
        lengths = np.memmap(folder / BYTES, dtype="<i8", mode="r") if "tokenizer" in index else None
        skipped = tuple(index["skipped"])
        return cls(tokens, offsets[:-1], offsets, names, index["fingerprint"], separator, skipped, codec, lengths)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        """How many bytes of text there are, separators not counted."""
        return int(self.document_bytes.sum())

    @property
    def length(self) -> int:
        """How many tokens there are, separators not counted; for bytes the same."""
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, read-only, mapped from the file; for bytes the text itself, uint8.

        Raises:
            IndexError: if there is no such document.
        """
        if not -self.documents <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        index %= self.documents
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.offsets[index + 1]) - int(self.offsets[index])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.document(i) for i in range(self.documents))

    def __len__(self) -> int:
        return self.documents

    def __repr__(self) -> str:
        return f"Corpus({self.documents} documents, {self.bytes:,} bytes, {self.fingerprint[:12]})"

    def select(self, ids: Sequence[int] | np.ndarray) -> "Corpus":
        """A view of some documents, in the order given; memory in proportion to their number."""
        chosen = np.asarray(ids, dtype=np.int64)
        return self._view(chosen, self.starts[chosen], np.diff(self.offsets)[chosen], self.document_bytes[chosen])

    def _view(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, document_bytes: np.ndarray) -> "Corpus":
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        digest = hashlib.sha256(self.fingerprint.encode())
        for array in (starts, lengths):
            digest.update(array.astype("<i8").tobytes())
        names = self.names.take(ids)
        fingerprint, separator = digest.hexdigest(), self.separator
        held = np.asarray(document_bytes, np.int64)
        return Corpus(self.tokens, starts, offsets, names, fingerprint, separator, self.skipped, self.codec, held)

    def split(
        self, holdout: float | Sequence[str], seed: int = 0, *, holdout_tail: bool = False
    ) -> tuple["Corpus", "Corpus"]:
        """Views of the documents to train on and of those held out: whole documents, never windows.

        Args:
            holdout: names or globs of documents; or the fraction of all bytes to hold out, in (0, 1): documents are
                taken in an order that depends only on `seed`, as long as that brings the share nearer to the
                fraction. At least one document is on each side.
            seed: of that order.
            holdout_tail: hold out the end of the last document instead, that fraction of all bytes (at most half of
                that document), cut between characters: for a corpus of a single document, and only if asked for,
                since the two parts share a style and a story.

        Raises:
            UserError: if a name matches nothing, nothing is left to train on, the fraction is not in (0, 1), or there
                is a single document and `holdout_tail` is not set.
        """
        if isinstance(holdout, float | int):
            if not 0 < holdout < 1:
                raise UserError(f"data: the held-out fraction must lie between 0 and 1, got {holdout}")
            if holdout_tail:
                return self._split_tail(holdout)
            held = self._held_by_fraction(holdout, seed)
        else:
            held = self._held_by_name([holdout] if isinstance(holdout, str) else list(holdout))
        ids = np.arange(self.documents)
        return self.select(ids[~held]), self.select(ids[held])

    def _held_by_fraction(self, fraction: float, seed: int) -> np.ndarray:
        if self.documents == 1:
            raise UserError(
                f"data: there is a single document ({self.names[0]}), so none can be held out: name a separate file in "
                "data.heldout, or set data.heldout_tail=true to hold out its last part"
            )
        lengths = self.document_bytes
        target = fraction * self.bytes
        held = np.zeros(self.documents, bool)
        taken = 0
        order = np.argsort(mix(np.arange(self.documents, dtype=np.uint64), seed), kind="stable")
        for i in order:
            length = int(lengths[i])
            if abs(taken + length - target) < abs(taken - target):
                held[i] = True
                taken += length
        if not held.any():
            held[np.argmin(lengths)] = True
        if held.all():
            held[np.argmax(lengths)] = False
        return held

    def _held_by_name(self, patterns: list[str]) -> np.ndarray:
        held = np.zeros(self.documents, bool)
        for pattern in patterns:
            hits = [i for i, name in enumerate(self.names) if name == pattern or fnmatchcase(name, pattern)]
            if not hits:
                some = ", ".join(self.names[:3])
                raise UserError(f"data: no document is called {pattern}: there are {self.documents}, such as {some}")
            held[hits] = True
        if held.all():
            raise UserError("data: every document is held out, none is left to train on")
        return held

    def _split_tail(self, fraction: float) -> tuple["Corpus", "Corpus"]:
        last, size = self.document(-1), int(self.document_bytes[-1])
        head = size - max(1, min(math.ceil(fraction * self.bytes), size // 2))
        cut, head = self._first_token_from(last, head)
        if not 0 < cut < len(last):
            raise UserError(f"data: the document {self.names[-1]} is too short to hold out a part of it")
        ids, lengths, in_bytes = np.arange(self.documents), np.diff(self.offsets), self.document_bytes.copy()
        lengths[-1], in_bytes[-1] = cut, head
        tail_start = self.starts[-1:] + cut
        return self._view(ids, self.starts, lengths, in_bytes), self._view(
            ids[-1:], tail_start, np.array([len(last) - cut]), np.array([size - head])
        )

    def _first_token_from(self, document: np.ndarray, position: int) -> tuple[int, int]:
        """The first token at byte `position` of a document or behind it that does not start inside a UTF-8 character:
        -> (its index, the byte at which it starts)."""
        done = 0
        for block in range(0, len(document), _BLOCK):
            lengths = self.codec.token_lengths[document[block : block + _BLOCK]]
            if done + int(lengths.sum()) <= position:
                done += int(lengths.sum())
                continue
            for index, length in enumerate(lengths.tolist(), start=block):
                first = self.codec.token_bytes[int(document[index])][0]
                if done >= position and (first & 0xC0 != 0x80 or index == len(document) - 1):
                    return index, done
                done += length
        return len(document), done
