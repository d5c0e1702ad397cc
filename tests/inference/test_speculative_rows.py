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
from milonga.state import merge
from tests.inference.helpers import SAMBA, opinionated


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


def written(run):
    texts = [b"", b""]
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
