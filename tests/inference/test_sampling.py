"""Choosing the next byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference import Sampler

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def draws(count=4000, logits=LOGITS, **settings):
    sampler = Sampler(**settings)
    return np.bincount([sampler.draw(logits) for _ in range(count)], minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    assert np.abs(draws() - [0.1, 0.4, 0.05, 0.25, 0.2]).max() < 0.03


def test_a_higher_temperature_is_flatter_and_a_lower_one_sharper():
    expected = np.array([0.1, 0.4, 0.05, 0.25, 0.2]) ** 0.5
    assert np.abs(draws(temperature=2.0) - expected / expected.sum()).max() < 0.03
    assert draws(temperature=0.2)[1] > 0.85


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals():
    assert Sampler(0.0).draw(LOGITS) == 1
    assert Sampler(0.0).draw(np.array([0.0, 2.0, 2.0], np.float32)) == 1


def test_a_tiny_temperature_comes_to_the_same_without_overflow():
    assert draws(count=50, temperature=1e-300)[1] == 1


def test_top_k_leaves_the_k_likeliest_in_proportion():
    assert np.abs(draws(top_k=2) - [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]).max() < 0.03
    assert draws(count=50, top_k=1)[1] == 1
    assert np.array_equal(draws(top_k=99), draws(top_k=5))


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.84, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_leaves_the_fewest_that_have_that_much(top_p, kept):
    assert set(np.flatnonzero(draws(top_p=top_p))) == kept


def test_top_p_counts_within_top_k():
    assert set(np.flatnonzero(draws(top_k=2, top_p=0.6))) == {1}


def test_what_has_no_probability_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert set(np.flatnonzero(draws(logits=logits))) == {1, 3}


@given(st.integers(0, 2**63), st.floats(0.1, 3), st.integers(1, 256) | st.none(), st.floats(0.01, 1) | st.none())
def test_the_same_seed_gives_the_same_draws(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=256).astype(np.float32)
    one, two = Sampler(temperature, top_k, top_p, seed), Sampler(temperature, top_k, top_p, seed)
    assert [one.draw(logits) for _ in range(20)] == [two.draw(logits) for _ in range(20)]


def test_seeds_differ_and_no_seed_is_fresh_each_time():
    logits = np.zeros(256, np.float32)
    texts = {tuple(s.draw(logits) for _ in range(16)) for s in (Sampler(seed=0), Sampler(seed=1))}
    texts |= {tuple(s.draw(logits) for _ in range(16)) for s in (Sampler(seed=None), Sampler(seed=None))}
    assert len(texts) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_prediction_is_an_error(bad, temperature):
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(UserError, match="weights are damaged"):
        Sampler(temperature).draw(logits)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_named(settings, word):
    with pytest.raises(UserError, match=word):
        Sampler(**settings)
