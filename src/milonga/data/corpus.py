"""Documents prepared once into a memory-mapped cache, and views of them."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from milonga.data.permutation import mix
from milonga.data.readers import Reading, Source, find_sources, read_documents
from milonga.errors import UserError
from milonga.files import FolderLock, atomic_write, remove_partials, write_atomically

Progress = Callable[[int, int | None], None]

_FORMAT = 1
_TOKENS, _DOCUMENTS, _NAMES, _INDEX = "tokens.bin", "documents.bin", "names.bin", "index.json"


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
        tokens: uint8, the bytes of the whole cache; a view shares them.
        starts: int64 [documents], where each document starts in `tokens`.
        offsets: int64 [documents + 1], where each document starts among the documents of this view, and their total.
        names: the documents' names.
        fingerprint: SHA-256 of the content (bytes and boundaries), as 64 hexadecimal digits.
        skipped: names of some files that held no text and are not in the corpus (at most 1000 are kept).
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
    ):
        self.tokens, self.starts, self.offsets, self.names = tokens, starts, offsets, names
        self.fingerprint, self.separator, self.skipped = fingerprint, separator, skipped

    @classmethod
    def build(
        cls,
        paths: Iterable[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        text_field: str = "text",
        separator: bytes = b"",
        exclude: Iterable[str | os.PathLike[str]] = (),
        progress: Progress | None = None,
    ) -> "Corpus":
        """Read files, folders, globs and archives into `folder`, or open what an earlier call put there.

        The cache is used again as long as the same files (path, size, time of change) are asked for. Memory stays
        constant whatever their size. One process builds at a time.

        Args:
            paths: see `milonga.data.readers.find_sources`; `bundled:train` and `bundled:heldout` are names too.
            folder: holds `tokens.bin`, `documents.bin`, `names.bin` and, written last, `index.json`.
            text_field: the field of `.jsonl` lines and the column of `.parquet` files that hold the text.
            separator: bytes that follow each document when windows are cut; not part of the cache.
            exclude: files found in `paths` that are to be left out, such as the held-out ones.
            progress: called with bytes of the source files read so far, and their total.

        Raises:
            UserError: for files that are missing, empty, damaged or not text; when no text is left; when another
                process builds in `folder`; when the disk is full.
        """
        left_out = {os.path.realpath(source.path) for source in find_sources(exclude)} if exclude else set()
        sources = [source for source in find_sources(paths) if os.path.realpath(source.path) not in left_out]
        if not sources:
            raise UserError("data: every file to train on is held out: name others for one of the two")
        key = _inputs_key(sources, text_field)
        folder = Path(folder)
        if _stored_key(folder) != key:
            with FolderLock(folder):
                remove_partials(folder)
                if _stored_key(folder) != key:  # another process may have been quicker
                    _Writer(folder, key).write(sources, text_field, progress)
        return cls.open(folder, separator=separator)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, separator: bytes = b"") -> "Corpus":
        """The corpus that `build` put into `folder`; the files it was made from are not needed.

        Raises:
            UserError: if there is none, it is damaged, or a newer version wrote it.
        """
        folder = Path(folder)
        index = _read_index(folder)
        if index is None:
            raise UserError(f"data: {folder} holds no prepared corpus (or a damaged one): build it from its files")
        if index["format"] > _FORMAT:
            raise UserError(f"data: {folder} was prepared by a newer version of milonga: update, or remove the folder")
        table = np.memmap(folder / _DOCUMENTS, dtype="<i8", mode="r").reshape(-1, 2)
        offsets, ends = table[:, 0], table[:, 1]
        tokens = np.memmap(folder / _TOKENS, dtype=np.uint8, mode="r")
        names = Names(np.memmap(folder / _NAMES, dtype=np.uint8, mode="r"), ends)
        return cls(tokens, offsets[:-1], offsets, names, index["fingerprint"], separator, tuple(index["skipped"]))

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        """How many bytes of text there are, separators not counted."""
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """The bytes of one document, uint8, read-only, mapped from the file.

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
        return self._view(chosen, self.starts[chosen], np.diff(self.offsets)[chosen])

    def _view(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> "Corpus":
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        digest = hashlib.sha256(self.fingerprint.encode())
        for array in (starts, lengths):
            digest.update(array.astype("<i8").tobytes())
        names = self.names.take(ids)
        return Corpus(self.tokens, starts, offsets, names, digest.hexdigest(), self.separator, self.skipped)

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
        lengths = np.diff(self.offsets)
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
        last = self.document(-1)
        cut = len(last) - max(1, min(math.ceil(fraction * self.bytes), len(last) // 2))
        while cut < len(last) - 1 and (int(last[cut]) & 0xC0) == 0x80:  # inside a UTF-8 character
            cut += 1
        if cut < 1:
            raise UserError(f"data: the document {self.names[-1]} is too short to hold out a part of it")
        ids, lengths = np.arange(self.documents), np.diff(self.offsets)
        head_lengths = lengths.copy()
        head_lengths[-1] = cut
        tail_start = self.starts[-1:] + cut
        return self._view(ids, self.starts, head_lengths), self._view(ids[-1:], tail_start, lengths[-1:] - cut)


def _inputs_key(sources: list[Source], text_field: str) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, text_field]).encode())
    for source in sources:
        stat = source.path.stat()
        entry = [os.path.abspath(source.path), source.name, source.asked, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _read_index(folder: Path) -> dict | None:
    """The index of a whole cache in `folder`; None if there is none or a part is missing or of another size."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in index["sizes"].items())
        needed = {"format", "key", "fingerprint", "skipped"} <= index.keys()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return index if whole and needed and isinstance(index["format"], int) else None


def _stored_key(folder: Path) -> str | None:
    index = _read_index(folder)
    return None if index is None else index["key"]


class _Writer:
    """Writes the files of one cache; `index.json` comes last, so that a cache is whole or not there."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.skipped: list[str] = []
        self.bytes = self.documents = self.name_bytes = 0
        self.content, self.boundaries = hashlib.sha256(), hashlib.sha256()

    def write(self, sources: list[Source], text_field: str, progress: Progress | None) -> None:
        total = sum(source.path.stat().st_size for source in sources)
        done = 0

        def on_read(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None and count:
                progress(min(done, total), total)

        with ExitStack() as stack:
            # the tokens are the innermost: when the disk fills up, it is their file that is named
            files = [stack.enter_context(atomic_write(self.folder / n)) for n in (_NAMES, _DOCUMENTS, _TOKENS)]
            files[1].write(struct.pack("<qq", 0, 0))
            for document in read_documents(sources, Reading(text_field, on_read, self._skip)):
                self._add(document.name, document.pieces, files)
            if not self.documents:
                where = ", ".join(str(source.path) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
                raise UserError(f"data: no text in {where}: all of it is empty or not text")
            (self.folder / _INDEX).unlink(missing_ok=True)  # from here to the end there is no cache
        self._write_index()

    def _skip(self, name: str) -> None:
        if len(self.skipped) < 1000:
            self.skipped.append(name)

    def _add(self, name: str, pieces: Iterable[bytes], files: list[BinaryIO]) -> None:
        before = self.bytes
        for piece in pieces:
            files[2].write(piece)
            self.content.update(piece)
            self.bytes += len(piece)
        assert self.bytes > before, "readers skip what is empty"
        encoded = name.encode("utf-8", "surrogateescape")
        files[0].write(encoded)
        self.name_bytes += len(encoded)
        self.documents += 1
        files[1].write(struct.pack("<qq", self.bytes, self.name_bytes))
        self.boundaries.update(struct.pack("<q", self.bytes))

    def _write_index(self) -> None:
        self.content.update(self.boundaries.digest())
        index = {
            "format": _FORMAT,
            "key": self.key,
            "fingerprint": self.content.hexdigest(),
            "documents": self.documents,
            "bytes": self.bytes,
            "skipped": self.skipped,
            "sizes": {_TOKENS: self.bytes, _DOCUMENTS: 16 * (self.documents + 1), _NAMES: self.name_bytes},
        }
        write_atomically(self.folder / _INDEX, json.dumps(index, indent=1) + "\n")
