"""Muon by stacks is Muon matrix by matrix."""

import pytest
import torch

from milonga.training import muon
from milonga.training.muon import StackedMuon

SHAPES = [(24, 40), (40, 24), (24, 40), (7, 7), (40, 24), (24, 40), (3, 50)]


def _parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) if number != 2 or step != 1 else None


def _moved(optimizer, parameters, step, steps=4):
    before = [p.detach().clone() for p in parameters]
    for number in range(steps):
        _give_gradients(parameters, number)
        step(optimizer)
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("stack", [muon.STACK, 24 * 40 * 2])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "weight_decay": 0.3, "momentum": 0.5}])
def test_stacks_move_as_single_matrices(monkeypatch, stack, settings):
    """Over some steps, one of them without a gradient for one matrix; both leave the same momentum."""
    monkeypatch.setattr(muon, "STACK", stack)
    one, other = _parameters(), _parameters()
    settings = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", **settings}
    plain, stacked = torch.optim.Muon(one, **settings), StackedMuon(other, **settings)
    expected = _moved(plain, one, lambda it: it.step())
    got = _moved(stacked, other, lambda it: it.step_stacked())
    for a, b, p, q in zip(expected, got, one, other, strict=True):
        assert (a - b).norm() < 0.01 * a.norm()  # both are rounded to bf16 in every product
        assert torch.equal(plain.state[p]["momentum_buffer"], stacked.state[q]["momentum_buffer"])


def test_singular_values_come_near_one():
    """All of them, of tall and wide matrices, whatever their scale; nothing becomes of nothing."""
    for shape in [(5, 16, 64), (5, 64, 16), (1, 32, 32)]:
        matrices = (
            torch.randn(shape, generator=torch.Generator().manual_seed(2))
            * torch.logspace(-4, 3, shape[0])[:, None, None]
        )
        values = torch.linalg.svdvals(muon.orthogonalised(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
        if shape[1] != shape[2]:  # a square matrix may have one so small that five steps do not lift it
            assert values.min() > 0.5
        assert values.max() < 1.3
    assert not muon.orthogonalised(torch.zeros(2, 4, 6), (3.4445, -4.7750, 2.0315), 5, 1e-7).any()


def test_on_a_cpu_the_step_is_that_of_pytorch():
    """Bit for bit, and with a closure."""
    one, other = _parameters(), _parameters()
    settings = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    _moved(torch.optim.Muon(one, **settings), one, lambda it: it.step())
    _moved(StackedMuon(other, **settings), other, lambda it: it.step(lambda: 0.0))
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_on_a_cpu_the_step_is_that_of_pytorch_where_the_closure_gives_the_first_gradients(monkeypatch):
    monkeypatch.setattr(StackedMuon, "step_stacked", lambda _: pytest.fail("stacks are for a GPU"))
    moved = []
    for kind in (torch.optim.Muon, StackedMuon):
        parameters = _parameters()
        optimizer = kind(parameters, lr=0.02, adjust_lr_fn="match_rms_adamw")
        optimizer.step(lambda parameters=parameters: _give_gradients(parameters, 0))
        moved.append(parameters)
    assert all(torch.equal(p, q) for p, q in zip(*moved, strict=True))


def test_hooks_of_a_step_are_called_once():
    torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))])  # now the step of PyTorch's class has hooks of its own
    parameters = _parameters()
    optimizer, calls = StackedMuon(parameters), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    _give_gradients(parameters, 0)
    optimizer.step()
    assert calls == ["before", "after"]
