"""Atomic writes, checksums, locks: with real processes, a real SIGKILL and a real file-size limit."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from milonga.errors import UserError
from milonga.files import (
    FolderLock,
    atomic_write,
    check_target,
    checksum,
    ensure_folder,
    remove_partials,
    write_atomically,
)


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=60
    )


def test_a_write_replaces_the_whole_file_and_leaves_no_temporary(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "old and long")
    write_atomically(path, "neué")
    assert path.read_bytes() == "neué".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_raises_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_os_error_of_the_block_is_its_own(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "a.bin"):
        (tmp_path / "elsewhere").read_bytes()


def test_permissions_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot write .*missing.*a\.bin: No such file"):
        write_atomically(tmp_path / "missing" / "a.bin", b"")


def test_a_name_that_is_none_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, words in (
        (".", "that is a folder"),
        ("", "that is a folder"),
        ("/", "that is a folder"),
        ("a\0b", "zero"),
    ):
        with pytest.raises(UserError, match=words):
            write_atomically(name, b"")
        with pytest.raises(UserError, match=words):
            check_target(name)
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_told_before_a_file_is_written(tmp_path: Path):
    check_target(tmp_path / "new")
    (tmp_path / "old").write_bytes(b"old")
    check_target(tmp_path / "old")
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "a", "No such"),
        (tmp_path / "old" / "a", "No"),
    ):
        with pytest.raises(UserError, match=words):
            check_target(path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path):
    path = tmp_path / "weights.bin"
    write_atomically(path, b"old")
    code = """
        import resource, sys
        from milonga.errors import UserError
        from milonga.files import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_atomically(sys.argv[1], bytes(int(sys.argv[2])))
        except UserError as error:
            sys.exit(str(error))
    """
    for size in (8192, 8 << 20):  # refused when the buffer is flushed; refused while the block writes
        done = run_python(code, path, size)
        assert done.returncode == 1
        assert str(path) in done.stderr
        assert "disk is full or a file-size limit" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_a_killed_writer_leaves_the_old_file_and_a_partial_that_can_be_removed(tmp_path: Path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    code = """
        import os, signal, sys
        from milonga.files import atomic_write
        with atomic_write(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_checksum_is_sha256(tmp_path: Path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert checksum(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_folder_where_a_file_is(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UserError, match="a: File exists"):
        ensure_folder(tmp_path / "a")


def test_two_locks_in_one_process(tmp_path: Path):
    with FolderLock(tmp_path / "run"), pytest.raises(UserError, match=rf"another run \(pid {os.getpid()}\)"):
        FolderLock(tmp_path / "run").__enter__()
    with FolderLock(tmp_path / "run"):
        pass


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path):
    code = """
        import sys, time
        from milonga.files import FolderLock
        with FolderLock(sys.argv[1]):
            print("locked", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        message = rf"another run \(pid {other.pid}\) is writing to {tmp_path}"
        with pytest.raises(UserError, match=message), FolderLock(tmp_path):
            pass
        other.kill()
    with FolderLock(tmp_path):
        pass
