"""What `SpeculativeDecoder.rows` is given has to fit together: what does not is said before anything is written."""

from functools import cache

import numpy as np
import pytest
import torch

from milonga.errors import UserError
from milonga.inference.captured import CapturedRunner
from milonga.inference.drafters import NgramDrafter
from milonga.inference.sampling import Sampling
from milonga.inference.speculative import SpeculativeDecoder
from milonga.state import merge, select
from tests.inference.helpers import CONFIGS, SAMBA, opinionated


@cache
def verifier():
    return opinionated(SAMBA)


def rows(
    rule="exact",
    *,
    states=2,
    logits=2,
    texts=2,
    temperatures=(1.0, 1.0),
    limits=(5, 5),
    until=None,
    captured=False,
):
    lm = verifier()
    decoder = SpeculativeDecoder(
        lm, NgramDrafter(), rule=rule, runner=CapturedRunner(lm.network, 2) if captured else None
    )
    session = lm.session()
    session.feed(b"abc")
    mark = session.mark()
    return decoder.rows(
        merge([mark.state] * states),
        torch.stack([mark.logits] * logits),
        decoder.drafter.start([b"abc"] * texts),
        [session.sampler(Sampling(temperature=warm)) for warm in temperatures],
        limits,
        until,
    )


@pytest.mark.parametrize("captured", [False, True])
def test_greedy_rows_need_temperature_0(captured):
    """Else the first byte would be drawn and the others not."""
    for temperatures, got in (((1.0, 1.0), "1"), ((0.0, 0.8), "0.8")):
        with pytest.raises(UserError, match=f"samplers must have temperature 0, got {got}; make them of"):
            rows("greedy", temperatures=temperatures, captured=captured)
    with pytest.raises(UserError, match=r"samplers must have one temperature, got 0.5, 1"):
        rows("exact", temperatures=(1.0, 0.5), captured=captured)
    assert len(written(rows("greedy", temperatures=(0.0, 0.0), captured=captured))[1]) == 5


def written(run, count=2):
    texts = [b""] * count
    while not run.done:
        texts = [text + more for text, more in zip(texts, run.round(), strict=True)]
    return texts


@pytest.mark.parametrize("limit", [-1, 2.5, float("inf"), None])
def test_limits_are_whole_numbers(limit):
    """Others are never reached."""
    with pytest.raises(UserError, match=f"limits must be whole numbers, 0 or more, got {limit} for row 1"):
        rows(limits=[3, limit])
    assert [len(text) for text in written(rows(limits=np.array([0, 4])))] == [0, 4]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"states": 3}, "state 3, logits 2, stream 2, samplers 2, limits 2"),
        ({"logits": 1}, "state 2, logits 1, stream 2, samplers 2, limits 2"),
        ({"texts": 1}, "state 2, logits 2, stream 1, samplers 2, limits 2"),
        ({"temperatures": (1.0,)}, "state 2, logits 2, stream 2, samplers 1, limits 2"),
        ({"limits": (5, 5, 5)}, "state 2, logits 2, stream 2, samplers 2, limits 3"),
        ({"until": [lambda byte: False]}, "state 2, logits 2, stream 2, samplers 2, limits 2, until 1"),
    ],
)
def test_everything_is_for_as_many_texts(wrong, said):
    with pytest.raises(UserError, match=f"for the same number of texts, 1 or more, got {said}$"):
        rows(**wrong)


@pytest.mark.parametrize("name", ["samba", "growing"])
def test_rows_go_back_to_their_sessions(name):
    """By the mark each began at; texts of different lengths, one of them none."""
    lm = opinionated(CONFIGS[name])
    decoder = SpeculativeDecoder(lm, NgramDrafter(longest=8, shortest=1), rule="greedy")
    prompts, limits, sessions, alone = [b"abc abc abc ", b"the", b"x" * 40], [20, 0, 7], [], []
    sampling = decoder.settings(Sampling(repetition_penalty=3.0))
    for prompt, limit in zip(prompts, limits, strict=True):
        sessions.append(lm.session())
        sessions[-1].feed(prompt)
        alone.append(sessions[-1].fork())
        list(alone[-1].generate_bytes(limit, sampling))
    marks = [session.mark() for session in sessions]
    run = decoder.rows(
        merge([mark.state for mark in marks]),
        torch.stack([mark.logits for mark in marks]),
        decoder.drafter.start(prompts),
        [session.sampler(sampling, limit) for session, limit in zip(sessions, limits, strict=True)],
        limits,
    )
    texts = written(run, 3)
    state, logits = run.finish()
    for row, (session, mark, text) in enumerate(zip(sessions, marks, texts, strict=True)):
        if text:
            session.rewind(mark.advanced(lm.codec.encode(text), select(state, [row]), logits[row].clone(), lm.codec))
        assert session.position == alone[row].position and session.mark().digest == alone[row].mark().digest
        np.testing.assert_allclose(session.logits, alone[row].logits, atol=1e-4)
        expected = b"".join(alone[row].generate_bytes(8, sampling))
        assert b"".join(session.generate_bytes(8, sampling)) == expected
