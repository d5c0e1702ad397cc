"""Deciding on a device is deciding on the host; the kernels are tested in `interpreted_speculation.py`."""

import numpy as np
import pytest
import torch

from milonga.inference.acceptance import accept_exact, accept_greedy
from milonga.inference.sampling import Sampler, Sampling
from milonga.ops import speculation
from milonga.ops.speculation import Verdicts, decide_, decide_exact, decide_greedy, pick
from milonga.ops.speculation.reference import VerdictInputs


class Drawn:
    """A draft with made-up conditionals."""

    def __init__(self, text: bytes, q: np.ndarray):
        self.text, self._q = text, q

    def probability(self, index: int) -> float:
        return float(self._q[index, self.text[index]])

    def distribution(self, index: int) -> np.ndarray:
        return self._q[index]


def test_the_exact_rule_is_that_of_the_host() -> None:
    random = np.random.default_rng(0)
    for seed in range(60):
        logits, count = random.normal(size=(8, 256)) * 4, int(random.integers(0, 8))
        q = random.dirichlet(np.full(256, 0.02), 7) + 1e-9
        q /= q.sum(1, keepdims=True)
        text = [int(random.choice(256, p=row)) for row in q]
        for index in range(7):  # the verifier mostly agrees
            logits[index] = np.log(q[index] + 1e-4) * 0.9
        sampler = Sampler(Sampling(temperature=0.9, seed=seed))
        expected = accept_exact(logits, Drawn(bytes(text), q), count, sampler.fork())
        numbers = [torch.tensor([[sampler._uniforms(place, lane) for place in range(8)]]) for lane in (1, 0)]
        p = torch.softmax(torch.from_numpy(logits) / 0.9, -1)[None]
        there = torch.from_numpy(q)[None]
        chosen = there.gather(2, torch.tensor(text)[None, :, None])[..., 0]
        accepted, own = decide_exact(p, torch.tensor([text]), torch.tensor([count]), chosen, there, *numbers)
        assert (int(accepted), int(own)) == expected


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_greedy_rule_is_that_of_the_host(share: float) -> None:
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(8, 256, generator=generator)
        text = logits[:-1].argmax(-1)
        text[torch.rand(7, generator=generator) < 0.2] = 3
        count = seed % 8
        draft = Drawn(bytes(text.tolist()), np.empty(0))
        expected = accept_greedy(share)(logits.numpy(), draft, count, Sampler(Sampling(temperature=0.0)))
        accepted, own, open_ = decide_greedy(logits[None], text[None], torch.tensor([count]), share)
        assert (int(accepted), None if open_ else int(own)) == expected


def test_a_pick_never_takes_what_has_no_weight() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).double().expand(5, -1)
    uniform = torch.tensor([0.0, 0.2, 0.25, 0.9, 1.0]).double()
    assert pick(weights, uniform).tolist() == [1, 1, 3, 3, 3]


def test_rows_that_are_through_do_not_move() -> None:
    columns = torch.zeros(2, 40)
    told = VerdictInputs(torch.tensor([[1], [0]]), columns.double(), columns.double(), torch.ones(2, 1).double())
    verdicts = Verdicts(torch.zeros(2, 12, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    logits = torch.full((2, 8, 256), -9.0)
    logits[:, :, 65] = 9.0
    text = torch.full((2, 7), 65)
    decide_(logits, text, torch.tensor([4, 4]), None, None, told, verdicts, True)
    assert verdicts.result[0].tolist() == [4, 65, 0, 0, 4] + [65] * 7 and verdicts.keep.tolist() == [5, 0]
    with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
        decide_(logits, text, torch.tensor([4, 4]), None, None, told, verdicts, True, backend="triton")
    with pytest.raises(ValueError, match=r"\[B L\+1 256\], L from 1, expected \[2, 8, 256\], got \[2, 8, 255\]"):
        decide_(logits[..., :255], text, torch.tensor([4, 4]), None, None, told, verdicts, True)


def test_the_kernels_take_columns_of_one_array_and_plain_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked as on a GPU; the kernels themselves are not reached."""
    monkeypatch.setattr(speculation, "choice", lambda *_: "triton")
    apart = VerdictInputs(torch.ones(2, 1).long(), *torch.zeros(2, 2, 8).double(), torch.ones(2, 1).double())
    text, count = torch.zeros(2, 7).long(), torch.zeros(2).long()
    verdicts = Verdicts(torch.zeros(2, 12).long(), torch.zeros(2).long())
    for logits, message in (
        (torch.zeros(2, 8, 256), "columns of one array"),
        (torch.zeros(2, 8, 256).double(), "contiguous float32 logits"),
        (torch.zeros(256, 8, 2).transpose(0, 2), "contiguous float32 logits"),
    ):
        with pytest.raises(ValueError, match=message):
            decide_(logits, text, count, None, None, apart, verdicts, True, backend="triton")
