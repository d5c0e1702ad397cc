"""Which documents come out of which files, and what is said when none can."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from milonga.data.bundled import bundled_heldout
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.errors import UserError
from tests.data.test_streams import make_tar

ZSTD = zstandard.ZstdCompressor().compress


def read(*paths: Path | str, field: str = "text") -> tuple[dict[str, bytes], list[str]]:
    skipped: list[str] = []
    reading = Reading(field, lambda count: None, skipped.append)
    return {d.name: b"".join(d.pieces) for d in read_documents(find_sources(paths), reading)}, skipped


def refuse(message: str, *paths: Path | str, field: str = "text") -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(*paths, field=field)
    assert "\n" not in str(caught.value)


def test_folders_globs_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sub/.hidden").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.rst", "sub/plain", ".secret", "sub/.hidden/d.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (tmp_path / "empty.txt").write_bytes(b"")
    folder, skipped = read(tmp_path)
    assert list(folder) == ["a.md", "b.txt", "sub/c.rst", "sub/plain"]
    assert folder["sub/c.rst"] == b"sub/c.rst"
    assert skipped == ["empty.txt", "picture.png"]
    assert list(read(tmp_path / "b.txt", tmp_path)[0]) == ["b.txt", "a.md", "sub/c.rst", "sub/plain"]  # once only
    monkeypatch.chdir(tmp_path)
    assert list(read("**/*.rst", "*.md")[0]) == ["c.rst", "a.md"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert read("odd[1].txt")[0] == {"odd[1].txt": b"odd"}


def test_every_compression_of_every_kind(tmp_path: Path):
    text = "Naïve café\n" * 3000
    lines = "".join(json.dumps({"text": t, "id": 1}) + "\n\n" for t in ("one", "zwei ü", ""))
    tar = make_tar({"x/a.txt": text.encode(), "x/b.jsonl": lines.encode(), "x/c.txt.gz": gzip.compress(b"inner")})
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD}
    for suffix, function in compress.items():
        folder = tmp_path / f"folder{suffix}"
        folder.mkdir()
        (folder / f"a.txt{suffix}").write_bytes(function(text.encode()))
        (folder / f"b.jsonl{suffix}").write_bytes(function(lines.encode()))
        (folder / f"c.tar{suffix}").write_bytes(function(tar))
        documents, skipped = read(folder)
        names = [f"a.txt{suffix}", f"b.jsonl{suffix}:1", f"b.jsonl{suffix}:3"]
        names += [f"c.tar{suffix}/x/{n}" for n in ("a.txt", "b.jsonl:1", "b.jsonl:3", "c.txt.gz")]
        expected = [text.encode(), b"one", "zwei ü".encode(), text.encode(), b"one", "zwei ü".encode(), b"inner"]
        assert documents == dict(zip(names, expected, strict=True))
        assert skipped == [f"b.jsonl{suffix}:5", f"c.tar{suffix}/x/b.jsonl:5"]


def test_what_an_archive_holds_besides_texts_is_skipped(tmp_path: Path):
    files = {"._a.txt": b"mac", "inner.tar": make_tar({"z": b"z"}), "empty": b"", "b.png": b"\0\1", "a.txt": b"text"}
    (tmp_path / "a.tgz").write_bytes(gzip.compress(make_tar(files)))
    documents, skipped = read(tmp_path / "a.tgz")
    assert documents == {"a.tgz/a.txt": b"text"}
    assert skipped == ["a.tgz/._a.txt", "a.tgz/inner.tar", "a.tgz/empty", "a.tgz/b.png"]


def test_nothing_is_written_outside_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a.tar").write_bytes(make_tar({"../escape.txt": b"text", "/abs.txt": b"more"}))
    assert list(read(tmp_path / "a.tar")[0].values()) == [b"text", b"more"]
    assert os.listdir() == []
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "here"]


def test_parquet(tmp_path: Path):
    table = pyarrow.table({"body": ["one", None, "zwei ü", ""] * 200, "n": range(800)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    documents, skipped = read(tmp_path / "a.parquet", field="body")
    assert len(documents) == 400
    assert documents["a.parquet:799"] == "zwei ü".encode()
    assert skipped[:2] == ["a.parquet:2", "a.parquet:4"]
    refuse(r"a\.parquet: no column 'text' \(there are: body, n\)", tmp_path)
    refuse("the column 'n' must be text, got int64", tmp_path, field="n")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    refuse(r"b\.parquet is damaged, cut short or not Parquet", tmp_path / "b.parquet")
    (tmp_path / "c.parquet.gz").write_bytes(b"")
    refuse(r"c\.parquet\.gz cannot be read as a stream: decompress it first", tmp_path / "c.parquet.gz")


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("milonga.data.streams.importlib.util.find_spec", lambda name: None)
    refuse(r"a\.parquet needs pyarrow: pip install 'milonga\[parquet\]'", tmp_path / "a.parquet")
    (tmp_path / "a.txt.zst").write_bytes(ZSTD(b"text"))
    refuse(r"a\.txt\.zst needs zstandard: pip install 'milonga\[zst\]'", tmp_path / "a.txt.zst")


def test_what_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/.hidden").write_text("x")
    refuse("no text was named")
    refuse(rf"missing\.txt does not exist \(looked from {tmp_path}\)", "missing.txt")
    refuse(r"no file matches the pattern \*\.text", "*.text")
    refuse(r"no file matches the pattern a\[b", "a[b")
    refuse("the folder folder holds no files", "folder")
    refuse("no bundled text 'bundled:nothing'", "bundled:nothing")
    os.mkfifo(tmp_path / "pipe")
    refuse("pipe is neither a file nor a folder", "pipe")


def test_files_asked_for_that_hold_no_text(tmp_path: Path):
    for name, content, message in [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.txt.gz", gzip.compress(b""), "is empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0", "is not a text"),
        ("noise.bin", bytes(range(1, 256)) * 20, "is not a text"),
        ("wide.txt", "text".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        ("empty.tar", make_tar({}), "holds no files"),
    ]:
        (tmp_path / name).write_bytes(content)
        refuse(f"{re.escape(name)} {message}", tmp_path / name)


def test_damaged_files_are_named(tmp_path: Path):
    rows = "".join(f"line {i}\n" for i in range(9000)).encode()
    for name, content in [
        ("a.txt.gz", gzip.compress(rows)),
        ("a.txt.xz", lzma.compress(rows)),
        ("a.txt.zst", ZSTD(rows)),
    ]:
        (tmp_path / name).write_bytes(content[:-20])
        refuse(rf"{re.escape(name)} is damaged or cut short", tmp_path / name)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        archive.add(tmp_path / "a.txt.gz", "a.txt.gz")
    (tmp_path / "b.tar.xz").write_bytes(out.getvalue())
    refuse(r"b\.tar\.xz \(member a\.txt\.gz\) is damaged or cut short", tmp_path / "b.tar.xz")
    (tmp_path / "b.tar.xz").write_bytes(out.getvalue()[:-30])
    refuse(r"b\.tar\.xz .*is damaged or cut short", tmp_path / "b.tar.xz")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not a line of JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"body": "x", "id": 1}', r"no field 'text' \(there are: body, id\): set data.text_field"),
        ('{"text": 3}', "the field 'text' must be text, got int"),
        ('{"text": "\\ud800"}', "holds half of a character"),
        ("[" * 100_000, "not a line of JSON"),
    ],
)
def test_malformed_lines_are_named_by_number(tmp_path: Path, line: str, message: str):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    refuse(rf"a\.jsonl:3: .*{message}", tmp_path / "a.jsonl")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("x")
    sources = find_sources([tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()  # for root no file is forbidden; one that vanished is as unreadable
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file"):
        list(read_documents(sources, Reading("text", lambda count: None, lambda name: None)))


def test_bundled_names():
    documents, _ = read("bundled:heldout")
    assert list(documents) == [bundled_heldout().name]
    assert len(documents[bundled_heldout().name]) == 337_055
