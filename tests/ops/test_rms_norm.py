import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.ops.rms_norm import ERROR_BOUND, rms_norm, rms_norm_reference
from tests.ops.helpers import assert_matches, relative_rms


@given(st.integers(0, 150), st.integers(1, 70), st.integers(0, 2**31))
def test_matches_reference(count: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(count, width), torch.randn(width)]
    assert_matches(
        lambda x, w: [rms_norm(x, w, backend="cpu")], lambda x, w: [rms_norm_reference(x, w, 1e-5)], inputs, ERROR_BOUND
    )


@given(st.integers(0, 40), st.integers(1, 70), st.sampled_from(["cpu", "reference"]), st.integers(0, 2**31))
def test_norm_of_a_sum(count: int, width: int, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(count, width), torch.randn(count, width), torch.randn(width)]
    assert_matches(
        lambda x, r, w: rms_norm(x, w, residual=r, backend=backend),
        lambda x, r, w: (rms_norm_reference(x + r, w, 1e-5), x + r),
        inputs,
        ERROR_BOUND,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_a_sum_is_that_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype), torch.randn(24)
    y, total = rms_norm(x, weight, residual=residual)
    assert y.dtype == total.dtype == dtype
    assert torch.equal(total, (x.float() + residual.float()).to(dtype)) and torch.equal(y, rms_norm(total, weight))


def test_wrong_residual_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: residual must be .* expected \[4, 8\], got \[3, 8\]"):
        rms_norm(torch.randn(4, 8), torch.ones(8), residual=torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"rms_norm: residual must be .*float32, got float64"):
        rms_norm(torch.randn(4, 8), torch.ones(8), residual=torch.randn(4, 8).double())


def test_strided_slice_is_not_misread() -> None:
    wide = torch.randn(3, 40, 64)
    x = wide[..., 16:48]
    weight = torch.randn(32)
    assert relative_rms(rms_norm(x, weight), rms_norm(x.contiguous(), weight)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(5, 24).to(dtype)
    y = rms_norm(x, torch.ones(24))
    assert y.dtype == dtype
    assert relative_rms(y, rms_norm_reference(x.double(), torch.ones(24), 1e-5)) < 5e-3


def test_nan_comes_out() -> None:
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    y = rms_norm(x, torch.ones(8))
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


def test_thread_count_does_not_matter() -> None:
    x, w = torch.randn(3000, 96), torch.randn(96)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaf = w.clone().requires_grad_()
        rms_norm(x, leaf).sin().sum().backward()
        results.append(leaf.grad)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_one_signature_each() -> None:
    rms_norm(torch.randn(4, 8, requires_grad=True), torch.ones(8)).sum().backward()
    rms_norm(torch.randn(2, 4, 16)[..., :8], torch.ones(8))
    with torch.no_grad():
        rms_norm(torch.randn(2, 8), torch.ones(8)), rms_norm(torch.randn(3), torch.ones(3), residual=torch.ones(3))
    from milonga.ops.rms_norm import cpu

    assert [len(kernel.signatures) for kernel in (cpu._forward, cpu._backward, cpu._few)] == [1, 1, 1]


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(lambda x, w: rms_norm(x, w).sum(), backend="aot_eager", fullgraph=True)
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    expected = torch.autograd.grad(rms_norm(x, w).sum(), (x, w))
    got = torch.autograd.grad(compiled(x, w), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_impossible_backend_is_an_error(backend: str) -> None:
    with pytest.raises(ValueError, match="rms_norm"):
        rms_norm(torch.randn(4, 8), torch.ones(8), backend=backend)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.randn(4, 8), torch.ones(7), r"weight must be \[D\], expected \[8\], got \[7\]"),
        (torch.randn(4, 8), torch.tensor(1.0), r"weight must be \[D\], expected \[8\], got \[\]"),
        (torch.tensor(1.0), torch.tensor(1.0), r"x must be \[\.\.\., D\], expected 1 dimension or more"),
        (torch.randn(4, 8), torch.ones(8, device="meta"), "weight must be on cpu as x is, got meta"),
        (torch.randn(4, 8, device="meta"), torch.ones(8), "weight must be on meta as x is, got cpu"),
        (torch.randn(4, 8), torch.ones(8).double(), "weight must be float32, got float64"),
        (torch.randn(4, 8), torch.ones(8).bfloat16(), "weight must be float32, got bfloat16"),
        (torch.randn(4, 8).half(), torch.ones(8).half(), "weight must be float32, got float16"),
        (torch.randn(4, 8).double(), torch.ones(8).half(), "weight must be float32 or float64, got float16"),
        (torch.randn(4, 8), torch.ones(8, dtype=torch.int64), "weight must be float32, got int64"),
        (torch.randn(4, 8), torch.ones(8, dtype=torch.bool), "weight must be float32, got bool"),
        (torch.randn(4, 8), torch.ones(8, dtype=torch.complex64), "weight must be float32, got complex64"),
        (torch.ones(4, 8, dtype=torch.int64), torch.ones(8), "x must be float32, .* or float64, got int64"),
        (torch.ones(4, 8, dtype=torch.bool), torch.ones(8), "x must be float32, .* or float64, got bool"),
        (torch.ones(4, 8, dtype=torch.complex64), torch.ones(8), "x must be float32, .* or float64, got complex64"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, weight: torch.Tensor, message: str, gradients: bool) -> None:
    """The shorter way without gradients lets nothing pass that the longer one refuses."""
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(x, weight)
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(x, weight, residual=x.clone())


@pytest.mark.parametrize("gradients", [True, False])
def test_residual_on_another_device_is_an_error(gradients: bool) -> None:
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(ValueError, match="residual must be on cpu as x is, got meta"),
    ):
        rms_norm(torch.randn(4, 8), torch.ones(8), residual=torch.randn(4, 8, device="meta"))


@given(st.integers(0, 9), st.integers(1, 90), st.booleans(), st.integers(0, 2**31))
def test_a_few_rows_without_gradients(rows: int, width: int, residual: bool, seed: int) -> None:
    """The shorter way of decoding: the same norm, of the same sum."""
    torch.manual_seed(seed)
    x, added, w = torch.randn(rows, 1, width), torch.randn(rows, 1, width), torch.randn(width)
    with torch.no_grad():
        if residual:
            y, total = rms_norm(x, w, residual=added)
            assert torch.equal(total, x + added)
        else:
            y, total = rms_norm(x, w), x
    assert relative_rms(y, rms_norm_reference(total.double(), w.double(), 1e-5)) <= ERROR_BOUND


def test_nan_comes_out_of_a_few_rows() -> None:
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    with torch.no_grad():
        for y in (rms_norm(x, torch.ones(8)), rms_norm(torch.ones(4, 8), torch.ones(8), residual=x)[0]):
            assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


def test_strided_rows_and_wrong_residuals_without_gradients() -> None:
    x, w = torch.randn(4, 16), torch.randn(8)
    with torch.no_grad():
        assert relative_rms(rms_norm(x[:, :8], w), rms_norm(x[:, :8].contiguous(), w).double()) <= 2e-7
        assert torch.equal(rms_norm(x[:, :8].contiguous(), w, residual=x[:, 8:])[1], x[:, :8] + x[:, 8:])
        with pytest.raises(ValueError, match="residual must be"):
            rms_norm(x[:, :8].contiguous(), w, residual=x)
