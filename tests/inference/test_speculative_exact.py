"""The exact rule draws from the verifier's distribution: measured against the enumerated one, and shown to measure."""

import dataclasses
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch

from milonga.data.bpe import BpeCodec
from milonga.inference.acceptance import accept_exact
from milonga.inference.drafters import NgramDrafter
from milonga.inference.language_model import LanguageModel
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.runner import NetworkRunner
from milonga.inference.sampling import Sampler, Sampling, distribution
from milonga.inference.speculative import SpeculativeDecoder
from milonga.inference.speculative_rows import Rounds, SpeculativeRows, Texts
from milonga.state import select
from tests.inference.helpers import CONFIGS, MAMBA, opinionated

LETTERS = b"abc"
BANNED = bytes(set(range(256)) - set(LETTERS))
PROMPT = b"cab"
MERGES = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"c", b"c"), (b"ab", b"ab"), (b"c", b"a")]
WRITTEN = 4  # bytes of each text, of which the first three are looked at: then drafts are longer than what is looked at


class Spoken(NetworkRunner):
    """A drafter's network that knows which bytes are spoken here, but for a few: it would hardly ever hit else."""

    def __init__(self, network, tokens):
        super().__init__(network)
        spoken = [set(token) <= set(LETTERS) for token in tokens]
        self.unspoken = torch.where(torch.tensor(spoken), 0.0, -50.0)

    def verify(self, tokens, state):
        logits, trace = super().verify(tokens, state)
        return logits + self.unspoken, trace

    def step(self, tokens, state):
        logits, state = super().step(tokens, state)
        return logits + self.unspoken, state


class Remembering(BpeCodec):
    """Thousands of rows with few texts: each is cut into tokens once."""

    def __init__(self, merges):
        super().__init__(merges)
        self.encode = lru_cache(maxsize=1 << 16)(super().encode)


def drafter(kind):
    if kind == "ngram":
        return NgramDrafter(longest=4, shortest=1)
    codec = Remembering(MERGES if kind == "subwords" else [])
    config = MAMBA.replace(vocab_size=codec.vocab_size, repeats=1)
    model = LanguageModel(config.build(seed=5), codec)
    with torch.no_grad():
        model.network.embedding.weight.mul_(10)
    return ModelDrafter(model, Spoken(model.network, codec.token_bytes))


def enumerated(lm, sampling):
    """float64 `[27]`: the probability of every first three letters, by plain decoding's own arithmetic."""
    settings = dataclasses.replace(sampling, banned=b"")
    allowed = np.isin(np.arange(256), list(LETTERS))
    cells = np.ones(len(LETTERS) ** 3)
    for cell, text in enumerate(product(LETTERS, repeat=3)):
        session = lm.session()
        session.feed(PROMPT)
        for byte in text:
            cells[cell] *= distribution(session.logits, settings, allowed=allowed)[byte]
            session.feed(bytes([byte]))
    return cells


def drawn(lm, drafter, sampling, draws, seed, accept=accept_exact, batch=4000):
    """How often each three letters came first."""
    decoder = SpeculativeDecoder(lm, drafter, draft=4)
    session = lm.session()
    session.feed(PROMPT)
    mark, like = session.mark(), session.sampler(sampling, WRITTEN)
    counts = np.zeros(len(LETTERS) ** 3, np.int64)
    index = {bytes(text): cell for cell, text in enumerate(product(LETTERS, repeat=3))}
    for start in range(0, draws, batch):
        size = min(batch, draws - start)
        samplers = [
            Sampler(
                dataclasses.replace(sampling, seed=seed * draws + start + row),
                position=like.position,
                constraint=like._constraint,
                left=WRITTEN,
            )
            for row in range(size)
        ]
        runner = decoder._runner
        rounds = Rounds(runner, runner, accept, draft=lambda: 4, replay=False, stats=decoder.stats)
        start, state = drafter.start([PROMPT] * size), select(mark.state, [0] * size)
        rows = SpeculativeRows(rounds, Texts(start, state, mark.logits.expand(size, -1), samplers, [WRITTEN] * size))
        texts = [b""] * size
        while min(map(len, texts)) < 3:
            texts = [text + more for text, more in zip(texts, rows.round(), strict=True)]
        for text in texts:
            counts[index[text[:3]]] += 1
    return counts, decoder.stats


def p_value(counts, cells):
    """Of Pearson's chi-square; cells that expect fewer than 10 are pooled."""
    expected = cells / cells.sum() * counts.sum()
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    square = float(((counts - expected) ** 2 / expected).sum())
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(square / 2, dtype=torch.float64)))


def biased(logits, draft, count, sampler):
    """Rejection sampling with a planted error: drafted bytes stand 2 % too often."""

    class Easy:
        text = draft.text

        def probability(self, index):
            return draft.probability(index) * 0.98

        def distribution(self, index):
            return draft.distribution(index)

    return accept_exact(logits, Easy(), count, sampler)


SETTINGS = Sampling(temperature=6.0, banned=BANNED)


@pytest.mark.parametrize("kind", ["subwords", "bytes", "ngram"])
def test_first_bytes_have_the_distribution_of_plain_sampling(kind):
    lm = opinionated(CONFIGS["samba"])
    counts, stats = drawn(lm, drafter(kind), SETTINGS, 4000, seed=1)
    assert 0.2 < stats.acceptance < 0.98
    assert p_value(counts, enumerated(lm, SETTINGS)) > 0.01


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["subwords", "bytes", "ngram"])
def test_first_bytes_of_200000_draws(kind):
    """At least 9 of 10 seeds, each with 200,000 draws; a bias of 2 % is caught."""
    lm = opinionated(CONFIGS["samba"])
    cells = enumerated(lm, SETTINGS)
    passed = [p_value(drawn(lm, drafter(kind), SETTINGS, 200_000, seed)[0], cells) for seed in range(10)]
    print(kind, passed)
    assert sum(p > 0.01 for p in passed) >= 9
    planted = [p_value(drawn(lm, drafter(kind), SETTINGS, 200_000, seed, biased)[0], cells) for seed in range(3)]
    print(kind, "biased", planted)
    assert max(planted) < 0.01
