"""Codecs: every byte survives, wrong numbers are refused, and a stream decodes as the whole does."""

import codecs
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from milonga.data.text import ByteCodec, Utf8Stream
from milonga.errors import UserError

# bytes that are nearly UTF-8: whole characters, cut ones, and noise
PARTS = st.one_of(
    st.binary(max_size=6),
    st.text(max_size=4).map(str.encode),
    st.sampled_from(
        [b"\xf0\x9f\x92", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\x80", b"\xff"]
    ),
)
NEARLY_UTF8 = st.lists(PARTS, max_size=8).map(b"".join)


@given(st.binary(max_size=300))
def test_bytes_are_their_own_ids(data: bytes):
    codec = ByteCodec()
    tokens = codec.encode(data)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == list(data)
    assert codec.decode(tokens) == data
    assert codec.decode(torch.tensor(list(data), dtype=torch.int64)) == data


def test_what_can_be_encoded():
    codec = ByteCodec()
    assert codec.vocab_size == 256
    for text in ("né", b"n\xc3\xa9", bytearray(b"n\xc3\xa9"), memoryview(b"n\xc3\xa9"), [110, 195, 169]):
        assert codec.encode(text).tolist() == [110, 195, 169]
    assert codec.encode(np.array([0, 255], np.int16)).tolist() == [0, 255]
    assert codec.encode("").shape == codec.encode([]).shape == codec.encode(torch.empty(0)).shape == (0,)
    tokens = codec.encode(b"writable")
    tokens[0] = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([1, 256], "got 256 at position 1"),
        (np.array([3, 4, -1]), "got -1 at position 2"),
        (np.array([1.0]), "type float64"),
        (torch.tensor([True]), "type bool"),
        (np.zeros((2, 2), np.uint8), re.escape("shape [2, 2]")),
        ("ab\ud800", r"character 2 \(U\+D800\)"),
    ],
)
def test_what_cannot_is_a_clear_error(text: object, message: str):
    with pytest.raises(UserError, match=message):
        ByteCodec().encode(text)


def test_a_codec_comes_back_from_what_a_run_stores():
    assert ByteCodec.from_dict(ByteCodec().to_dict()) == ByteCodec()
    with pytest.raises(UserError, match="'bpe' is not known"):
        ByteCodec.from_dict({"name": "bpe"})


@settings(max_examples=300)
@given(NEARLY_UTF8, st.data())
@example(b"\xf0\x9f\x92\xa9", None)
@example(b"\xe0\x80\x80", None)
def test_pieces_join_to_the_whole(data: bytes, draw: st.DataObject | None):
    cuts = range(len(data) + 1) if draw is None else sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    stream, pieces, start = Utf8Stream(), [], 0
    for cut in [*cuts, len(data)]:
        pieces.append(stream.feed(data[start:cut]))
        start = cut
        assert len(stream.pending) <= 3
        assert data[:start].endswith(stream.pending)
        stream = Utf8Stream(stream.pending)  # as a saved session does
    pieces.append(stream.flush())
    assert "".join(pieces) == data.decode("utf-8", errors="replace")
    assert stream.pending == b""


@given(st.text(max_size=60))
def test_no_piece_splits_a_character(text: str):
    stream = Utf8Stream()
    pieces = [stream.feed(bytes([byte])) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert codecs.BOM_UTF8.decode() == "\ufeff" == Utf8Stream().feed(codecs.BOM_UTF8)


@pytest.mark.parametrize("pending", [b"a", b"\xff", b"\xc3\xa9", b"\xe2\x82\xac\xe2"])
def test_pending_is_only_the_beginning_of_a_character(pending: bytes):
    with pytest.raises(ValueError, match="beginning of one UTF-8 character"):
        Utf8Stream(pending)


@pytest.mark.parametrize("wrong", [3, 2.5, None])
def test_what_is_no_text_is_named(wrong):
    with pytest.raises(UserError, match=rf"text: bytes must be str, bytes or .* got {type(wrong).__name__}"):
        ByteCodec().encode(wrong)
