"""The Triton kernels of `linear_cross_entropy` under Triton's interpreter, on CPU tensors, against float64.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch

from milonga.ops.linear_cross_entropy import ERROR_BOUND, linear_cross_entropy_reference, triton
from tests.ops.helpers import relative_rms, spread
from tests.ops.interpreter import prepare

prepare()
# NumPy warns about what the kernels mean to do
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("count", "width", "classes", "chunk"), [(40, 12, 300, 17), (9, 5, 5000, 4), (33, 8, 2, 1000), (0, 8, 20, 10)]
)
def test_matches_reference(count: int, width: int, classes: int, chunk: int, biased: bool) -> None:
    x, weight, bias = torch.randn(count, width), torch.randn(classes, width), torch.randn(classes) if biased else None
    targets = torch.randint(0, classes, (count,))
    targets[::5] = -100
    upstream = torch.rand(count)
    losses, totals = triton.forward(x, weight, targets, bias, -100, chunk)
    gradients = triton.backward(upstream, x, weight, targets, bias, totals, -100, chunk)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = linear_cross_entropy_reference(*leaves[:2], targets, leaves[2] if biased else None, -100, 1000)
    exact = torch.autograd.grad(expected, leaves, upstream.double())
    for got, right in zip((losses, *gradients), (expected.detach(), *exact), strict=False):
        assert got.shape == right.shape and (count == 0 or relative_rms(got, right) <= ERROR_BOUND)
    sloped = triton.forward_sloped(x, weight, targets, bias, -100, chunk)
    slopes = triton.backward(torch.ones(count), x, weight, targets, bias, totals, -100, chunk)
    expected_bias = [slopes[2]] if biased else [slopes[2][:0]]
    for got, right in zip(sloped, (losses, totals, *slopes[:2], *expected_bias), strict=True):
        assert torch.equal(got, right)


def test_strides_change_nothing() -> None:
    x, weight, bias, upstream = torch.randn(20, 12), torch.randn(30, 12), torch.randn(30), torch.rand(20)
    targets, results = torch.randint(0, 30, (20,)), []
    for turned in (torch.clone, spread):
        given = [turned(value) for value in (x, weight, targets, bias)]
        losses, totals = triton.forward(*given, -100, 7)
        gradients = triton.backward(turned(upstream), *given, totals, -100, 7)
        together = triton.forward_sloped(*given, -100, 7)
        results.append([losses, totals, *gradients, *together])
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-5)  # PyTorch's products differ by strides


def test_unknown_targets_and_nan_give_nan_in_their_row_alone() -> None:
    x, weight, targets = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([1, 20, 3, -1, -100, 5])
    clean, _ = triton.forward(x, weight, targets.clamp(0, 19), None, -100, 4)
    x[5, 2] = float("nan")
    losses, _ = triton.forward(x, weight, targets, None, -100, 4)
    assert losses.isnan().tolist() == [False, True, False, True, False, True]
    assert torch.equal(losses[[0, 2]], clean[[0, 2]]) and losses[4] == 0.0


def test_large_logits() -> None:
    x, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[5e4], [-5e4], [0.0]])
    losses, _ = triton.forward(x, weight, torch.tensor([0, 0]), None, -100, 10)
    assert torch.equal(losses, torch.tensor([0.0, 1e5]))


@pytest.mark.parametrize("count", [1, 5000])
def test_scaled_in_fp32(count: int) -> None:
    """A factor that bf16 would round by 0.2 per cent."""
    slope, factor = torch.randn(count).bfloat16(), torch.tensor(1 / 31000)
    got = triton.scaled(slope, factor, torch.float32)
    assert relative_rms(got, slope.double() / 31000) <= 1e-6
    assert triton.scaled(slope.float(), factor, torch.bfloat16).dtype == torch.bfloat16
