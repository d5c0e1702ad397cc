"""Byte-pair encoding gives back every byte, cuts where it says, and is what `tokenizers` reads."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from milonga.data import bpe
from milonga.data.bpe import LONGEST, TOKENIZER, BpeCodec, codec_from_dict, load_tokenizer
from milonga.data.bpe_training import LONGEST_TOKEN, train_bpe
from milonga.data.bundled import bundled_heldout
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.data.text import ByteCodec
from milonga.errors import UserError


def heldout_text() -> bytes:
    reading = Reading("text", lambda _: None, lambda _: None)
    return b"".join(
        b"".join(document.pieces) for document in read_documents(find_sources([bundled_heldout()]), reading)
    )


@pytest.fixture(scope="module")
def text() -> bytes:
    return heldout_text()


@pytest.fixture(scope="module")
def codec(text: bytes) -> BpeCodec:
    french = "déjà vu, ça alors\r\n\r\n  où est-ce?\tд а\u2003ж".encode()
    return train_bpe([[text], [french * 20]], 1000)


# text as it comes, text that is nearly UTF-8, and noise
WORDS = st.sampled_from(
    ["the ", " of", "\n", "\r\n", "  ", "don't", "12345", "é", "—", "\u2003", "ж", "\x00", "_", "'s"]
)
TEXTS = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(WORDS.map(str.encode), st.text(max_size=3).map(str.encode), st.binary(max_size=3))).map(
        b"".join
    ),
)


@settings(max_examples=300)
@given(data=TEXTS)
@example(data=b"")
@example(data=bytes(range(256)) * 2)
@example(data=b"\xe2\x80 \xff\xfe")
def test_every_byte_comes_back(codec: BpeCodec, data: bytes):
    ids = codec.encode(data)
    assert ids.dtype == codec.dtype == np.uint16
    assert codec.decode(ids) == data == b"".join(codec.token_bytes[i] for i in ids)
    assert codec.decode(torch.from_numpy(ids.astype(np.int64))) == data
    assert int(codec.token_lengths[ids].sum()) == len(data)
    assert codec.encode(list(data)).tolist() == ids.tolist()


def test_a_real_text_shrinks_and_comes_back(codec: BpeCodec, text: bytes):
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    assert 2.5 < len(text) / len(ids) < 5
    broken = text[:1000] + bytes(random.Random(0).randbytes(100_000)) + text[1001:2000]
    assert codec.decode(codec.encode(broken)) == broken


def test_ids_of_bytes_are_the_bytes_and_each_further_id_joins_two(codec: BpeCodec):
    assert codec.vocab_size == len(codec.token_bytes) == 1000
    assert list(codec.token_bytes[:256]) == [bytes([byte]) for byte in range(256)]
    assert len(set(codec.token_bytes)) == 1000
    assert 1 < max(map(len, codec.token_bytes)) <= LONGEST_TOKEN
    wide = train_bpe([[b"-" * 1000 + b" "] * 3], 260)
    assert max(map(len, wide.token_bytes)) == 16


@settings(max_examples=200)
@given(data=st.text(max_size=60))
@example(data="don't  stop\n\n    now\x1f\x7f 12345 déjà\u2003vu — 'llama")
def test_the_file_gives_the_same_tokens_in_the_package_alone(codec: BpeCodec, data: str):
    plain = Tokenizer.from_str(codec.to_json())
    ids = codec.encode(data).tolist()
    assert plain.encode(data).ids == ids
    assert plain.decode(ids) == data


@settings(max_examples=200)
@given(data=TEXTS, at_most=st.integers(1, 50), seed=st.integers(0, 1000))
def test_parts_encode_as_the_whole(codec: BpeCodec, data: bytes, at_most: int, seed: int):
    rng, pieces, start = random.Random(seed), [], 0
    while start < len(data):
        end = start + rng.randrange(0, 20)
        pieces.append(data[start:end])
        start = end
    parts = list(codec.cut(pieces, at_most))
    assert parts == list(codec.cut([data], at_most))
    assert b"".join(parts) == data
    assert b"" not in parts
    assert [i for part in parts for i in codec.encode(part)] == codec.encode(data).tolist()
    stretches = list(codec.cut([data], 1))
    assert all(len(part) <= at_most or part in stretches for part in parts)


def test_a_text_without_white_space_is_cut_all_the_same(codec: BpeCodec):
    data = b"ab" * LONGEST + b"  " + b"x" * (LONGEST + 1) + b"\n" * 3
    ids = codec.encode(data).tolist()
    assert codec.decode(ids) == data
    for size, at_most in ((1000, 5000), (3, 1 << 20), (1 << 20, 10)):
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        if size == 3:
            pieces = [data[:LONGEST], *pieces[LONGEST // 3 : LONGEST // 3 + 3], data[LONGEST // 3 * 3 + 9 :]]
            pieces[0] = data[: LONGEST // 3 * 3]
        parts = list(codec.cut(pieces, at_most))
        assert b"".join(parts) == data
        assert max(map(len, parts)) <= max(at_most, LONGEST)
        assert [i for part in parts for i in codec.encode(part).tolist()] == ids


def test_it_comes_back_from_a_file_and_from_json(codec: BpeCodec, tmp_path):
    path = tmp_path / TOKENIZER
    codec.save(path)
    again = load_tokenizer(path)
    assert again == codec
    assert (again.digest, hash(again)) == (codec.digest, hash(codec))
    stored = json.loads(json.dumps(codec.to_dict()))
    assert codec_from_dict(stored) == codec
    assert codec_from_dict(ByteCodec().to_dict()) == ByteCodec()
    Tokenizer.from_file(str(path)).save(str(tmp_path / "anew.json"))
    assert load_tokenizer(tmp_path / "anew.json") == codec


def test_another_codec_has_another_digest(codec: BpeCodec):
    stored = codec.to_dict()
    stored["merges"][-2:] = stored["merges"][:-3:-1]
    with pytest.raises(UserError, match="damaged or newer"):
        codec_from_dict(stored)
    other = BpeCodec([(b"a", b"b")])
    assert other != codec
    assert len({codec.digest, other.digest, ByteCodec.digest}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "no plain byte-pair encoding"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "no plain byte-pair encoding"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), "cuts text into words"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "cuts text into words"),
        (lambda c: c["model"].update(dropout=0.1), "it has dropout"),
        (lambda c: c["model"]["vocab"].update({"a": 98, "b": 97}), "numbers its tokens otherwise"),
        (lambda c: c["model"]["merges"].insert(0, ["zq", "zq"]), "no token yet"),
        (lambda c: c["model"].pop("merges"), r"damaged or no tokenizer.json \(at 'merges'\)"),
    ],
)
def test_a_file_of_another_make_is_refused(codec: BpeCodec, tmp_path, change, message: str):
    content = json.loads(codec.to_json())
    change(content)
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "other.json")


def test_a_missing_or_cut_file_is_a_clear_error(codec: BpeCodec, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.json: No such file"):
        load_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "cut.json").write_text(codec.to_json()[:500])
    with pytest.raises(UserError, match=r"cut.json is damaged or no tokenizer.json"):
        load_tokenizer(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"list.json is damaged or no tokenizer.json"):
        load_tokenizer(tmp_path / "list.json")


@pytest.mark.parametrize("ids", [[1000], [-1], [1.0], [[1]]])
def test_wrong_ids_are_a_clear_error(codec: BpeCodec, ids: list):
    with pytest.raises(UserError, match="tokens: ids must be"):
        codec.decode(ids)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"byte-pair encoding needs tokenizers: pip install 'milonga\[subword\]'"):
        BpeCodec([])


def test_an_unknown_kind_is_a_clear_error():
    with pytest.raises(UserError, match="'unigram' is not known here, only bytes, bpe are"):
        codec_from_dict({"name": "unigram"})
    with pytest.raises(UserError, match="'bytes' is not 'bpe'"):
        BpeCodec.from_dict(ByteCodec().to_dict())
    with pytest.raises(UserError, match="are damaged"):
        BpeCodec.from_dict({"name": "bpe", "merges": [[0, 999]]})


def test_the_alphabet_is_that_of_the_package():
    assert sorted(bpe.ALPHABET) == sorted(bpe.tokenizers_package().pre_tokenizers.ByteLevel.alphabet())
    assert bpe.mapped(bytes(range(256))) == bpe.ALPHABET
