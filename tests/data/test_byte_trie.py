"""A vocabulary sorted by bytes, against looking at every token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from milonga.data.byte_trie import ByteSortedVocabulary

# few different bytes, so that prefixes are shared; 0xff, behind which no byte comes
TOKEN = st.lists(st.sampled_from([0, 97, 98, 254, 255]), min_size=1, max_size=5).map(bytes)
TOKENS = st.lists(TOKEN, min_size=1, max_size=40)
PREFIX = st.lists(st.sampled_from([0, 97, 98, 254, 255]), max_size=7).map(bytes)


@given(TOKENS, PREFIX)
def test_a_range_holds_the_tokens_that_begin_with_a_prefix(tokens: list[bytes], prefix: bytes):
    vocabulary = ByteSortedVocabulary(tokens)
    assert sorted(vocabulary.order.tolist()) == list(range(len(tokens)))
    lo, hi = vocabulary.range(prefix)
    assert 0 <= lo <= hi <= len(tokens) == len(vocabulary)
    inside = set(vocabulary.order[lo:hi].tolist())
    assert inside == {i for i, token in enumerate(tokens) if token.startswith(prefix)}


@given(TOKENS, PREFIX, st.integers(0, 2**32 - 1))
def test_masses_of_the_next_byte(tokens: list[bytes], prefix: bytes, seed: int):
    vocabulary = ByteSortedVocabulary(tokens)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(len(tokens)))
    cumulative = vocabulary.cumulative(probabilities)
    lo, hi = vocabulary.range(prefix)
    end, masses = vocabulary.next_byte_masses(cumulative, lo, hi, len(prefix))
    expected_end = sum(p for token, p in zip(tokens, probabilities, strict=True) if token == prefix)
    expected = np.zeros(256)
    for token, probability in zip(tokens, probabilities, strict=True):
        if token.startswith(prefix) and len(token) > len(prefix):
            expected[token[len(prefix)]] += probability
    assert masses.shape == (256,)
    assert abs(end - expected_end) < 1e-12
    np.testing.assert_allclose(masses, expected, rtol=0, atol=1e-12)


@given(TOKENS, PREFIX)
def test_a_child_is_the_range_of_a_longer_prefix(tokens: list[bytes], prefix: bytes):
    vocabulary = ByteSortedVocabulary(tokens)
    lo, hi = vocabulary.range(prefix)
    for byte in (0, 1, 97, 254, 255):
        child, wanted = vocabulary.child(lo, hi, len(prefix), byte), vocabulary.range(prefix + bytes([byte]))
        assert child == wanted or (child[0] == child[1] and wanted[0] == wanted[1])


def test_walking_down_a_token_takes_its_probability_apart():
    tokens = [bytes([byte]) for byte in range(256)] + [b"the", b"th", b"then", b"to"]
    vocabulary = ByteSortedVocabulary(tokens)
    probabilities = np.full(260, 1 / 260)
    cumulative = vocabulary.cumulative(probabilities)
    lo, hi, likelihood, walked = 0, 260, 1.0, b""
    for byte in b"the":
        end, masses = vocabulary.next_byte_masses(cumulative, lo, hi, len(walked))
        likelihood *= masses[byte] / (end + masses.sum())
        lo, hi = vocabulary.child(lo, hi, len(walked), byte)
        walked += bytes([byte])
    end, masses = vocabulary.next_byte_masses(cumulative, lo, hi, 3)
    likelihood *= end / (end + masses.sum())
    assert abs(likelihood - 1 / 260) < 1e-15
    assert [tokens[i] for i in vocabulary.order[lo:hi]] == [b"the", b"then"]
