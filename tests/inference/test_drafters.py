"""The drafter that looks the text up in itself."""

import pytest

from milonga.errors import UserError
from milonga.inference.drafters import NgramDrafter, SureDraft


def drafted(text, limit=8, **settings):
    (draft,) = NgramDrafter(**settings).start([text]).draft(limit, 1.0, [])
    return draft.text


def test_what_followed_the_last_time():
    assert drafted(b"one two. one four. one t", shortest=1) == b"wo. one "
    assert drafted(b"a cat, a cow, a c", shortest=1) == b"ow, a co"  # the last of two places
    assert drafted(b"abc") == drafted(b"") == b""
    assert drafted(b"abcd1 abcd2 xbcd", shortest=4) == b""  # an ending of 3 is too short
    assert drafted(b"abcd1 abcd2 xbcd", shortest=3) == b"2 xbcd2 "


def test_longer_endings_come_first():
    text = b"the long way round. a way down. the long way"
    assert drafted(text, longest=8, shortest=2, limit=6) == b" round"
    assert drafted(text, longest=3, shortest=2, limit=5) == b" down"


def test_a_period_goes_on():
    assert drafted(b"xyxyxy", limit=7, shortest=1) == b"xyxyxyx"
    assert drafted(b"aaaa", limit=3, shortest=1) == b"aaa"


def test_only_the_window_is_remembered():
    stream = NgramDrafter(longest=8, shortest=4, window=100).start([b"needle found. " + b"." * 50, b""])
    assert stream.draft(6, 1.0, [])[1].text == b""
    stream.extend([b"needle", b"needle"])
    assert stream.draft(6, 1.0, [])[0].text == b" found"
    for _ in range(30):
        stream.extend([b"0123456789", b""])
    stream.extend([b"needle", b""])
    assert stream.draft(6, 1.0, [])[0].text == b""
    with pytest.raises(UserError, match="shortest <= longest < window, got 4, 3, 100"):
        NgramDrafter(longest=3, shortest=4, window=100)


def test_a_sure_draft_is_certain():
    draft = SureDraft(b"ab")
    assert draft.probability(1) == draft.distribution(1)[ord("b")] == 1
    assert draft.distribution(0).sum() == 1
