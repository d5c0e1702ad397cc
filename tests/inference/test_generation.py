"""Writing: where texts stop, what is given out, what is known afterwards."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference import Sampling
from milonga.inference.generation import StopFinder
from tests.inference.helpers import opinionated, opinionated_subwords

LM = opinionated()
FEW = st.text("ab", max_size=30).map(str.encode)


def stopped(text, stops):
    """The definition: (what stands before the stop that is complete first, the longest of those; that stop)."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def begins_a_stop(ending, stops):
    return any(len(stop) > len(ending) > 0 and stop.startswith(ending) for stop in stops)


@given(FEW, st.lists(st.text("ab", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=4), st.data())
def test_stops_are_found_however_the_text_is_cut(text, stops, data):
    finder, out, given_in = StopFinder(tuple(stops)), b"", 0
    while given_in < len(text) and finder.found is None:
        count = data.draw(st.integers(1, 5))
        out += finder.feed(text[given_in : given_in + count])
        given_in = min(given_in + count, len(text))
        if finder.found is None:
            held = text[:given_in].removeprefix(out)
            assert text[:given_in] == out + held
            assert not held or begins_a_stop(held, stops), "held back without need"
            assert not any(begins_a_stop(text[:given_in][-n:], stops) for n in range(len(held) + 1, given_in + 1))
    out += finder.rest()
    assert (out, finder.found) == stopped(text, stops)


def writing(text, n, **sampling):
    """A session that writes `text`, because it is forced to."""
    s = LM.session()
    return s, s.generate(n, Sampling(forced=text, **sampling))


def test_text_before_a_stop_is_given_out_and_the_session_has_read_the_stop():
    s, generation = writing(b"one two STOP three", 100, stop=(b"STOP",))
    pieces = list(generation)
    assert "".join(pieces) == "one two "
    assert (generation.stop_reason, generation.stop) == ("stop", b"STOP")
    assert (generation.tokens, generation.bytes, s.position) == (12, 12, 12)
    t = LM.session()
    t.feed(b"one two STOP")
    assert np.allclose(s.logits, t.logits, atol=1e-4)


def test_nothing_that_could_become_a_stop_is_given_out():
    s, generation = writing(b"aSTaSTOb", 8, stop=(b"STOP",))
    given_out = [(piece, s.position) for piece in generation]
    assert given_out == [("a", 1), ("STa", 4), ("STOb", 8)]
    assert generation.stop_reason == "length"


def test_a_stop_that_is_never_met_just_ends_at_n():
    s, generation = writing(b"abcS", 4, stop=(b"STOP", b"never"))
    assert "".join(generation) == "abcS", "what was held back comes out at the end"
    assert (generation.stop_reason, generation.stop, s.position) == ("length", None, 4)


def test_a_stop_inside_a_character_leaves_a_replacement_character():
    _, generation = writing("a€b".encode(), 9, stop=("€".encode()[1:2],))
    assert "".join(generation) == "a\ufffd"


def test_stop_may_be_a_str_or_several():
    s = LM.session()
    whole = b"".join(s.fork().generate_bytes(400, seed=1))
    letter = bytes([whole[7]])
    for stop in (letter, [letter], (letter, b"never"), *([letter.decode()] if letter < b"\x80" else [])):
        assert b"".join(s.fork().generate_bytes(400, seed=1, stop=stop)) == whole[: whole.index(letter)]
    with pytest.raises(UserError, match="stop"):
        s.generate(3, stop="")


@given(st.integers(0, 2**32), st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=15)
def test_a_text_written_in_several_calls_is_that_of_one(seed, counts):
    sampling = Sampling(seed=seed, temperature=1.3, repetition_penalty=1.5, repetition_window=20, top_p=0.95)
    s = LM.session()
    s.feed(b"once")
    t = s.fork()
    text = b"".join(b"".join(s.generate_bytes(count, sampling)) for count in counts)
    assert text == b"".join(t.generate_bytes(sum(counts), sampling))


def test_a_saved_session_goes_on_with_its_sampling(tmp_path):
    s = LM.session()
    s.feed(b"once")
    whole = b"".join(s.fork().generate_bytes(60, temperature=1.2, top_k=50, seed=5))
    first = b"".join(s.generate_bytes(25, temperature=1.2, top_k=50, seed=5))
    s.save(tmp_path / "a.state")
    t = LM.session(tmp_path / "a.state")
    assert t.sampling == s.sampling == Sampling(temperature=1.2, top_k=50, seed=5)
    assert first + b"".join(t.generate_bytes(35, t.sampling)) == whole


def test_a_seed_from_the_system_is_saved_too(tmp_path):
    s = LM.session()
    generation = s.generate_bytes(20, seed=None)
    first = b"".join(generation)
    s.save(tmp_path / "a.state")
    t = LM.session(tmp_path / "a.state")
    assert t.sampling.seed == generation.seed
    rest = b"".join(t.generate_bytes(20, t.sampling))
    assert first + rest == b"".join(LM.session().generate_bytes(40, seed=generation.seed))


@pytest.mark.parametrize("cut", [0, 3, 9, 20])
def test_a_forced_text_goes_on_where_the_call_before_left_it(tmp_path, cut):
    sampling = Sampling(forced="Once € upon".encode(), seed=4, repetition_penalty=1.2)
    for lm in (LM, opinionated_subwords()):
        s = lm.session()
        s.feed(b"once")
        whole = b"".join(s.fork().generate_bytes(40, sampling))
        first = b"".join(s.generate_bytes(cut, sampling))
        assert s.sampling.forced == sampling.forced[len(first) :]
        s.save(tmp_path / "a.state")
        for t in (s.fork(), lm.session(tmp_path / "a.state")):
            assert first + b"".join(t.generate_bytes(40 - cut, t.sampling)) == whole
        assert s.fork().generate_bytes(1, sampling).__next__()[:1] == b"O", "given again, it is forced again"


def test_going_back_brings_the_forced_text_back():
    s, generation = writing(b"abcdef", 4)
    before = s.mark()
    assert "".join(generation) == "abcd"
    assert s.sampling.forced == b"ef"
    s.rewind(before)
    assert s.sampling.forced == b"abcdef"


def test_a_text_begins_where_the_session_stands_when_it_is_asked_for():
    sampling = Sampling(seed=1, temperature=1.3, repetition_penalty=1.4, valid_utf8=True)
    early = LM.session()
    waiting = early.generate(30, sampling)
    other = early.generate(5, Sampling(seed=2))
    early.feed(b"XYZ" + "é".encode()[:1])
    late = early.fork()
    assert "".join(waiting) == "".join(late.generate(30, sampling))
    assert early.position == late.position
    assert early.sampling == late.sampling
    "".join(other)
    assert early.sampling == Sampling(seed=2), "of what was written last"


def test_a_session_that_is_moved_under_a_text_is_an_error():
    elsewhere = LM.session()
    elsewhere.feed(b"abcd")

    def rewound_and_fed(s):
        position = s.position
        s.rewind(LM.session().mark())
        s.feed(b"x" * position)

    for move in (
        lambda s: s.feed(b"XYZ"),
        lambda s: s.score(b"X"),
        lambda s: next(s.generate_bytes(3)),
        lambda s: s.rewind(elsewhere.mark()),
        rewound_and_fed,
    ):
        for generate in (LM.session().generate, LM.session().generate_bytes):
            s = generate.__self__
            s.feed(b"once")
            writing = generate(400, seed=1)
            next(writing)
            move(s)
            twin, position = s.fork(), s.position
            with pytest.raises(UserError, match="moved to position"):
                next(writing)
            assert writing.stop_reason == "closed"
            assert (s.position, list(writing)) == (position, [])
            assert b"".join(s.generate_bytes(9)) == b"".join(twin.generate_bytes(9))


def test_what_does_not_move_a_session_may_be_done_under_a_text(tmp_path):
    s = LM.session()
    writing = s.generate_bytes(40, seed=1)
    text = next(writing)
    place = s.mark()
    s.fork().feed(b"XYZ")
    s.feed(b"")
    s.save(tmp_path / "a.state")
    assert s.nbytes > 0
    s.rewind(place)
    assert text + b"".join(writing) == b"".join(LM.session().generate_bytes(40, seed=1))


def test_a_text_can_end_at_a_number_of_bytes():
    lm = opinionated_subwords()
    sampling = Sampling(seed=3, forced=b" the mat the cat" * 3)
    whole = lm.session().generate_bytes(60, sampling)
    tokens = list(whole)
    assert whole.bytes > whole.tokens == 60
    for most in (0, 1, 20, 21, 22):
        t = lm.session()
        generation = t.generate_bytes(60, sampling)
        generation.most_bytes = most
        text = b"".join(generation)
        assert b"".join(tokens).startswith(text)
        assert most <= len(text) < most + max(map(len, lm.codec.token_bytes))
        assert (generation.stop_reason, generation.bytes, t.bytes_read) == ("length", len(text), len(text))
    _, generation = writing(b"abcST", 9, stop=(b"STOP",))
    generation.most_bytes = 5
    assert "".join(generation) == "abcST", "what was held back comes out"


def test_numbers_may_be_numpys(tmp_path):
    s = LM.session()
    text = b"".join(s.generate_bytes(np.int64(5), top_k=np.int64(3), seed=np.int32(3), temperature=np.float32(0.5)))
    s.save(tmp_path / "a.state")
    assert LM.session(tmp_path / "a.state").sampling == Sampling(temperature=0.5, top_k=3, seed=3)
    assert text == b"".join(LM.session().generate_bytes(5, temperature=0.5, top_k=3, seed=3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 2.5}, "number of bytes must be a whole number, got 2.5"),
        ({"n": "3"}, "number of bytes must be a whole number, got '3'"),
        ({"logprobs": 1.5}, "logprobs must be a whole number"),
        ({"temperature": "0.8"}, "temperature must be a number, got '0.8'"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop": 3}, "stop must be a text or several"),
        ({"stop": [3]}, "stop must be a tuple of bytes"),
        ({"stop": "\ud800"}, "stop: character 0"),
        ({"stop": ["a", "a\ud800"]}, "stop: character 1"),
    ],
)
def test_arguments_of_another_type_are_told_at_once(arguments, words):
    for call in (LM.session().generate, LM.session().generate_bytes):
        with pytest.raises(UserError, match=words):
            call(**({"n": 3} | arguments))


