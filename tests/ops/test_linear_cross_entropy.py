import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.ops.linear_cross_entropy import ERROR_BOUND, linear_cross_entropy, linear_cross_entropy_reference
from tests.ops.helpers import assert_matches, relative_rms


@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 63, 64, 65, 256, 300]),
    st.sampled_from([1, 7, 1000]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_matches_reference(count: int, width: int, vocabulary: int, chunk: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (count, 2))
    targets[torch.rand(count, 2) < 0.2] = -100
    inputs = [torch.randn(count, 2, width), torch.randn(vocabulary, width)]
    if biased:
        inputs.append(torch.randn(vocabulary))
    # With one class every gradient is zero but for rounding, which has no relative size.
    if vocabulary == 1:
        x, weight, *bias = [t.requires_grad_() for t in inputs]
        losses = linear_cross_entropy(x, weight, targets, bias=bias[0] if bias else None, chunk=chunk, backend="cpu")
        assert losses.eq(0).all()
        assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad(losses.sum(), inputs) if g.numel())
        return
    assert_matches(
        lambda x, w, b=None: [linear_cross_entropy(x, w, targets, bias=b, chunk=chunk, backend="cpu")],
        lambda x, w, b=None: [linear_cross_entropy_reference(x, w, targets, b, -100, chunk)],
        inputs,
        ERROR_BOUND,
    )


