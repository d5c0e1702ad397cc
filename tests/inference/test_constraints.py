"""What may be written next: banned and forced bytes, valid UTF-8."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference.constraints import DEAD, UTF8, WHOLE, Constraint
from milonga.inference.sampling import Sampler, Sampling
from tests.inference.helpers import opinionated

BYTES = tuple(bytes([byte]) for byte in range(256))
WORDS = (*BYTES, b"the", "ü".encode(), "€".encode()[1:], "𝄞x".encode(), b"\x80\x80", b"th\xe2")


def walk(data, state=WHOLE):
    for byte in data:
        state = UTF8[state, byte]
    return state


def decodes(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(st.binary(max_size=12) | st.text(max_size=6).map(lambda text: text.encode(errors="surrogatepass")))
def test_the_automaton_ends_whole_exactly_where_python_decodes(data):
    assert (walk(data) == WHOLE) == decodes(data)


def test_the_automaton_knows_every_character_and_no_surrogate():
    """All code points, and all pairs of bytes."""
    for point in [*range(0, 0x110000, 7), 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]:
        data = chr(point).encode(errors="surrogatepass")
        assert (walk(data) == WHOLE) == (not 0xD800 <= point < 0xE000), hex(point)
    for first in range(256):
        for second in range(256):
            assert (walk(bytes([first, second])) == WHOLE) == decodes(bytes([first, second]))


@given(
    st.integers(0, 2**32),
    st.integers(0, 25),
    st.sampled_from([BYTES, WORDS]),
    st.sampled_from(["", "€", "ab", "x𝄞"]).map(str.encode),
    st.sets(st.integers(0, 255), max_size=60).map(bytes),
    st.sampled_from([b"", b"\xe2", b"\xf0\x9d", b"\xed"]),
)
def test_constrained_draws_are_utf8_with_what_is_forced_and_without_what_is_banned(
    seed, count, tokens, forced, banned, pending
):
    banned = bytes(set(banned) - set(forced))
    if pending and forced:
        forced = b""
    settings = Sampling(valid_utf8=True, forced=forced, banned=banned, seed=seed)
    try:
        constraint = Constraint(tokens, banned=banned, forced=forced, valid_utf8=True)
    except UserError:
        assert set(range(128)) <= set(banned)
        return
    sampler = Sampler(settings, constraint=constraint, pending=pending, left=count)
    logits = np.random.default_rng(seed).normal(0, 3, len(tokens)).astype(np.float32)
    text = b"".join(tokens[sampler.draw(logits)] for _ in range(count))
    assert forced.startswith(text[: len(forced)])
    assert not set(text) & set(banned)
    whole = pending + text
    assert decodes(whole) or count < 3 + len(forced) or set(range(0x80, 0xC0)) & set(banned)
    if walk(whole) != WHOLE:  # too short, or the character that was begun can no longer be finished
        rest = text.lstrip(bytes(range(0x80, 0xC0)))
        assert decodes(rest) or walk(rest) != DEAD


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_the_text_ends_on_a_whole_character(seed, count):
    """Logits in love with long characters: only the limit makes them end."""
    logits = np.full(256, -10.0, np.float32)
    logits[0xC2:] = 10
    sampler = Sampler(Sampling(valid_utf8=True, seed=seed), constraint=Constraint(BYTES, valid_utf8=True), left=count)
    text = bytes(sampler.draw(logits) for _ in range(count))
    assert decodes(text)
    assert len(text) == count


def test_a_character_begun_before_is_finished_if_the_length_allows():
    constraint = Constraint(BYTES, valid_utf8=True)
    place = constraint.start("𝄞".encode()[:1])
    for left in (3, 9, None):
        assert set(np.flatnonzero(constraint.allowed(place, left))) == set(range(0x90, 0xC0))
    assert set(np.flatnonzero(constraint.allowed(place, 1))) == set(range(0x90, 0xC0)), "as far as it goes"
    behind = constraint.after(place, 0x9D)
    assert set(np.flatnonzero(constraint.allowed(behind, 2))) == set(range(0x80, 0xC0))


def test_a_character_that_could_not_be_finished_is_not_begun():
    constraint = Constraint(BYTES, banned=bytes(range(0x80, 0xC0)), valid_utf8=True)
    assert set(np.flatnonzero(constraint.allowed(constraint.start()))) == set(range(0x80))


def test_tokens_of_several_bytes_agree_with_what_is_forced():
    constraint = Constraint((b"t", b"th", b"the", b"them", b"x", b"e"), forced=b"the")
    place = constraint.start()
    assert np.flatnonzero(constraint.allowed(place)).tolist() == [0, 1, 2, 3]
    place = constraint.after(place, 1)
    assert np.flatnonzero(constraint.allowed(place)).tolist() == [5]
    assert constraint.allowed(constraint.after(place, 5)) is None


def test_a_token_with_a_banned_byte_inside_is_not_allowed():
    constraint = Constraint((b"t", b"th", b"he"), banned=b"h")
    assert constraint.allowed(constraint.start()).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Sampling(banned=bytes(range(256))), "nothing is left"),
        (Sampling(banned=bytes(range(128)) + bytes(range(0xC0, 256)), valid_utf8=True), "no UTF-8 text"),
        (Sampling(forced=b"ab\xff", valid_utf8=True), "forced text"),
        (Sampling(forced=b"\xed\xa0\x80", valid_utf8=True), "forced text"),
    ],
)
def test_settings_that_leave_nothing_to_write_are_errors(settings, words):
    with pytest.raises(UserError, match=words):
        opinionated().session().generate(3, settings)


def test_forced_text_that_is_no_character_behind_a_pending_byte_is_an_error():
    s = opinionated().session()
    s.feed("€".encode()[:1])
    with pytest.raises(UserError, match="forced text"):
        s.generate(3, Sampling(forced=b"a", valid_utf8=True))
    assert "".join(s.generate(5, Sampling(forced="€".encode()[1:] + b"a", valid_utf8=True))).startswith("€a")
