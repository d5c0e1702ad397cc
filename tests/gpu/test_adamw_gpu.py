"""AdamW's kernels on a GPU beside PyTorch's fused step: the same state, the same numbers but for rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from milonga.training import Optimizer, OptimizerConfig, build_optimizer
from milonga.training.muon import unhooked
from milonga.training.optimizer import _AdamW
from tests.gpu.helpers import SAMBA

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPES = ((), (1,), (7,), (64, 64), (2047,), (2049,), (3, 5, 1001), (1 << 20,), (0, 4))


class _Theirs(_AdamW):
    """PyTorch's own step, with the same two numbers."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return unhooked(torch.optim.AdamW.step)(self, closure)


def pair(**settings) -> tuple[list[list[nn.Parameter]], list[_AdamW]]:
    """The same parameters twice, in two groups each: -> (ours, theirs) and their optimizers."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [[nn.Parameter(value.to(CUDA, copy=True)) for value in start] for _ in range(2)]
    made = []
    for kind, mine in zip((_AdamW, _Theirs), parameters, strict=True):
        groups = [{"params": mine[:4]}, {"params": mine[4:], "weight_decay": 0.0}]
        made.append(kind(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True, **settings))
    return parameters, made


def set_gradients(parameters: list[list[nn.Parameter]], seed: int, shift: int = 0) -> list[Tensor | None]:
    """New gradients, the same for both, `shift` numbers behind the start of their memory; -> those of the first."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    for i, (one, other) in enumerate(zip(*parameters, strict=True)):
        whole = torch.randn(one.numel() + shift, device=CUDA, generator=generator) * 0.1
        one.grad = whole[shift:].view(one.shape).to(one)
        other.grad = one.grad.clone()
        if seed == 2 and i % 3 == 1:
            one.grad = other.grad = None
    return [p.grad for p in parameters[0]]


def assert_close(parameters: list[list[nn.Parameter]], optimizers: list[_AdamW]) -> None:
    ours, theirs = optimizers
    for one, other in zip(*parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)
        assert ours.state[one].keys() == theirs.state[other].keys()
        for name, value in ours.state[one].items():
            expected = theirs.state[other][name]
            assert (value.dtype, value.shape, value.device) == (expected.dtype, expected.shape, expected.device)
            atol = 3e-8 if name == "exp_avg" else 1e-9  # gradients of either sign, up to 0.5, may cancel
            torch.testing.assert_close(value, expected, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("scale", [None, 1.0, 3.7])
@pytest.mark.parametrize("shift", [0, 1])
def test_steps_are_those_of_pytorch_and_gradients_are_left_alone(scale: float | None, shift: int) -> None:
    """With gradients elsewhere at every step, some of them missing once, and one step left out."""
    parameters, optimizers = pair()
    for seed in range(6):
        gradients = set_gradients(parameters, seed, shift)
        kept = [None if g is None else g.clone() for g in gradients]
        before = [p.detach().clone() for p in parameters[0]]
        versions = [p._version for p in parameters[0]]
        for optimizer in optimizers:
            optimizer.grad_scale = None if scale is None else torch.tensor(scale, device=CUDA)
            optimizer.found_inf = torch.tensor(float(seed == 4), device=CUDA)
            optimizer.step()
        assert optimizers[0]._tables, "the kernel ran"
        for p, g, old, start, version in zip(parameters[0], gradients, kept, before, versions, strict=True):
            assert (g is None) == (old is None)
            if g is not None and old is not None:
                assert torch.equal(g, old)
                assert p._version > version, "what reads the parameter's version sees that it moved"
            if seed == 4 or g is None:
                assert torch.equal(p, start)
        assert_close(parameters, optimizers)
    counts = [float(optimizers[0].state[p]["step"]) for p in parameters[0]]
    assert counts == [4.0 if i % 3 == 1 else 5.0 for i in range(len(SHAPES))]


def test_state_goes_over_both_ways() -> None:
    """Saved from PyTorch's step and loaded into ours, and the other way round: both go on as if nothing was."""
    parameters, optimizers = pair()
    names = [{f"p{i}": p for i, p in enumerate(mine)} for mine in parameters]
    wrapped = [Optimizer([optimizer], named) for optimizer, named in zip(optimizers, names, strict=True)]
    for seed in range(6):
        if seed == 3:
            saved = [{key: value.clone() for key, value in one.tensors().items()} for one in wrapped]
            assert saved[0].keys() == saved[1].keys()
            for one, tensors in zip(wrapped, reversed(saved), strict=True):
                one.load_tensors(tensors)
        set_gradients(parameters, 10 + seed)
        for one in wrapped:
            one.step()
    assert_close(parameters, optimizers)


def test_the_same_on_every_run() -> None:
    moved = []
    for _ in range(2):
        parameters, (ours, _) = pair()
        for seed in range(3):
            set_gradients(parameters, seed)
            ours.step()
        moved.append([p.detach().clone() for p in parameters[0]])
    assert all(torch.equal(one, other) for one, other in zip(*moved, strict=True))


def test_nothing_waits_for_the_device() -> None:
    """Also where gradients are elsewhere than at the step before."""
    parameters, (ours, _) = pair()
    ours.grad_scale, ours.found_inf = torch.tensor(2.0, device=CUDA), torch.tensor(0.0, device=CUDA)
    for seed in range(3):
        set_gradients(parameters, seed + 3)
        ours.step()
    gradients = [torch.ones_like(p) for p in parameters[0]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, gradient in zip(parameters[0], gradients, strict=True):
            p.grad = gradient
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ["bf16", "transposed", "amsgrad"])
def test_other_tensors_and_settings_are_pytorchs(case: str) -> None:
    parameters, optimizers = pair(amsgrad=case == "amsgrad")
    for mine in parameters:
        if case == "bf16":
            mine[3].data = mine[3].data.bfloat16()
        if case == "transposed":
            mine[3].data = mine[3].data.t()
    for seed in range(3):
        set_gradients(parameters, 20 + seed)
        for mine in parameters:
            gradient = mine[3].grad
            assert gradient is not None
            if case == "transposed":
                mine[3].grad = gradient.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert not optimizers[0]._tables
    for one, other in zip(*parameters, strict=True):
        assert torch.equal(one, other)


def test_hooks_of_a_step_are_called_once() -> None:
    network = SAMBA.build(seed=0, device=CUDA)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from here on the step of PyTorch's class has hooks of its own
    (part,) = build_optimizer(network, OptimizerConfig()).parts
    calls = []
    part.register_step_pre_hook(lambda *_: calls.append("before"))
    part.register_step_post_hook(lambda *_: calls.append("after"))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    part.step()
    assert calls == ["before", "after"]
