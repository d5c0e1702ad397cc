"""Choosing the next token."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference import Sampler, Sampling, distribution
from milonga.inference.sampling import LONGEST_WINDOW, Uniforms, log2_probabilities, pick

SHARES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(SHARES).astype(np.float32)


SETTINGS = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(0.1, 3),
    top_k=st.integers(1, 300) | st.none(),
    top_p=st.floats(0.01, 1) | st.none(),
    min_p=st.floats(0, 1) | st.none(),
    repetition_penalty=st.floats(0.5, 2),
    repetition_window=st.integers(1, LONGEST_WINDOW),
    seed=st.integers(0, 2**63),
)


def draws(count=4000, logits=LOGITS, **settings):
    sampler = Sampler(Sampling(**settings))
    return np.bincount([sampler.draw(logits) for _ in range(count)], minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    assert np.abs(draws() - SHARES).max() < 0.03
    assert np.abs(distribution(LOGITS, Sampling()) - SHARES).max() < 1e-7


def test_a_higher_temperature_is_flatter_and_a_lower_one_sharper():
    expected = SHARES**0.5
    assert np.abs(distribution(LOGITS, Sampling(temperature=2.0)) - expected / expected.sum()).max() < 1e-7
    assert draws(temperature=0.2)[1] > 0.85


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals():
    assert Sampler(Sampling(temperature=0)).draw(LOGITS) == 1
    assert Sampler(Sampling(temperature=0)).draw(np.array([0.0, 2.0, 2.0], np.float32)) == 1


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_a_tiny_temperature_comes_to_the_same_without_overflow(temperature):
    assert draws(count=50, temperature=temperature)[1] == 1


def test_top_k_leaves_the_k_likeliest_in_proportion():
    assert np.abs(distribution(LOGITS, Sampling(top_k=2)) - [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]).max() < 1e-7
    assert draws(count=50, top_k=1)[1] == 1
    assert np.array_equal(draws(top_k=99), draws(top_k=5))


def test_of_equals_top_k_keeps_the_lowest_ids():
    logits = np.array([1.0, 0.0, 2.0, 1.0, 1.0], np.float32)
    assert np.flatnonzero(distribution(logits, Sampling(top_k=3))).tolist() == [0, 2, 3]


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.84, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_leaves_the_fewest_that_have_that_much(top_p, kept):
    assert set(np.flatnonzero(distribution(LOGITS, Sampling(top_p=top_p)))) == kept


def test_top_p_counts_within_top_k():
    assert set(np.flatnonzero(distribution(LOGITS, Sampling(top_k=2, top_p=0.6)))) == {1}


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, {0, 1, 2, 3, 4}), (0.24, {0, 1, 3, 4}), (0.51, {1, 3}), (1.0, {1})])
def test_min_p_leaves_those_near_the_likeliest(min_p, kept):
    assert set(np.flatnonzero(distribution(LOGITS, Sampling(min_p=min_p)))) == kept


def test_repetition_penalty_moves_logits_of_either_sign_down():
    logits = np.array([2.0, -2.0, 0.5], np.float32)
    expected = np.exp([1.0, -4.0, 0.5])
    got = distribution(logits, Sampling(repetition_penalty=2.0), [0, 1, 1, 1])
    assert np.abs(got - expected / expected.sum()).max() < 1e-12
    untouched = distribution(logits, Sampling())
    assert np.array_equal(distribution(logits, Sampling(repetition_penalty=1.0), [0, 1]), untouched)


def test_the_penalty_looks_no_further_back_than_its_window():
    one = Sampling(repetition_penalty=3.0, repetition_window=2)
    assert np.array_equal(distribution(LOGITS, one, [0, 1, 2]), distribution(LOGITS, one, [3, 1, 2]))
    assert not np.array_equal(distribution(LOGITS, one, [0, 1, 2]), distribution(LOGITS, one, [0, 3, 2]))
    sampler = Sampler(one, context=[0, 1])
    for token in (2, 2):
        sampler.accept(token)
    assert np.array_equal(sampler.probabilities(LOGITS), distribution(LOGITS, one, [2]))


def test_what_is_not_allowed_has_no_probability_and_the_rest_shares_it():
    allowed = np.array([True, False, True, False, True])
    got = distribution(LOGITS, Sampling(top_k=2), allowed=allowed)
    assert np.abs(got - [0.1 / 0.3, 0, 0, 0, 0.2 / 0.3]).max() < 1e-7
    assert distribution(LOGITS, Sampling(temperature=0), allowed=allowed).argmax() == 4


@given(SETTINGS, st.integers(0, 2**32), st.integers(2, 600))
def test_a_distribution_is_one_and_pure(sampling, seed, vocab):
    random = np.random.default_rng(seed)
    logits = (5 * random.normal(size=vocab)).astype(np.float32)
    context, before = random.integers(0, vocab, 50), logits.copy()
    got = distribution(logits, sampling, context)
    assert got.dtype == np.float64
    assert got.shape == (vocab,)
    assert got.min() >= 0
    assert abs(got.sum() - 1) < 1e-12
    assert np.array_equal(got, distribution(logits, sampling, context))
    assert np.array_equal(logits, before)
    if sampling.top_k is not None:
        assert np.count_nonzero(got) <= sampling.top_k


def test_what_has_no_probability_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert set(np.flatnonzero(draws(logits=logits))) == {1, 3}
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert pick(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), uniform) in {1, 3}


@given(SETTINGS)
def test_the_same_seed_gives_the_same_draws(sampling):
    logits = np.random.default_rng(sampling.seed).normal(size=256).astype(np.float32)
    one, two = Sampler(sampling), Sampler(sampling)
    assert [one.draw(logits) for _ in range(20)] == [two.draw(logits) for _ in range(20)]


@given(st.integers(0, 2**63), st.integers(0, 2000), st.integers(0, 600), st.booleans())
def test_a_sampler_that_starts_later_draws_what_the_first_draws_there(seed, start, count, penalised):
    settings = Sampling(seed=seed, repetition_penalty=1.3 if penalised else 1.0, repetition_window=7)
    count = count % 300
    logits = np.random.default_rng(seed).normal(size=256).astype(np.float32)
    whole = Sampler(settings, position=start)
    first = [whole.draw(logits) for _ in range(count)]
    later = Sampler(settings, position=start + count, context=first)
    twin = whole.fork()
    rest = [whole.draw(logits) for _ in range(20)]
    assert [later.draw(logits) for _ in range(20)] == rest
    assert [twin.draw(logits) for _ in range(20)] == rest


def test_seeds_differ_and_no_seed_is_fresh_each_time():
    logits = np.zeros(256, np.float32)
    samplers = [Sampler(Sampling(seed=seed)) for seed in (0, 1, None, None)]
    assert len({tuple(s.draw(logits) for _ in range(16)) for s in samplers}) == 4
    fresh = samplers[2]
    again = Sampler(fresh.sampling)
    assert [again.draw(logits) for _ in range(16)] == [
        Sampler(again.sampling, position=p).draw(logits) for p in range(16)
    ]


def test_uniform_numbers_are_uniform_and_lanes_and_neighbours_unrelated():
    made = Uniforms(3)
    lanes = np.array([[made(position, lane) for position in range(20000)] for lane in range(2)])
    assert lanes.min() >= 0 and lanes.max() < 1
    assert len(np.unique(lanes)) == lanes.size
    expected = lanes.shape[1] / 50
    for lane in lanes:
        counts = np.histogram(lane, 50, (0, 1))[0]
        assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square of 49 degrees: p below 0.0004
    for one, two in ((lanes[0], lanes[1]), (lanes[0, 1:], lanes[0, :-1]), (lanes[0, 256:], lanes[0, :-256])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert made(1 << 40) != made((1 << 40) + 1)
    assert [made(5), made(300), made(5)] == [Uniforms(3)(5), Uniforms(3)(300), Uniforms(3)(5)]


def test_the_numbers_of_a_seed_stay_what_they_are():
    """Texts of a seed are promised to stay the same."""
    assert [round(Uniforms(0)(position), 6) for position in (0, 1, 256)] == [0.014067, 0.257767, 0.691716]


def test_log2_probabilities_are_the_models_own():
    assert np.abs(log2_probabilities(LOGITS) - np.log2(SHARES)).max() < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_prediction_is_an_error(bad, temperature):
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(UserError, match="weights are damaged"):
        Sampler(Sampling(temperature=temperature)).draw(logits)


def test_nothing_allowed_that_has_probability_is_an_error():
    logits = np.array([0.0, -np.inf], np.float32)
    with pytest.raises(UserError, match="allowed here"):
        distribution(logits, Sampling(), allowed=np.array([False, True]))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"repetition_window": 0}, "repetition_window"),
        ({"repetition_window": LONGEST_WINDOW + 1}, "repetition_window"),
        ({"stop": (b"",)}, "stop"),
        ({"stop": (b"a", b"")}, "stop"),
        ({"forced": b"abc", "banned": b"xb"}, "forced.*banned"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": np.array([1, 2])}, "top_k must be a whole number"),
        ({"repetition_window": 2.5}, "repetition_window must be a whole number"),
        ({"temperature": "0.8"}, "temperature must be a number, got '0.8'"),
        ({"temperature": None}, "temperature must be a number"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_p": "0.8"}, "top_p must be a number"),
        ({"min_p": 1j}, "min_p must be a number"),
        ({"repetition_penalty": "1"}, "repetition_penalty must be a number"),
        ({"banned": "abc"}, "banned must be bytes, such as b'abc', got 'abc'"),
        ({"forced": "abc"}, "forced must be bytes, such as b'abc', got 'abc'"),
        ({"stop": ("abc",)}, "stop must be a tuple of bytes"),
        ({"valid_utf8": "no"}, "valid_utf8 must be True or False"),
    ],
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        Sampling(**settings)


def test_numbers_are_kept_as_pythons():
    given = Sampling(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        top_p=np.float64(0.5),
        min_p=np.int8(0),
        repetition_penalty=2,
        repetition_window=np.uint16(9),
        valid_utf8=np.True_,
        seed=np.uint64(2**63),
    )
    plain = Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.0,
        repetition_penalty=2.0,
        repetition_window=9,
        valid_utf8=True,
        seed=2**63,
    )
    assert given == plain
    assert json.dumps(given.to_json()) == json.dumps(plain.to_json())


def test_settings_behind_some_bytes_force_only_what_is_left():
    whole = Sampling(forced=b"abc", seed=3, banned=b"x")
    assert [whole.behind(written).forced for written in (-1, 0, 1, 3, 9)] == [b"abc", b"abc", b"bc", b"", b""]
    assert whole.behind(2) == Sampling(forced=b"c", seed=3, banned=b"x")


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 2.0
