"""Prepared text: whole or not there, used again, read at constant memory; held out by document."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milonga.data.bpe import BpeCodec
from milonga.data.corpus import Corpus
from milonga.errors import UserError
from tests.data.helpers import STORY, in_memory, make_corpus, story_codec, subword_corpus


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=100
    )


def test_documents_are_kept_apart_and_named(tmp_path: Path):
    texts = [b"first", "zweité".encode(), b"x"]
    corpus = make_corpus(tmp_path, texts)
    assert (corpus.documents, len(corpus), corpus.bytes) == (3, 3, 13)
    assert [bytes(document) for document in corpus] == texts
    assert bytes(corpus.document(-1)) == b"x"
    assert corpus.document(0).dtype == np.uint8
    assert not corpus.document(0).flags.writeable
    assert corpus.offsets.tolist() == [0, 5, 12, 13]
    assert list(corpus.names) == ["0000.txt", "0001.txt", "0002.txt"]
    assert corpus.names[1:] == ["0001.txt", "0002.txt"]
    assert corpus.names[-3] == "0000.txt"
    for index in (3, -4):
        with pytest.raises(IndexError):
            corpus.document(index)
        with pytest.raises(IndexError):
            corpus.names[index]


def test_a_second_call_reads_nothing_until_something_changes(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    calls: list[tuple[int, int | None]] = []

    def build(*names: str) -> Corpus:
        calls.clear()
        paths = [tmp_path / name for name in names]
        return Corpus.build(paths, tmp_path / "cache", progress=lambda *a: calls.append(a))

    first = build("a.txt", "b.txt")
    assert calls[-1] == (6, 6)
    assert sorted(os.listdir(tmp_path / "cache")) == [".lock", "documents.bin", "index.json", "names.bin", "tokens.bin"]
    assert build("a.txt", "b.txt").fingerprint == first.fingerprint
    assert calls == []
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert build("a.txt", "b.txt").fingerprint == first.fingerprint  # read again, and the same
    assert calls
    (tmp_path / "a.txt").write_text("onf")
    assert build("a.txt", "b.txt").fingerprint != first.fingerprint
    assert build("b.txt").bytes == 3
    (tmp_path / "b.txt").unlink()
    assert bytes(Corpus.open(tmp_path / "cache").document(0)) == b"two"


def test_the_fingerprint_knows_content_and_boundaries(tmp_path: Path):
    one = make_corpus(tmp_path / "1", [b"ab", b"c"])
    assert make_corpus(tmp_path / "2", [b"ab", b"c"]).fingerprint == one.fingerprint
    assert make_corpus(tmp_path / "3", [b"a", b"bc"]).fingerprint != one.fingerprint
    assert one.select([0]).fingerprint != one.select([1]).fingerprint != one.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "names.bin", "documents.bin", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_damaged_cache_is_refused_by_open_and_made_again_by_build(tmp_path: Path, name: str, damage: str):
    make_corpus(tmp_path, [b"some text", b"more"])
    path = tmp_path / "cache" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "other":
        path.write_bytes(b"[]")
    with pytest.raises(UserError, match="holds no prepared corpus"):
        Corpus.open(tmp_path / "cache")
    assert Corpus.build([tmp_path / "texts"], tmp_path / "cache").bytes == 13


def test_a_cache_from_a_newer_version(tmp_path: Path):
    make_corpus(tmp_path, [b"some text"])
    path = tmp_path / "cache/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="prepared by a newer version"):
        Corpus.open(tmp_path / "cache")


def test_when_nothing_is_left(tmp_path: Path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no text in .*a\.txt: all of it is empty or not text"):
        Corpus.build([tmp_path / "t"], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [".lock"]
    with pytest.raises(UserError, match="every file to train on is held out"):
        Corpus.build([tmp_path / "t"], tmp_path / "cache", exclude=[tmp_path / "t/a.txt"])


def test_files_can_be_left_out(tmp_path: Path):
    make_corpus(tmp_path, [b"a", b"b", b"c"])
    corpus = Corpus.build([tmp_path / "texts"], tmp_path / "cache2", exclude=[tmp_path / "texts/0001.txt"])
    assert list(corpus.names) == ["0000.txt", "0002.txt"]


def test_a_failed_build_leaves_the_earlier_cache(tmp_path: Path):
    make_corpus(tmp_path, [b"good"])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        Corpus.build([tmp_path / "bad.jsonl"], tmp_path / "cache")
    assert bytes(Corpus.open(tmp_path / "cache").document(0)) == b"good"
    assert len(os.listdir(tmp_path / "cache")) == 5


def test_a_full_disk_leaves_the_earlier_cache(tmp_path: Path):
    make_corpus(tmp_path, [b"good"])
    (tmp_path / "big.txt").write_bytes(b"text " * 1_000_000)
    code = """
        import resource, sys
        from milonga.data.corpus import Corpus
        from milonga.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            Corpus.build([sys.argv[1]], sys.argv[2])
        except UserError as error:
            sys.exit(str(error))
    """
    done = run_python(code, tmp_path / "big.txt", tmp_path / "cache")
    assert done.returncode == 1
    assert re.fullmatch(r"cannot write .*tokens\.bin: the disk is full or a file-size limit.*\n", done.stderr)
    assert bytes(Corpus.open(tmp_path / "cache").document(0)) == b"good"
    assert len(os.listdir(tmp_path / "cache")) == 5


def test_a_killed_build_is_started_over(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"text " * 1_000_000)
    code = """
        import os, signal, sys
        from milonga.data.corpus import Corpus
        Corpus.build([sys.argv[1]], sys.argv[2], progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
    """
    done = run_python(code, tmp_path / "a.txt", tmp_path / "cache")
    assert done.returncode == -signal.SIGKILL
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path / "cache"))
    assert Corpus.build([tmp_path / "a.txt"], tmp_path / "cache").bytes == 5_000_000
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path / "cache"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path):
    code = """
        import json, resource, sys, zstandard
        from pathlib import Path
        from milonga.data.corpus import Corpus
        folder = Path(sys.argv[1])
        def build(name, lines):
            with open(folder / name, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
                for i in range(lines):
                    file.write(json.dumps({"text": f"document {i} " * 800}).encode() + b"\\n")
            Corpus.build([folder / name], folder / ("cache" + name))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        small = build("small.jsonl.zst", 500)
        print(build("large.jsonl.zst", 6000) - small)
    """
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cachelarge.jsonl.zst/tokens.bin").stat().st_size > 60_000_000
    assert int(done.stdout) < 8 * 1024  # KiB


@given(st.lists(st.integers(1, 400), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**65))
def test_a_fraction_is_held_out_by_document(lengths: list[int], fraction: float, seed: int):
    corpus = in_memory([bytes([i]) * length for i, length in enumerate(lengths)])
    train, held = corpus.split(fraction, seed)
    assert train.documents >= 1
    assert held.documents >= 1
    assert sorted([*train.names, *held.names]) == list(corpus.names)
    for view in (train, held):
        for name, document in zip(view.names, view, strict=True):
            assert bytes(document) == bytes(corpus.document(int(name[:4])))
    again = corpus.split(fraction, seed)[1]
    assert (again.fingerprint, list(again.names)) == (held.fingerprint, list(held.names))
    if held.documents > 1 and train.documents > 1:
        assert abs(held.bytes - fraction * corpus.bytes) <= max(lengths)


def test_the_seed_chooses_who_is_held_out(tmp_path: Path):
    corpus = make_corpus(tmp_path, [b"x" * 10] * 20)
    chosen = {tuple(corpus.split(0.2, seed)[1].names) for seed in range(5)}
    assert len(chosen) == 5
    assert {len(names) for names in chosen} == {4}


def test_names_and_globs_are_held_out(tmp_path: Path):
    corpus = make_corpus(tmp_path, [b"a", b"b", b"c", b"d"])
    train, held = corpus.split(["0001.txt", "*3.txt"])
    assert (list(train.names), list(held.names)) == (["0000.txt", "0002.txt"], ["0001.txt", "0003.txt"])
    assert [bytes(document) for document in held] == [b"b", b"d"]
    assert [bytes(document) for document in held.select([1])] == [b"d"]
    with pytest.raises(UserError, match=r"no document is called x\*: there are 4, such as 0000.txt, 0001.txt"):
        corpus.split(["0000.txt", "x*"])
    with pytest.raises(UserError, match="every document is held out"):
        corpus.split(["*"])
    with pytest.raises(UserError, match=r"between 0 and 1, got 1\.5"):
        corpus.split(1.5)


def test_a_single_document_is_cut_only_when_asked(tmp_path: Path):
    corpus = make_corpus(tmp_path, ["0123456789é".encode() * 10])
    with pytest.raises(UserError, match=r"single document \(0000.txt\).*data.heldout_tail=true"):
        corpus.split(0.1)
    train, held = corpus.split(0.1, holdout_tail=True)
    whole = bytes(corpus.document(0))
    assert bytes(train.document(0)) + bytes(held.document(0)) == whole
    bytes(held.document(0)).decode()
    assert held.bytes == 12
    train, held = corpus.split(0.002, holdout_tail=True)  # the cut would fall inside the last character
    assert bytes(train.document(0)) + bytes(held.document(0)) == whole
    assert held.bytes == 1
    with pytest.raises(UserError, match="too short to hold out"):
        make_corpus(tmp_path / "2", [b"x"]).split(0.5, holdout_tail=True)


STORIES = [STORY, b"the moon \xff\xfe saw", "là-bas, the sea — ".encode() * 40, b"x"]


def test_documents_of_subwords_are_encoded_one_by_one(tmp_path: Path):
    codec = story_codec()
    corpus = subword_corpus(tmp_path, STORIES, codec)
    for again in (corpus, Corpus.open(tmp_path / "cache")):
        assert again.codec == codec
        assert [document.tolist() for document in again] == [codec.encode(text).tolist() for text in STORIES]
        assert [codec.decode(document) for document in again] == STORIES
        assert again.document(0).dtype == np.uint16
        assert again.document_bytes.tolist() == [len(text) for text in STORIES]
        assert again.bytes == sum(map(len, STORIES))
        assert again.length == len(again.tokens) == sum(len(codec.encode(text)) for text in STORIES)
    part = corpus.select([2, 0])
    assert (part.bytes, part.codec) == (len(STORIES[2]) + len(STORIES[0]), codec)
    assert [codec.decode(document) for document in part] == [STORIES[2], STORIES[0]]


def test_more_than_65536_tokens_are_kept_in_four_bytes(tmp_path: Path):
    merges = [(bytes([a]), bytes([b])) for a in range(256) for b in reversed(range(256))]
    codec = BpeCodec(merges)
    corpus = subword_corpus(tmp_path, [b"\xffA a"], codec)
    assert corpus.document(0).dtype == np.uint32
    assert corpus.document(0).tolist() == [256 + 255 * 256 + 255 - 65, 256 + 32 * 256 + 255 - 97]
    assert codec.decode(corpus.document(0)) == b"\xffA a"


def test_a_cache_belongs_to_its_tokenizer(tmp_path: Path):
    plain = make_corpus(tmp_path / "bytes", STORIES)
    one = subword_corpus(tmp_path / "one", STORIES, story_codec())
    other = subword_corpus(tmp_path / "other", STORIES, story_codec(270))
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    texts, cache = tmp_path / "one" / "texts", tmp_path / "one" / "cache"
    calls: list[int] = []
    same = Corpus.build([texts], cache, codec=story_codec(), progress=lambda done, _: calls.append(done))
    assert (same.fingerprint, calls) == (one.fingerprint, [])
    assert Corpus.build([texts], cache, codec=story_codec(270)).fingerprint == other.fingerprint
    assert Corpus.build([texts], cache).fingerprint == plain.fingerprint
    (tmp_path / "other/cache/tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no prepared corpus"):
        Corpus.open(tmp_path / "other/cache")


def test_the_same_documents_are_held_out_of_bytes_and_of_subwords(tmp_path: Path):
    texts = [STORY[: 40 + 31 * number] for number in range(10)] + ["är".encode() * 90]
    plain = make_corpus(tmp_path / "bytes", texts)
    subwords = subword_corpus(tmp_path / "subwords", texts, story_codec())
    for seed in range(5):
        for fraction in (0.05, 0.3):
            kept, held = plain.split(fraction, seed)
            kept_too, held_too = subwords.split(fraction, seed)
            assert list(held.names) == list(held_too.names)
            assert (kept.bytes, held.bytes) == (kept_too.bytes, held_too.bytes)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.4])
def test_the_tail_of_subwords_begins_with_a_token(tmp_path: Path, fraction: float):
    text = STORY + "là-bas — déjà — ".encode() * 60
    codec = story_codec()
    kept, held = subword_corpus(tmp_path / "subwords", [text], codec).split(fraction, holdout_tail=True)
    _, plain = make_corpus(tmp_path / "bytes", [text]).split(fraction, holdout_tail=True)
    head, tail = codec.decode(kept.document(0)), codec.decode(held.document(0))
    assert head + tail == text
    assert (kept.bytes, held.bytes) == (len(head), len(tail))
    tail.decode()
    assert 0 <= plain.bytes - held.bytes < codec.token_lengths.max() + 3
