"""Marks kept automatically, and what a mark knows of its text."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference import session as session_module
from milonga.inference import text_digest
from milonga.inference.marks import KeptMarks, Mark
from tests.inference.helpers import opinionated
from tests.inference.test_session import TEXT, same_place

LM = opinionated()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(session_module, "PIECE", 16)


def place(position):
    here = LM.session().mark()
    return Mark(here.network, here.state, here.logits, position, b"", position)


@given(st.integers(2, 40), st.integers(1, 50), st.integers(100, 30000))
def test_kept_marks_are_few_and_spread_over_the_whole_text(limit, spacing, length):
    kept = KeptMarks(place(0), limit, spacing)
    template = place(0)
    step = max(1, spacing // 2)
    for position in range(step, length + 1, step):
        kept.offer(Mark(template.network, template.state, template.logits, position, b"", position))
    positions = kept.positions
    assert len(positions) <= limit
    assert positions == sorted(set(positions))
    assert positions[0] == 0 or limit == 2
    assert all(b - a >= spacing for a, b in pairwise(positions))
    assert length - positions[-1] < spacing + step
    if limit >= 24 and len(positions) == limit:
        away = [positions[-1] + spacing - position for position in positions]
        assert max(a / b for a, b in pairwise(away)) < 4, "no gap that loses most of the text"


def test_rewinding_to_a_position(small_pieces):
    s = LM.session()
    s.keep_marks(limit=6)
    s.feed(TEXT[:500])
    places = s._kept.positions
    assert len(places) == 6 and places[0] == 0
    reached = s.rewind_to(300)
    assert reached == s.position == max(position for position in places if position <= 300)
    t = LM.session()
    t.feed(TEXT[:reached])
    assert same_place(s, t)
    s.feed(TEXT[reached:500])
    t.feed(TEXT[reached:500])
    assert same_place(s, t)
    assert s.rewind_to(500) == 500, "where it is"
    assert s.rewind_to(0) == 0
    assert same_place(s, LM.session())


def test_where_a_session_cannot_be_rewound_to(small_pieces):
    s = LM.session()
    with pytest.raises(UserError, match="no marks are kept"):
        s.rewind_to(0)
    s.feed(TEXT[:40])
    s.keep_marks(4)
    s.feed(TEXT[40:200])
    before = s.fork()
    with pytest.raises(UserError, match="position 39 lies before the oldest mark kept, at 40"):
        s.rewind_to(39)
    with pytest.raises(UserError, match="not been reached"):
        s.rewind_to(201)
    with pytest.raises(UserError, match="at least 1"):
        s.keep_marks(0)
    assert same_place(s, before)
    assert s.rewind_to(40) == 40


def test_marks_of_another_way_are_forgotten(small_pieces):
    s = LM.session()
    s.keep_marks()
    s.feed(TEXT[:100])
    other = LM.session()
    other.feed(TEXT[200:330])
    s.rewind(other.mark())
    with pytest.raises(UserError, match="oldest"):
        s.rewind_to(64)
    s.feed(TEXT[:64])
    assert s.rewind_to(170) == 160


def test_rewinding_to_a_kept_mark_forgets_later_ones_only(small_pieces):
    s = LM.session()
    s.keep_marks()
    s.feed(TEXT[:32])
    mark = s.mark()
    s.feed(TEXT[32:80])
    s.rewind(mark)
    assert s._kept.positions == [0, 16, 32]


def test_kept_marks_are_counted_in_nbytes(small_pieces):
    s = LM.session()
    alone = s.nbytes
    s.keep_marks(4)
    assert s.nbytes == alone
    s.feed(TEXT[:400])
    assert s.nbytes == 4 * alone
    s.feed(TEXT[:5])
    assert s.nbytes == 5 * alone
    assert s.fork().nbytes == alone


@given(st.lists(st.integers(0, 600), max_size=8), st.integers(0, 2**32))
def test_the_hash_of_a_text_does_not_depend_on_its_pieces(lengths, seed):
    ids = np.random.default_rng(seed).integers(0, 256, sum(lengths)).astype(np.uint8)
    here, at = place(0), 0
    for length in lengths:
        if length:
            here = here.advanced(ids[at : at + length], here.state, here.logits, LM.codec)
        at += length
    assert here.position == here.bytes_read == at
    assert np.array_equal(here.recent, ids[-1024:])
    assert here.digest == text_digest.digests(ids, [at])[0]


def test_texts_have_the_same_hash_only_if_they_are_the_same():
    ids = np.frombuffer(TEXT, np.uint8)
    positions = list(range(len(ids) + 1))
    hashes = text_digest.digests(ids, positions)
    assert len(set(hashes)) == len(positions)
    changed = ids.copy()
    changed[300] ^= 1
    others = text_digest.digests(changed, positions)
    assert [a == b for a, b in zip(hashes, others, strict=True)] == [p <= 300 for p in positions]
