"""The files of a prepared corpus.

tokens.bin      the documents' ids end to end, uint8 for bytes, uint16 or uint32 for subwords, little-endian
documents.bin   int64 [documents + 1, 2]: where each document starts in tokens and its name in names.bin, and the ends
bytes.bin       int64 [documents], the bytes of each document's text; only where ids are not bytes
tokenizer.json  what made the ids; only where they are not bytes
names.bin       the names end to end
index.json      written last: without it there is no corpus
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from milonga.data.bpe import TOKENIZER, BpeCodec, load_tokenizer
from milonga.data.readers import Reading, Source, read_documents
from milonga.data.text import ByteCodec, TextCodec
from milonga.errors import UserError
from milonga.files import atomic_write, write_atomically

Progress = Callable[[int, int | None], None]

FORMAT = 1
TOKENS, DOCUMENTS, NAMES, BYTES, INDEX = "tokens.bin", "documents.bin", "names.bin", "bytes.bin", "index.json"
_PART = 1 << 20  # bytes that are encoded at once


def inputs_key(sources: list[Source], text_field: str, codec: TextCodec) -> str:
    """What a cache is made from, as 64 hexadecimal digits: the same key, the same cache."""
    made = [FORMAT, text_field] if codec.name == ByteCodec.name else [FORMAT, text_field, codec.digest]
    digest = hashlib.sha256(json.dumps(made).encode())
    for source in sources:
        stat = source.path.stat()
        entry = [os.path.abspath(source.path), source.name, source.asked, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a whole cache in `folder`; None if there is none or a part is missing or of another size."""
    try:
        index = json.loads((folder / INDEX).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in index["sizes"].items())
        needed = {"format", "key", "fingerprint", "skipped"} <= index.keys()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return index if whole and needed and isinstance(index["format"], int) else None


def stored_key(folder: Path) -> str | None:
    """The key of the cache in `folder`; None if there is none."""
    index = read_index(folder)
    return None if index is None else index["key"]


def stored_codec(folder: Path, index: dict[str, Any]) -> TextCodec:
    """The codec that made the ids of a cache.

    Raises:
        UserError: if its file is damaged, or is another one than the cache was made with.
    """
    if "tokenizer" not in index:
        return ByteCodec()
    codec = load_tokenizer(folder / TOKENIZER)
    if codec.digest != index["tokenizer"]:
        raise UserError(f"data: {folder / TOKENIZER} is not what the text was prepared with: remove {folder}")
    return codec


class CacheWriter:
    """Writes the files of one cache; `index.json` comes last, so that a cache is whole or not there."""

    def __init__(self, folder: Path, key: str, codec: TextCodec):
        self.folder, self.key, self.codec = folder, key, codec
        self.subwords = isinstance(codec, BpeCodec)
        self.skipped: list[str] = []
        self.tokens = self.bytes = self.documents = self.name_bytes = 0
        self.content, self.boundaries = hashlib.sha256(), hashlib.sha256()
        if self.subwords:
            self.content.update(codec.digest.encode())

    def write(self, sources: list[Source], text_field: str, progress: Progress | None) -> None:
        """Read the sources and write everything. The folder is locked.

        Raises:
            UserError: as reading does, and when no text is left or the disk is full.
        """
        total = sum(source.path.stat().st_size for source in sources)
        done = 0

        def on_read(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None and count:
                progress(min(done, total), total)

        with ExitStack() as stack:
            # the tokens are the innermost: when the disk fills up, it is their file that is named
            names = [NAMES, DOCUMENTS, *([BYTES] if self.subwords else []), TOKENS]
            files = {name: stack.enter_context(atomic_write(self.folder / name)) for name in names}
            files[DOCUMENTS].write(struct.pack("<qq", 0, 0))
            for document in read_documents(sources, Reading(text_field, on_read, self._skip)):
                self._add(document.name, document.pieces, files)
            if not self.documents:
                where = ", ".join(str(source.path) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
                raise UserError(f"data: no text in {where}: all of it is empty or not text")
            (self.folder / INDEX).unlink(missing_ok=True)  # from here to the end there is no cache
        self._write_index()

    def _skip(self, name: str) -> None:
        if len(self.skipped) < 1000:
            self.skipped.append(name)

    def _add(self, name: str, pieces: Iterable[bytes], files: dict[str, BinaryIO]) -> None:
        before = self.bytes
        for part in self.codec.cut(pieces, _PART):
            ids = self.codec.encode(part)
            stored = ids.astype(ids.dtype.newbyteorder("<"), copy=False).data
            files[TOKENS].write(stored)
            self.content.update(stored)
            self.tokens += len(ids)
            self.bytes += len(part)
        assert self.bytes > before, "readers skip what is empty"
        encoded = name.encode("utf-8", "surrogateescape")
        files[NAMES].write(encoded)
        self.name_bytes += len(encoded)
        self.documents += 1
        files[DOCUMENTS].write(struct.pack("<qq", self.tokens, self.name_bytes))
        if self.subwords:
            files[BYTES].write(struct.pack("<q", self.bytes - before))
        self.boundaries.update(struct.pack("<q", self.tokens))

    def _write_index(self) -> None:
        self.content.update(self.boundaries.digest())
        sizes = {
            TOKENS: self.tokens * self.codec.dtype.itemsize,
            DOCUMENTS: 16 * (self.documents + 1),
            NAMES: self.name_bytes,
        }
        index: dict[str, Any] = {
            "format": FORMAT,
            "key": self.key,
            "fingerprint": self.content.hexdigest(),
            "documents": self.documents,
            "bytes": self.bytes,
            "skipped": self.skipped,
            "sizes": sizes,
        }
        if isinstance(self.codec, BpeCodec):
            self.codec.save(self.folder / TOKENIZER)
            sizes |= {BYTES: 8 * self.documents, TOKENIZER: (self.folder / TOKENIZER).stat().st_size}
            index["tokenizer"] = self.codec.digest
        write_atomically(self.folder / INDEX, json.dumps(index, indent=1) + "\n")
