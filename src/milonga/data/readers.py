"""Files, folders, globs and archives as documents: named pieces of text, read as streams."""

import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from milonga.data.bundled import is_bundled, resolve_bundled
from milonga.data.streams import (
    ByteStream,
    CountedFile,
    decompressed,
    optional_module,
    read_errors,
    split_suffix,
    tar_members,
)
from milonga.errors import UserError

_CHUNK = 1 << 20
_HEAD = 1 << 13
_JSON_LINES = (".jsonl", ".ndjson")
# bytes that text does not hold: all controls but bell, backspace, tab, line feed, form feed, return, escape
_CONTROLS = bytes(set(range(32)) - {7, 8, 9, 10, 12, 13, 27}) + b"\x7f"


class Source(NamedTuple):
    """One file to read. `asked` is true if the user named it, false if it was found in a folder or by a glob."""

    path: Path
    name: str
    asked: bool


class Document(NamedTuple):
    """One text: its name and its bytes in pieces, which must be read before the next document is asked for."""

    name: str
    pieces: Iterable[bytes]


class Reading(NamedTuple):
    """What reading is told and what it tells."""

    text_field: str
    on_read: Callable[[int], None]  # bytes of the source files read since the last call
    on_skip: Callable[[str], None]  # the name of something that holds no text


