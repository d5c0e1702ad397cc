"""The exact rule decided on the device draws from the verifier's distribution, measured like that of the host."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch

from milonga.inference import device_drafting, device_verification, passes
from milonga.inference.acceptance import accept_exact
from milonga.inference.device_rows import DeviceBuffers, DeviceRows
from milonga.inference.drafters import NgramDrafter
from milonga.inference.runner import NetworkRunner
from milonga.inference.sampling import Sampler, Sampling
from milonga.inference.speculative_rows import Rounds, SpeculationStats, Texts
from milonga.state import select
from tests.inference.helpers import CONFIGS, opinionated
from tests.inference.test_speculative_exact import LETTERS, PROMPT, SETTINGS, drafter, enumerated, p_value

WRITTEN = 6
PLAIN = Sampling(temperature=SETTINGS.temperature)


@pytest.fixture
def spoken(monkeypatch):
    """Both networks know which bytes are spoken here: the device takes no banned ones, it is told by the logits."""

    def tell(drafter):
        verifiers = torch.full((256,), -1e5)
        verifiers[list(LETTERS)] = 0.0
        drafters = None if isinstance(drafter, NgramDrafter) else drafter.runner.unspoken

        def reading(offset):
            def read(network, tokens, state):
                logits, trace = passes.read_piece(network, tokens, state)
                return logits + offset, trace

            return read

        monkeypatch.setattr(device_verification, "read_piece", reading(verifiers))
        monkeypatch.setattr(device_drafting, "read_piece", reading(drafters))
        monkeypatch.setattr(device_drafting, "decode_step", lambda *values: passes.decode_step(*values) + drafters)
        return verifiers

    return tell


def drawn(lm, drafter, offset, draws, batch=1000):
    """How often each three letters came first."""
    session = lm.session()
    session.feed(PROMPT)
    mark, runner, stats = session.mark(), NetworkRunner(lm.network), SpeculationStats()
    buffers = DeviceBuffers(lm, drafter, 0.0)
    counts = np.zeros(len(LETTERS) ** 3, np.int64)
    index = {bytes(text): cell for cell, text in enumerate(product(LETTERS, repeat=3))}
    for start in range(0, draws, batch):
        rounds = Rounds(runner, runner, accept_exact, draft=lambda: 4, replay=False, stats=stats)
        texts = Texts(
            drafter.start([PROMPT] * batch),
            select(mark.state, [0] * batch),
            (mark.logits + offset).expand(batch, -1),
            [
                Sampler(dataclasses.replace(PLAIN, seed=start + row), position=len(PROMPT), left=WRITTEN)
                for row in range(batch)
            ],
            [WRITTEN] * batch,
        )
        rows = DeviceRows(buffers, rounds, texts)
        texts = [b""] * batch
        while min(map(len, texts)) < 3:
            texts = [text + more for text, more in zip(texts, rows.round(), strict=True)]
        for text in texts:
            counts[index[text[:3]]] += 1
        rows.finish()
    return counts, stats


@pytest.mark.parametrize("kind", ["subwords", "bytes", "ngram"])
def test_first_bytes_have_the_distribution_of_plain_sampling(kind, spoken):
    lm, small = opinionated(CONFIGS["samba"]), drafter(kind)
    counts, stats = drawn(lm, small, spoken(small), 6000)
    assert 0.2 < stats.acceptance < 0.98
    assert p_value(counts, enumerated(lm, SETTINGS)) > 0.01


def test_a_planted_error_is_found(spoken, monkeypatch):
    """Drafted bytes that stand a fifth too often."""
    lm, small, exact = opinionated(CONFIGS["samba"]), drafter("subwords"), device_verification.decide_

    def biased(logits, text, count, draft, vocabulary, inputs, *rest):
        exact(logits, text, count, draft, vocabulary, inputs._replace(accept=inputs.accept * 0.8), *rest)

    monkeypatch.setattr(device_verification, "decide_", biased)
    counts, _ = drawn(lm, small, spoken(small), 6000)
    assert p_value(counts, enumerated(lm, SETTINGS)) < 0.01
