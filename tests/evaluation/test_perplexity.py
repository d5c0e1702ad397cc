"""Bits per byte of whole texts."""

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.evaluation import COMPRESSORS, evaluate_perplexity
from milonga.evaluation.perplexity import EDGES, _Buckets
from tests.inference.helpers import opinionated

LM = opinionated()
WORDS = b"the boat sailed and the sail was torn and the boat went home ".split()
TEXT = b" ".join(WORDS[i] for i in np.random.default_rng(0).integers(0, len(WORDS), 900))


def test_the_mean_over_a_document_is_that_of_a_session():
    scores = evaluate_perplexity(LM, [("boat", [TEXT])])
    bits = LM.session().score(TEXT)
    assert scores.bytes == len(TEXT)
    assert scores.bits_per_byte == pytest.approx(bits.mean(), rel=1e-6)
    assert len(scores.buckets) > 2
    for bucket in scores.buckets:
        part = bits[bucket.start : bucket.end]
        assert bucket.bytes == len(part)
        assert bucket.bits_per_byte == pytest.approx(part.mean(), rel=1e-6)


@given(st.lists(st.integers(0, len(TEXT)), max_size=5))
@settings(max_examples=5)
def test_the_pieces_a_text_comes_in_do_not_matter(cuts):
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[i:j] for i, j in pairwise(edges)]
    whole, cut = evaluate_perplexity(LM, [("boat", [TEXT])]), evaluate_perplexity(LM, [("boat", pieces)])
    assert cut.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=2e-6)
    assert [b.bytes for b in cut.buckets] == [b.bytes for b in whole.buckets]
    assert cut.documents[0].compressed_bytes == whole.documents[0].compressed_bytes


def test_documents_are_read_from_fresh_sessions_and_bytes_weigh_alike():
    one, two, three = TEXT[:2000], b"x", TEXT[2000:3100]
    alone = [evaluate_perplexity(LM, [("alone", [text])]) for text in (one, two, three)]
    scores = evaluate_perplexity(LM, iter([("one", [one]), ("two", [two]), ("three", [three])]))
    assert [d.name for d in scores.documents] == ["one", "two", "three"]
    assert [d.bits_per_byte for d in scores.documents] == pytest.approx([a.bits_per_byte for a in alone])
    assert scores.documents[1].bits_per_byte == 8.0
    total = sum(a.bits_per_byte * a.bytes for a in alone) / 3101
    assert scores.bits_per_byte == pytest.approx(total)
    assert sum(b.bytes for b in scores.buckets) == 3101
    assert scores.buckets[0].bytes == 1024 + 1 + 1024
    assert scores.state_sizes[-1].bytes == 2000


@given(st.integers(0, 3 << 20), st.integers(0, 5000))
@settings(max_examples=60)
def test_buckets_split_where_positions_say(position, count):
    buckets = _Buckets()
    bits = np.arange(count, dtype=np.float64)
    buckets.add(position, bits)
    for bucket in buckets.result():
        inside = [i for i in range(count) if bucket.start <= position + i < (bucket.end or 1 << 40)]
        assert bucket.bytes == len(inside)
        assert bucket.bits == pytest.approx(sum(inside))
    assert sum(bucket.bytes for bucket in buckets.result()) == count


def test_buckets_are_the_documented_ones():
    assert EDGES[:4] == (0, 1024, 2048, 4096)
    assert EDGES[-1] == 1 << 20


def test_compressors_give_what_their_libraries_give_in_one_go():
    scores = evaluate_perplexity(LM, [("boat", [TEXT[:100], TEXT[100:]])])
    assert scores.documents[0].compressed_bytes == {
        "gzip": len(gzip.compress(TEXT, 9)),
        "bz2": len(bz2.compress(TEXT, 9)),
        "xz": len(lzma.compress(TEXT, preset=9)),
    }
    assert scores.compressor_bits_per_byte("xz") == 8 * scores.documents[0].compressed_bytes["xz"] / len(TEXT)


@pytest.mark.parametrize(("name", "command"), [("gzip", "gzip -9"), ("bz2", "bzip2 -9"), ("xz", "xz -9")])
def test_compressors_are_the_commands(name, command):
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    compressor = COMPRESSORS[name]()
    ours = len(compressor.compress(TEXT)) + len(compressor.flush())
    done = subprocess.run([*command.split(), "-c"], input=TEXT, capture_output=True, check=True)
    assert ours == len(done.stdout)


@pytest.mark.parametrize("length", [0, 1, 5000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_xz_of_short_texts_is_that_of_long_ones(length):
    """Whichever way a text goes, the bytes are as many; a text of which nothing repeats nearby needs the distance."""
    half = np.random.default_rng(0).integers(97, 123, length // 2 + 1, np.uint8).tobytes()
    text = (half + half)[:length]
    compressor = COMPRESSORS["xz"]()
    ours = sum(len(compressor.compress(text[at : at + 1024])) for at in range(0, length, 1024))
    assert ours + len(compressor.flush()) == len(lzma.compress(text, preset=9))


def test_progress_counts_bytes_of_all_documents():
    told = []
    evaluate_perplexity(
        LM, [("one", [TEXT[:5000]]), ("two", [TEXT[:70]])], progress=lambda done, bits: told.append((done, bits))
    )
    counts = [done for done, _ in told]
    assert counts == sorted(counts)
    assert counts[-1] == len(TEXT[:5000]) + 70
    assert all(0 < bits < 20 for _, bits in told)


def test_json_holds_every_figure():
    value = json.loads(json.dumps(evaluate_perplexity(LM, [("a", [TEXT]), ("b", [b"bb"])]).to_json()))
    assert value["bytes"] == len(TEXT) + 2
    assert {"bits_per_byte", "gzip_bits_per_byte", "bz2_bits_per_byte", "xz_bits_per_byte"} <= value.keys()
    assert value["context"][0]["start"] == 0
    assert value["context"][0]["bytes"] == 1024
    assert value["context"][-1]["bytes"] == len(TEXT)
    assert [d["name"] for d in value["documents"]] == ["a", "b"]
    assert len({entry["state_bytes"] for entry in value["state"]}) == 1


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b""]])
def test_an_empty_text_is_an_error(pieces):
    with pytest.raises(UserError, match="nowhere"):
        evaluate_perplexity(LM, [("nowhere", pieces)])
    with pytest.raises(UserError, match="no text"):
        evaluate_perplexity(LM, [])


def test_a_text_is_never_whole_in_memory():
    alive, most = 0, 0

    class Piece(bytes):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def pieces():
        nonlocal alive, most
        for _ in range(8):
            alive += 1
            most = max(most, alive)
            yield Piece(TEXT[:500])

    evaluate_perplexity(LM, [("stream", pieces())])
    assert most <= 2