def find_sources(paths: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """The files that `paths` name: files, folders (searched whole, names that begin with a dot left out), globs
    (`**` crosses folders), and `bundled:train`, `bundled:heldout`. Sorted within each path; a file named twice counts
    once.

    Raises:
        UserError: if there are no paths, or one names nothing, or is neither a file nor a folder.
    """
    found: dict[str, Source] = {}
    texts = [os.fspath(path) for path in paths]
    if not texts:
        raise UserError("data: no text was named: give files, folders or globs")
    for path in texts:
        sources = list(_expand(path))
        if not sources:
            raise UserError(f"data: the folder {path} holds no files (names that begin with a dot are left out)")
        for source in sources:
            found.setdefault(os.path.realpath(source.path), source)
    return list(found.values())


def _expand(text: str) -> Iterator[Source]:
    path = resolve_bundled(text) if is_bundled(text) else Path(text).expanduser()
    if path.is_dir():
        yield from _walk(path)
    elif path.is_file():
        yield Source(path, path.name, asked=True)
    elif path.exists():
        raise UserError(f"data: {text} is neither a file nor a folder")
    elif glob.has_magic(text):
        matches = sorted(glob.glob(os.path.expanduser(text), recursive=True))
        files = [Source(Path(match), Path(match).name, asked=False) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(f"data: no file matches the pattern {text} (below {os.getcwd()})")
        yield from files
    else:
        raise UserError(f"data: {text} does not exist (looked from {os.getcwd()})")


def _walk(folder: Path) -> Iterator[Source]:
    def refuse(error: OSError) -> None:
        raise UserError(f"data: cannot read {error.filename}: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield Source(path, path.relative_to(folder).as_posix(), asked=False)


def read_documents(sources: Sequence[Source], reading: Reading) -> Iterator[Document]:
    """The documents of the sources, in order, at constant memory.

    A plain text is one document; so is every member of a tar archive, every line of a `.jsonl` and every row of a
    `.parquet` (their `text_field`). `.gz`, `.bz2`, `.xz` and `.zst` are undone first.

    Raises:
        UserError: if a file is unreadable, damaged, cut short or malformed, needs a library that is not installed, or
            was asked for by name and is empty or not text. What is empty or not text elsewhere goes to `on_skip`.
    """
    for source in sources:
        kind, compression = split_suffix(source.path.name)
        if kind == ".parquet":
            if compression:
                raise UserError(f"data: {source.path} cannot be read as a stream: decompress it first")
            yield from _parquet(source, reading)
            continue
        with read_errors(str(source.path)):
            raw = io.BufferedReader(CountedFile(source.path, reading.on_read), _CHUNK)
        with raw:
            yield from _stream(raw, source.name, str(source.path), source.asked, reading)


def _stream(raw: ByteStream, name: str, where: str, asked: bool, reading: Reading) -> Iterator[Document]:
    """Documents of one file, of which `raw` gives the bytes: a file of the system, or a member of an archive."""
    kind, compression = split_suffix(name)
    with read_errors(where):
        stream = decompressed(raw, compression, where)
    if kind in _JSON_LINES:
        yield from _json_lines(stream, name, where, asked, reading)
    elif kind == ".tar":
        yield from _tar(stream, name, where, asked, reading)
    else:
        yield from _plain(stream, name, where, asked, reading)


def _plain(stream: ByteStream, name: str, where: str, asked: bool, reading: Reading) -> Iterator[Document]:
    with read_errors(where):
        head = stream.read(_HEAD)
    problem = "is empty" if not head else _not_text(head)
    if not problem:
        yield Document(name, chain([head], _pieces(stream, where)))
    elif asked:
        raise UserError(f"data: {where} {problem}")
    else:
        reading.on_skip(name)


def _pieces(stream: ByteStream, where: str) -> Iterator[bytes]:
    while True:
        with read_errors(where):
            piece = stream.read(_CHUNK)
        if not piece:
            return
        yield piece


def _not_text(head: bytes) -> str:
    """Why these first bytes of a file are not those of a text; empty if they may be."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is UTF-16: convert it to UTF-8 first"
    if b"\0" in head or len(head) - len(head.translate(None, _CONTROLS)) > 0.05 * len(head):
        return "is not a text: .txt, .md and the like, .jsonl, .parquet, tar archives and .gz .bz2 .xz .zst are read"
    return ""


def _tar(stream: ByteStream, name: str, where: str, asked: bool, reading: Reading) -> Iterator[Document]:
    members = tar_members(stream)
    any_member = False
    while True:
        with read_errors(where):
            member = next(members, None)
        if member is None:
            break
        inner, file = member
        any_member = True
        kind, _ = split_suffix(inner)
        if kind in (".parquet", ".tar") or Path(inner).name.startswith("."):
            reading.on_skip(f"{name}/{inner}")
        else:
            yield from _stream(file, f"{name}/{inner}", f"{where} (member {inner})", False, reading)
    if asked and not any_member:
        raise UserError(f"data: the archive {where} holds no files")


def _json_lines(stream: ByteStream, name: str, where: str, asked: bool, reading: Reading) -> Iterator[Document]:
    number = 0
    while True:
        with read_errors(where):
            line = stream.readline()
        if not line:
            break
        number += 1
        if not line.strip():
            continue
        text = _json_text(line, f"{where}:{number}", reading.text_field)
        if text:
            yield Document(f"{name}:{number}", [text])
        else:
            reading.on_skip(f"{name}:{number}")
    if asked and not number:
        raise UserError(f"data: {where} is empty")


def _json_text(line: bytes, where: str, field: str) -> bytes:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data: {where}: not a line of JSON ({error}): one object per line is expected") from error
    if not isinstance(entry, dict):
        raise UserError(f"data: {where}: expected a JSON object, got {type(entry).__name__}")
    if field not in entry:
        there = ", ".join(map(str, entry)) or "none"
        raise UserError(f"data: {where}: no field '{field}' (there are: {there}): set data.text_field")
    if not isinstance(entry[field], str):
        raise UserError(f"data: {where}: the field '{field}' must be text, got {type(entry[field]).__name__}")
    try:
        return entry[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data: {where}: the field '{field}' holds half of a character (\\ud800-\\udfff)") from error


def _parquet(source: Source, reading: Reading) -> Iterator[Document]:
    path, field = str(source.path), reading.text_field
    parquet = optional_module("pyarrow.parquet", "parquet", f"data: reading {path}")
    arrow = optional_module("pyarrow", "parquet", f"data: reading {path}")
    try:
        with parquet.ParquetFile(source.path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise UserError(
                    f"data: {path}: no column '{field}' (there are: {', '.join(schema.names)}): set data.text_field"
                )
            column = schema.field(field).type
            if not (arrow.types.is_string(column) or arrow.types.is_large_string(column)):
                raise UserError(f"data: {path}: the column '{field}' must be text, got {column}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_buffer()
                    if text:
                        yield Document(f"{source.name}:{row}", [text.to_pybytes()])
                    else:
                        reading.on_skip(f"{source.name}:{row}")
    except (arrow.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"data: {path} is damaged, cut short or not Parquet ({message})") from error
    if source.asked and not row:
        raise UserError(f"data: {path} is empty")
    reading.on_read(source.path.stat().st_size)
