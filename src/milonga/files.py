"""Files that are either whole or not there: atomic writes, checksums, and a lock per folder."""

import errno
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from milonga.errors import UserError

if sys.platform != "win32":
    import fcntl

_PARTIAL = ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` raised while writing to `path` into one clear line.

    Raises:
        UserError: naming `path`: the disk is full or a size limit was met (ENOSPC, EDQUOT, EFBIG), or the operating
            system refused for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"cannot write {os.fspath(path)}: the disk is full or a file-size limit was met "
                f"({error.strerror}); what was saved before is intact: free some space and go on"
            ) from error
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error


def ensure_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder `path` and its parents where they are missing, and return it.

    Raises:
        UserError: if that is refused, or something that is not a folder has that name.
    """
    folder = Path(path)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames inside a folder survive a power cut. Does nothing where folders cannot be opened (Windows)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(path: str | os.PathLike[str]) -> None:
    """What can be told of a file before it is written, so that work of hours does not end with nothing kept.

    Raises:
        UserError: if `path` is a folder or no name of a file, or its folder is missing or may not be written to.
    """
    target = Path(path)
    _check_name(target)
    with disk_errors(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_name(path: Path) -> None:
    if path.name == "":
        raise UserError(f"cannot write {path}: that is a folder; name a file in it")
    if "\0" in str(path):
        raise UserError(f"cannot write {path}: a name cannot hold a zero byte")


def partial_beside(path: Path) -> Path:
    """A new name for a temporary in the folder of `path`, which `remove_partials` knows.

    Raises:
        UserError: if `path` is no name of a file.
    """
    _check_name(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears whole or not at all.

    Yields a binary file, a temporary beside `path`. When the block ends it is flushed, synced to the disk and renamed
    to `path`, and the folder is synced. When the block raises, or the disk is full, the temporary is removed and the
    old content of `path` stays as it was.

    Raises:
        UserError: if the file cannot be made, synced or renamed, or the disk is full while the block writes (see
            `disk_errors`). Any other `OSError` of the block is passed on as it is.
    """
    path = Path(path)
    temporary = partial_beside(path)
    with disk_errors(path):
        file = open(temporary, "xb", buffering=1 << 20)  # noqa: SIM115  closed below, before the rename
    try:
        try:
            yield file
        except OSError as error:
            if error.errno in _FULL:
                with disk_errors(path):
                    raise
            raise  # the block's own affair: a file it reads, a pipe it reports to
        with disk_errors(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # on a full disk closing fails as writing did, which has been said already
            file.close()
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all. Raises as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_partials(folder: str | os.PathLike[str]) -> None:
    """Remove temporaries that killed processes left in `folder`. Call it only while holding the folder's lock."""
    for path in Path(folder).glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def checksum(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits; reads it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FolderLock:
    """At most one process writes to a folder.

    A context manager around `FOLDER/.lock`, which holds the owner's process id. The lock belongs to the open file, so
    it vanishes with the process, however that ends, and no stale lock is ever left; the file itself stays. Where the
    system or the file system has no such locks (Windows, some network mounts) nothing is locked.

    Args:
        folder: made if it is missing.

    Raises:
        UserError: on entering, if another process, or another lock in this one, holds the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> "FolderLock":
        assert self._descriptor is None, "a lock is entered once"
        ensure_folder(self.folder)
        path = self.folder / ".lock"
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(descriptor)
            with disk_errors(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, descriptor: int) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"another run (pid {owner}) is writing to {self.folder}: wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {self.folder}: {error.strerror or error}") from error