@pytest.mark.parametrize("chunk", [2, 100])
def test_reference_gradients(chunk: int) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 1, 1])
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy_reference(x, w, targets, b, -100, chunk), (x, weight, bias)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_cross_entropy(backend: str) -> None:
    x, weight, bias = torch.randn(3, 7, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.randint(0, 11, (3, 7))
    targets[1, 2] = 5000
    losses = linear_cross_entropy(x, weight, targets, bias=bias, ignore_index=5000, chunk=4, backend=backend)
    logits = torch.nn.functional.linear(x, weight, bias).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=5000, reduction="none")
    torch.testing.assert_close(losses, expected.view(3, 7))
    assert losses[1, 2] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 8).to(dtype).requires_grad_(), torch.randn(11, 8).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (6,))
    losses = linear_cross_entropy(x, weight, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(g.dtype == dtype for g in torch.autograd.grad(losses.sum(), (x, weight)))
    exact = linear_cross_entropy_reference(x.double(), weight.double(), targets, None, -100, 100)
    assert relative_rms(losses.detach(), exact.detach()) <= ERROR_BOUND


def test_autocast_changes_nothing() -> None:
    x, weight, targets = torch.randn(6, 80), torch.randn(11, 80), torch.randint(0, 11, (6,))
    for backend in ("cpu", "reference"):
        plain = linear_cross_entropy(x, weight, targets, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear_cross_entropy(x, weight, targets, backend=backend), plain)


def test_nan_comes_out_and_rows_are_independent() -> None:
    x, weight, targets = torch.randn(6, 8), torch.randn(300, 8), torch.randint(0, 300, (6,))
    before = linear_cross_entropy(x, weight, targets, backend="cpu")
    x[2, 3] = float("nan")
    after = linear_cross_entropy(x, weight, targets, backend="cpu")
    rest = [0, 1, 3, 4, 5]
    assert after[2].isnan() and torch.equal(before[rest], after[rest])


def test_large_logits() -> None:
    x, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([[5e4], [-5e4], [0.0]])
    losses = linear_cross_entropy(x, weight, torch.tensor([0, 0]), backend="cpu")
    assert torch.equal(losses, torch.tensor([0.0, 1e5]))


def test_logits_are_never_held_at_once() -> None:
    # All logits would take 256 MiB.
    script = """
import resource, torch
from milonga.ops.linear_cross_entropy import linear_cross_entropy
x, weight = torch.randn(16384, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
targets = torch.randint(0, 4096, (16384,))
linear_cross_entropy(x[:1024], weight, targets[:1024], backend="{backend}").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(x, weight, targets, backend="{backend}").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    # Freed blocks go back to the system at once, so that the C library's habits are not measured too.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    for backend, most in (("cpu", 64), ("reference", 128)):
        command = [sys.executable, "-c", script.format(backend=backend)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert int(done.stdout) < most, backend


def test_thread_count_does_not_matter_to_the_kernels() -> None:
    from milonga.ops.cpu_pool import run
    from milonga.ops.linear_cross_entropy import cpu

    logits, targets = torch.randn(2000, 300), torch.randint(0, 300, (2000,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        values, losses, totals = logits.clone(), torch.empty(2000), torch.empty(2000)
        shared = (values.view(-1).numpy(), 300, targets.numpy(), -100)
        run(cpu._forward, 500, 10**7, *shared, losses.numpy(), totals.numpy())
        run(cpu._backward, 500, 10**7, *shared, torch.ones(2000).numpy(), totals.numpy())
        results.append((losses, totals, values))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_signature_each() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, -100])).sum().backward()
    linear_cross_entropy(x.bfloat16(), weight, torch.tensor([0, 1, 2, 3]), chunk=1).sum().backward()
    from milonga.ops.linear_cross_entropy import cpu

    cpu.compile_kernels()
    assert len(cpu._forward.signatures) == 1 and len(cpu._backward.signatures) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    def loss(x, weight, targets):
        return linear_cross_entropy(x, weight, targets, backend="cpu").mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for time in (5, 9):
        x, weight = torch.randn(2, time, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        targets = torch.randint(0, 11, (2, time))
        expected = torch.autograd.grad(loss(x, weight, targets), (x, weight))
        got = torch.autograd.grad(compiled(x, weight, targets), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.randn(5, 7)}, r"weight must be \[V, D\], expected \[V, 8\], got \[5, 7\]"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be int64 .* expected \[4\], got \[3\]"),
        ({"targets": torch.zeros(4)}, "targets must be int64, got float32"),
        ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., D\], expected 1 dimension or more"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x must be float32, .* got int64"),
        ({"x": torch.ones(4, 8, dtype=torch.bool)}, "x must be float32, .* got bool"),
        ({"x": torch.ones(4, 8, dtype=torch.complex64)}, "x must be float32, .* got complex64"),
        ({"weight": torch.ones(5, 8, dtype=torch.int64)}, "weight must be float32 or .* got int64"),
        ({"weight": torch.ones(5, 8, dtype=torch.bool)}, "weight must be float32 or .* got bool"),
        ({"weight": torch.ones(5, 8, dtype=torch.complex64)}, "weight must be float32 or .* got complex64"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias must be float32 or .* got int32"),
        ({"bias": torch.ones(5, dtype=torch.bool)}, "bias must be float32 or .* got bool"),
        ({"bias": torch.ones(5, dtype=torch.complex128)}, "bias must be float32 or .* got complex128"),
        ({"x": torch.zeros(4, 8, device="meta")}, "weight must be on meta as x is, got cpu"),
        ({"weight": torch.zeros(5, 8, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets must be on cpu as x is, got meta"),
        ({"bias": torch.zeros(5, device="meta")}, "bias must be on cpu as x is, got meta"),
        ({"targets": torch.tensor([0, 1, 5, 2])}, r"targets must lie in 0 \.\. 4 or be -100, got 5"),
        ({"targets": torch.tensor([0, -1, 3, 2])}, r"targets must lie in 0 \.\. 4 or be -100, got -1"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\], expected \[5\], got \[4\]"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"backend": "triton"}, "cannot run here"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"x": torch.randn(4, 8), "weight": torch.randn(5, 8), "targets": torch.tensor([0, 1, 2, 3])}
    linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**(arguments | changes))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_weights_of_every_kind(weight: torch.dtype, bias: torch.dtype, backend: str) -> None:
    """A head in another precision than its input: the loss of the same numbers in float32."""
    x, targets = torch.randn(6, 8), torch.randint(0, 5, (6,))
    leaves = torch.randn(5, 8).to(weight).requires_grad_(), torch.randn(5).to(bias).requires_grad_()
    losses = linear_cross_entropy(x, leaves[0], targets, bias=leaves[1], backend=backend)
    expected = linear_cross_entropy(x.double(), leaves[0].double(), targets, bias=leaves[1].double())
    assert losses.dtype == torch.float32 and relative_rms(losses.detach(), expected.detach()) <= ERROR_BOUND
    assert [g.dtype for g in torch.autograd.grad(losses.sum(), leaves)] == [weight, bias]
