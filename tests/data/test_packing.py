"""Packing and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.data.packing import next_byte_targets, pack, unpack
from milonga.segments import Segments


@given(st.lists(st.binary(max_size=9), max_size=6))
def test_pack_and_unpack(documents: list[bytes]):
    tokens, segments = pack(documents)
    assert tokens.shape == (1, sum(map(len, documents)))
    assert tokens.dtype == torch.int64
    assert segments.lengths.tolist() == [len(document) for document in documents]
    assert [bytes(part.tolist()) for part in unpack(tokens, segments)] == documents
    targets = next_byte_targets(tokens, segments)
    for document, part in zip(documents, unpack(targets, segments), strict=True):
        assert part.tolist() == [*document[1:], -100][: len(document)]


def test_what_can_be_packed():
    tokens, _ = pack([b"\xff", np.array([1, 2], np.uint8), torch.tensor([300])])
    assert tokens.tolist() == [[255, 1, 2, 300]]
    wide = torch.arange(8.0).reshape(1, 4, 2)
    assert [part.shape for part in unpack(wide, Segments([0, 1, 1, 4]))] == [(1, 2), (0, 2), (3, 2)]
    assert next_byte_targets(torch.tensor([[1, 2], [3, 4]])).tolist() == [[2, -100], [4, -100]]


def test_what_cannot():
    for document in (torch.ones(2), np.zeros((2, 2), np.int64), torch.tensor([True])):
        with pytest.raises(ValueError, match="document 1 must be integers"):
            pack([b"a", document])
    with pytest.raises(ValueError, match="segments must cover T"):
        unpack(torch.zeros(1, 3), Segments([0, 2]))