def test_sampling_survives_json():
    one = Sampling(temperature=0.3, stop=(b"\xff", b"a"), banned=b"\x00", forced=b"\xe2", seed=2**63, min_p=0.1)
    assert Sampling.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_log_probabilities_are_those_that_score_gives():
    s = LM.session()
    s.feed(b"once")
    t = s.fork()
    generation = s.generate_bytes(30, temperature=1.4, top_k=80, seed=2, logprobs=3)
    text = b"".join(generation)
    bits = t.score(text)
    assert np.abs(bits + [entry.log2 for entry in generation.logprobs]).max() < 1e-4
    assert b"".join(entry.token for entry in generation.logprobs) == text
    for entry in generation.logprobs:
        assert len(entry.alternatives) == 3
        shares = [log2 for _, log2 in entry.alternatives]
        assert shares == sorted(shares, reverse=True)
        assert entry.log2 <= shares[0] <= 0
    first = b"".join(t.fork().generate_bytes(1, temperature=0))
    greedy = t.generate_bytes(1, temperature=0, logprobs=1)
    list(greedy)
    assert greedy.logprobs[0].alternatives == ((first, greedy.logprobs[0].log2),)
    assert s.generate(3).logprobs == []


def test_a_generation_says_how_it_went():
    s = LM.session()
    generation = s.generate_bytes(30)
    assert (generation.stop_reason, generation.tokens) == (None, 0)
    assert np.isnan(generation.bytes_per_second)
    next(generation)
    assert (generation.stop_reason, generation.tokens) == (None, 1)
    assert generation.seconds > 0
    assert generation.bytes_per_second > 0
    generation.close()
    assert (generation.stop_reason, generation.tokens, s.position) == ("closed", 1, 1)
    assert list(generation) == []
    unused = s.generate(4)
    unused.close()
    assert unused.stop_reason == "closed"


