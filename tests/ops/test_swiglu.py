import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.ops.swiglu import ERROR_BOUND, swiglu, swiglu_reference
from tests.ops.helpers import assert_matches, relative_rms


@given(st.integers(0, 40), st.integers(0, 70), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**31))
def test_matches_reference(count: int, width: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(count, 2, width) * size, torch.randn(count, 2, width)]
    assert_matches(
        lambda g, u: [swiglu(g, u, backend="cpu")], lambda g, u: [swiglu_reference(g, u)], inputs, ERROR_BOUND
    )


def test_extreme_gates() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30], requires_grad=True)
    y = swiglu(gate, torch.ones(8), backend="cpu")
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, -5e-37, 0.0, 0.0, 88.0, 200.0, 1e30]), atol=1e-36, rtol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]), atol=1e-30, rtol=1e-6)


def test_reference_gradients() -> None:
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


def test_halves_of_a_fused_projection() -> None:
    fused = torch.randn(3, 40, 64)
    gate, up = fused.chunk(2, -1)
    y = swiglu(gate, up, backend="cpu")
    assert y.is_contiguous() and torch.equal(y, swiglu(gate.contiguous(), up.contiguous(), backend="cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_whole_projection_is_its_halves(backend: str) -> None:
    fused = torch.randn(3, 40, 64, requires_grad=True)
    y, halves = swiglu(fused, backend=backend), swiglu(*fused.chunk(2, -1), backend=backend)
    assert torch.equal(y, halves)
    upstream = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, fused, upstream)[0] for out in (y, halves)))
    assert swiglu(torch.randn(2, 0), backend=backend).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(5, 24).to(dtype).requires_grad_() for _ in range(2))
    y = swiglu(gate, up)
    gradients = torch.autograd.grad(y.sum(), (gate, up))
    assert all(t.dtype == dtype for t in (y, *gradients))
    assert relative_rms(y.detach(), swiglu_reference(gate.double(), up.double()).detach()) < 5e-3


@pytest.mark.parametrize("which", [0, 1])
def test_nan_comes_out(which: int) -> None:
    inputs = [torch.randn(2, 40), torch.randn(2, 40)]
    inputs[which][1, 17] = float("nan")
    y = swiglu(*inputs, backend="cpu")
    assert y[1, 17].isnan() and int(y.isnan().sum()) == 1


def test_thread_count_does_not_matter() -> None:
    inputs = [torch.randn(3000, 96), torch.randn(3000, 96)]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = swiglu(*leaves, backend="cpu")
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_signature_each() -> None:
    gate = torch.randn(4, 8, requires_grad=True)
    swiglu(gate, gate).sum().backward()
    swiglu(gate.bfloat16()[..., :4], gate.bfloat16()[..., 4:]).sum().backward()
    swiglu(torch.randn(7), torch.randn(7))
    from milonga.ops.swiglu import cpu

    cpu.compile_kernels()
    assert len(cpu._forward.signatures) == 1 and len(cpu._backward.signatures) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    compiled = torch.compile(
        lambda f: swiglu(*f.chunk(2, -1), backend="cpu").sum(), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for time in (5, 9):
        fused = torch.randn(2, time, 16, requires_grad=True)
        (expected,) = torch.autograd.grad(swiglu(*fused.chunk(2, -1), backend="cpu").sum(), fused)
        assert torch.equal(torch.autograd.grad(compiled(fused), fused)[0], expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"swiglu: up .* expected torch.float32 \[4, 8\], got torch.float32 \[4, 7\]"):
        swiglu(torch.randn(4, 8), torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"swiglu: up .* got torch.float64"):
        swiglu(torch.randn(4, 8), torch.randn(4, 8).double())
    with pytest.raises(ValueError, match=r"swiglu: without up, gate must be \[..., 2F\], got \[4, 7\]"):
        swiglu(torch.randn(4, 7))
    with pytest.raises(ValueError, match="swiglu: backend 'triton' cannot run here"):
        swiglu(torch.randn(4, 8), torch.randn(4, 8), backend="triton")


@pytest.mark.parametrize("gradients", [True, False])
def test_halves_on_two_devices_are_an_error(gradients: bool) -> None:
    here, other = torch.randn(4, 8), torch.randn(4, 8, device="meta")
    with torch.set_grad_enabled(gradients):
        with pytest.raises(ValueError, match="swiglu: up must be on cpu as gate is, got meta"):
            swiglu(here, other)
        with pytest.raises(ValueError, match="swiglu: up must be on meta as gate is, got cpu"):
            swiglu(other, here)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_gates_that_are_no_floats_are_an_error(dtype: torch.dtype, backend: str) -> None:
    message = "backend 'cpu' cannot run here" if backend == "cpu" else "gate must be float32, .* or float64, got"
    values = torch.ones(4, 8, dtype=dtype)
    for arguments in ((values,), (values, values)):
        with pytest.raises(ValueError, match=f"swiglu: {message}"):
            swiglu(*arguments, backend=backend)
