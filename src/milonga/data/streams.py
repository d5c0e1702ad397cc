"""Files as streams of decompressed bytes, with damage turned into one clear line."""

import importlib
import importlib.util
import io
import tarfile
import zlib
from bz2 import BZ2File
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from gzip import GzipFile
from lzma import LZMAError, LZMAFile
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from milonga.errors import UserError

_CHUNK = 1 << 20
# short forms of a compressed tar
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class DamagedError(Exception):
    """A compressed stream or an archive that is not what its name says, or ends too early."""


class ByteStream(Protocol):
    """What reading needs of a file."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


def split_suffix(name: str) -> tuple[str, str]:
    """A file name's kind and compression: `a.jsonl.gz` is (".jsonl", ".gz"), `a.tgz` (".tar", ".gz"), `a` ("", "")."""
    lower = name.lower()
    for short, long in _SHORT.items():
        if lower.endswith(short):
            lower = lower.removesuffix(short) + long
    compression = next((suffix for suffix in COMPRESSIONS if lower.endswith(suffix)), "")
    return Path(lower.removesuffix(compression)).suffix, compression


def optional_module(module: str, extra: str, purpose: str) -> ModuleType:
    """A library that only few need, imported when it is.

    Args:
        module: its name.
        extra: of this package, which installs it.
        purpose: what needs it, as the beginning of the error.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"{purpose} needs {module.partition('.')[0]}: pip install 'milonga[{extra}]'")
    return importlib.import_module(module)


class CountedFile(io.RawIOBase):
    """A file that reports how many bytes were read from it."""

    def __init__(self, path: Path, on_read: Callable[[int], None]):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed in close()
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer) or 0
        self._on_read(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class ZstdFile(io.RawIOBase):
    """A reader of Zstandard frames, one after another, that notices when the last is cut short."""

    def __init__(self, source: ByteStream, zstandard: ModuleType):
        self._source, self._zstandard = source, zstandard
        self._frame: Any = None  # None between frames
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            if not self._input:
                self._input = self._source.read(_CHUNK >> 3)
                if not self._input:
                    if self._frame is not None:
                        raise DamagedError("the last Zstandard frame is cut short")
                    return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output, self._input = self._frame.decompress(self._input), b""
            except self._zstandard.ZstdError as error:
                raise DamagedError(str(error)) from error
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def decompressed(source: ByteStream, compression: str, path: str) -> ByteStream:
    """`source` read through the decompressor for `.gz`, `.bz2`, `.xz`, `.zst` or "" (none)."""
    file: Any = source  # each decompressor asks for a type of its own, and needs only read()
    if compression == ".gz":
        return GzipFile(fileobj=file, mode="rb")
    if compression == ".bz2":
        return BZ2File(file)
    if compression == ".xz":
        return LZMAFile(file)
    if compression == ".zst":
        return io.BufferedReader(ZstdFile(file, optional_module("zstandard", "zst", f"data: reading {path}")), _CHUNK)
    return source


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turn what a damaged or unreadable file raises into a `UserError` that names it."""
    try:
        yield
    except (EOFError, DamagedError, LZMAError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"data: {path} is damaged or cut short ({error}): fetch or compress it again") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 say so when the content is not theirs
            raise UserError(f"data: {path} is damaged or cut short ({error}): fetch or compress it again") from error
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def tar_members(stream: ByteStream) -> Iterator[tuple[str, ByteStream]]:
    """The regular files of a tar archive, read once from front to back at constant memory; nothing is extracted.

    Each file must be read before the next is asked for. The archive is then read to its end, so that a checksum of
    the compression around it is verified.

    Raises:
        DamagedError: if something other than zeros follows the archive's end: a header in the middle was damaged.
    """
    source: Any = stream  # only its read() is used
    with tarfile.open(fileobj=source, mode="r|") as archive:
        while (member := archive.next()) is not None:
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file
            archive.members.clear()  # type: ignore[attr-defined]  # else it remembers every member
        rest = archive.fileobj
        assert rest is not None
        while chunk := rest.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise DamagedError("something follows the end of the archive")
