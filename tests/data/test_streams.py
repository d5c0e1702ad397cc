"""Compressed streams and archives, whole and cut."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from milonga.data.streams import decompressed, optional_module, read_errors, split_suffix, tar_members
from milonga.errors import UserError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def make_tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.txt", (".txt", "")),
        ("A.JSONL.GZ", (".jsonl", ".gz")),
        ("b.tgz", (".tar", ".gz")),
        ("b.tar.zst", (".tar", ".zst")),
        ("v1.2/README", ("", "")),
        ("notes.xz", ("", ".xz")),
    ],
)
def test_suffixes(name, parts):
    assert split_suffix(name) == parts


@pytest.mark.parametrize("compression", COMPRESS)
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=3))
def test_streams_of_several_frames_are_undone(compression: str, contents: list[bytes]):
    packed = b"".join(COMPRESS[compression](content) for content in contents)
    assert decompressed(io.BytesIO(packed), compression, "x").read() == b"".join(contents)


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_every_cut_is_noticed(compression: str):
    packed = COMPRESS[compression](bytes(range(256)) * 20)
    for cut in range(1, len(packed), 7):
        with pytest.raises(UserError, match=r"file\.x is damaged or cut short"), read_errors("file.x"):
            decompressed(io.BytesIO(packed[:cut]), compression, "file.x").read()


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_content_of_another_kind_is_noticed(compression: str):
    with pytest.raises(UserError, match=r"file\.x is damaged or cut short"), read_errors("file.x"):
        decompressed(io.BytesIO(b"plain text, much of it" * 9), compression, "file.x").read()


def test_tar_members_are_read_in_order_and_only_files():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("../up", tarfile.REGTYPE), ("link", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 2 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"hi"))
    data.seek(0)
    assert [(name, file.read()) for name, file in tar_members(data)] == [("../up", b"hi")]


def test_a_damaged_tar_is_noticed():
    whole = make_tar({"a": b"x" * 5000, "b": b"y" * 5000, "c": b"z" * 5000})
    damaged = bytearray(whole)
    damaged[512 + 5120 + 10] ^= 1  # the name in the second header: its checksum no longer fits

    def read_all(data: bytes) -> None:
        for _, file in tar_members(io.BytesIO(data)):
            file.read()

    for data in (whole[:3000], whole[: 512 + 5120 + 600], bytes(damaged)):
        with pytest.raises(UserError, match=r"a\.tar is damaged or cut short"), read_errors("a.tar"):
            read_all(data)


def test_a_missing_library_is_named_with_its_extra():
    with pytest.raises(UserError, match=r"reading a.parquet needs nowhere: pip install 'milonga\[parquet\]'"):
        optional_module("nowhere.at.all", "parquet", "data: reading a.parquet")
