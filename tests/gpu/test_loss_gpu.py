"""`linear_cross_entropy` on a GPU against the float64 reference."""

import pytest
import torch

from milonga.ops.linear_cross_entropy import ERROR_BOUND, linear_cross_entropy
from tests.ops.helpers import relative_rms

pytestmark = pytest.mark.gpu

HALF_BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # what rounding the gradients of logits and the results costs


def make(count: int, width: int, classes: int, dtype: torch.dtype, biased: bool = False):
    """-> (x, weight and maybe bias), targets with some that count for nothing."""
    inputs = [torch.randn(count, width), torch.randn(classes, width) * width**-0.5]
    if biased:
        inputs.append(torch.randn(classes))
    targets = torch.randint(0, classes, (count,))
    targets[::7] = -100
    return [t.cuda().to(dtype) for t in inputs], targets.cuda()


def run(inputs, targets, backend: str, chunk: int | None, upstream=None):
    leaves = [t.detach().requires_grad_() for t in inputs]
    losses = linear_cross_entropy(
        *leaves[:2], targets, bias=leaves[2] if leaves[2:] else None, chunk=chunk, backend=backend
    )
    upstream = torch.rand_like(losses) if upstream is None else upstream.to(losses.dtype)
    return losses.detach(), upstream, torch.autograd.grad(losses, leaves, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("count", "width", "classes", "chunk"),
    [(0, 8, 20, None), (1, 64, 256, None), (999, 100, 300, 128), (1000, 256, 32000, 300), (513, 64, 4097, None)],
)
def test_matches_reference(dtype, biased, count, width, classes, chunk) -> None:
    inputs, targets = make(count, width, classes, dtype, biased)
    losses, upstream, gradients = run(inputs, targets, "triton", chunk)
    exact_losses, _, exact = run([t.double() for t in inputs], targets, "reference", None, upstream)
    if count == 0:
        assert losses.shape == (0,) and all(not g.any() for g in gradients)
        return
    assert relative_rms(losses, exact_losses) <= ERROR_BOUND
    for got, right in zip(gradients, exact, strict=True):
        assert got.dtype == dtype and relative_rms(got, right) <= HALF_BOUND.get(dtype, ERROR_BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_one_upstream_number_for_all_rows(dtype, biased) -> None:
    """The gradients that were computed beside the losses, scaled."""
    inputs, targets = make(999, 100, 300, dtype, biased)
    one = torch.tensor(0.37, device="cuda")
    _, _, gradients = run(inputs, targets, "triton", 128, one.expand(999))
    _, _, exact = run([t.double() for t in inputs], targets, "reference", None, one.expand(999))
    for got, right in zip(gradients, exact, strict=True):
        assert got.dtype == dtype and relative_rms(got, right) <= 1.5 * HALF_BOUND.get(dtype, ERROR_BOUND)
    _, _, rows = run(inputs, targets, "triton", 128, one.expand(999).contiguous())
    assert all(relative_rms(a, b.double()) <= HALF_BOUND.get(dtype, 1e-6) for a, b in zip(gradients, rows, strict=True))


def test_deterministic() -> None:
    inputs, targets = make(5000, 256, 8000, torch.bfloat16)
    losses, upstream, gradients = run(inputs, targets, "triton", 1024)
    for _ in range(3):
        again, _, other = run(inputs, targets, "triton", 1024, upstream)
        assert all(torch.equal(a, b) for a, b in zip((losses, *gradients), (again, *other), strict=True))


def test_logits_are_never_held_at_once() -> None:
    inputs, targets = make(1 << 18, 64, 8192, torch.bfloat16)  # 8 GiB of fp32 logits
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(inputs, targets, "triton", None)
    assert torch.cuda.max_memory_allocated() - before < 3 << 29  # 1.5 GiB


def test_autocast_rounds_as_a_linear_layer_does() -> None:
    (x, weight), targets = make(300, 64, 500, torch.float32)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cuda", torch.bfloat16):
        losses = linear_cross_entropy(*leaves, targets, backend="triton")
    gradients = torch.autograd.grad(losses.sum(), leaves)
    assert losses.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
    rounded = linear_cross_entropy(x.detach().bfloat16(), weight.detach().bfloat16(), targets, backend="triton")
    assert torch.equal(losses, rounded)


def test_unknown_targets_and_nan_give_nan_in_their_row_alone() -> None:
    (x, weight), targets = make(6, 8, 300, torch.float32)
    targets[:] = torch.tensor([1, 300, 3, -1, -100, 5])
    before = linear_cross_entropy(x, weight, targets.clamp(0, 299))
    x[5, 3] = float("nan")
    losses = linear_cross_entropy(x, weight, targets)
    assert losses.isnan().tolist() == [False, True, False, True, False, True]
    assert torch.equal(losses[[0, 2]], before[[0, 2]]) and losses[4] == 0.0


def test_compiles_without_graph_break() -> None:
    def loss(x, weight, targets):
        return linear_cross_entropy(x, weight, targets).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count in (50, 90):
        inputs, targets = make(count, 64, 500, torch.bfloat16)
        leaves = [t.requires_grad_() for t in inputs]
        expected = torch.autograd.grad(loss(*leaves, targets), leaves)
        got = torch.autograd.grad(compiled(*leaves, targets), leaves)
        assert all(relative_rms(a, b) <= HALF_BOUND[torch.bfloat16] for a, b in zip(got, expected, strict=True))
