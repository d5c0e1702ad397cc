"""Forgetting cheap results: the same gradients to the last bit, less memory held."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from milonga.layers.recompute import CHEAP, cheap, forgetting


class Chain(nn.Module):
    """linear(silu(x)), twice, the gate called cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.made = 0

    def gate(self, x: Tensor) -> Tensor:
        self.made += 1
        return torch.nn.functional.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(cheap("gate", self.gate(h), self.gate, h))


def gradients(model: Chain, x: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    with forgetting(names):
        y = model(x)
    return list(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))


def test_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 8, requires_grad=True)
    kept = gradients(model, x, ())
    assert model.made == 1
    again = gradients(model, x, ("gate",))
    assert model.made == 3, "made once more in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_nothing_is_made_again_that_was_not_named() -> None:
    model = Chain()
    gradients(model, torch.randn(5, 8, requires_grad=True), ("norm",))
    assert model.made == 1


def test_memory_is_given_back() -> None:
    """Autograd holds the result without, and does not with."""
    x = torch.randn(64, 8, requires_grad=True)
    model = Chain()

    def freed(names: tuple[str, ...]) -> bool:
        weak: list[StorageWeakRef] = []

        def silu(value: Tensor) -> Tensor:
            out = torch.nn.functional.silu(value)
            weak.append(StorageWeakRef(out.untyped_storage()))
            return out

        with forgetting(names):
            h = model.first(x)
            y = model.second(cheap("gate", silu(h), silu, h))
        gone = weak[0].expired()
        y.sum().backward()
        return gone

    assert freed(("gate",))
    assert not freed(())


def test_views_and_shared_results_are_made_once() -> None:
    """Two who save views of one result get one remake; addresses are not confused afterwards."""
    calls = []

    def double(value: Tensor) -> Tensor:
        calls.append(1)
        return value * 2

    x = torch.randn(6, 4, requires_grad=True)
    with forgetting(CHEAP):
        both = cheap("rotary", double(x), double, x)
        a, b = both.split([2, 2], dim=1)
        y = (a * b).sum() + (torch.randn(6, 4) * both.detach()).sum()
    del both, a, b
    (grad,) = torch.autograd.grad(y, x)
    assert len(calls) == 2
    torch.testing.assert_close(grad, 4 * torch.cat([x[:, 2:], x[:, :2]], 1).detach())


def test_under_autocast_the_remake_is_under_autocast() -> None:
    linear = nn.Linear(4, 4, bias=False)
    seen = []

    def make(value: Tensor) -> Tensor:
        out = linear(value)
        seen.append(out.dtype)
        return out

    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), forgetting(("dt",)):
        h = cheap("dt", make(x), make, x)
        y = (h * h).sum()
    y.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("names", [(), ("gate",)])
def test_without_gradients_nothing_is_recorded(names: tuple[str, ...]) -> None:
    model = Chain()
    with torch.no_grad(), forgetting(names):
        model(torch.randn(2, 8))
    assert model.made == 1


def test_a_kept_tensor_written_in_between_is_an_error() -> None:
    """PyTorch does not look for that where there are hooks."""
    x = torch.randn(5, 8, requires_grad=True)
    with forgetting(("gate",)):
        y = x.exp()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"\[5, 8\] .* written in place"):
        y.sum().backward()


def test_a_source_written_in_between_is_an_error() -> None:
    model, x = Chain(), torch.randn(5, 8, requires_grad=True)
    with forgetting(("gate",)):
        h = model.first(x)
        y = model.second(cheap("gate", model.gate(h), model.gate, h))
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="written in place"):
        y.sum().backward()