def test_settings_come_in_one_way():
    s = LM.session()
    with pytest.raises(UserError, match="not both"):
        s.generate(3, Sampling(), temperature=0.5)
    with pytest.raises(UserError, match="logprobs"):
        s.generate(3, logprobs=-1)


def test_valid_utf8_is_what_a_session_writes_and_its_pending_bytes_count():
    s = LM.session()
    s.feed("€".encode()[:1])
    text = b"".join(s.generate_bytes(80, Sampling(valid_utf8=True, temperature=3.0, seed=1)))
    assert ("€".encode()[:1] + text).decode()
    assert len(text) == 80
    assert s.pending == b""


def test_sessions_of_subwords(tmp_path):
    subwords = opinionated_subwords()
    s = subwords.session()
    s.feed("the cat sat on the ")
    assert s.position < s.bytes_read == 19
    before = s.position
    assert len(s.score("mat, ü")) == s.position - before == len(subwords.codec.encode("mat, ü"))
    generation = s.generate_bytes(40, Sampling(valid_utf8=True, stop=(b"zq",), seed=3))
    text = b"".join(generation)
    assert text.decode()
    assert generation.tokens == 40 or generation.stop == b"zq"
    assert generation.bytes >= generation.tokens
    s.save(tmp_path / "a.state")
    t = subwords.session(tmp_path / "a.state")
    assert (t.position, t.bytes_read) == (s.position, s.bytes_read)
    assert b"".join(s.generate_bytes(9, s.sampling)) == b"".join(t.generate_bytes(9, t.sampling))
