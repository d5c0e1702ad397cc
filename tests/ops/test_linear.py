import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from milonga.ops.linear import (
    ERROR_BOUND,
    LARGEST_INT8,
    MIN_ROWS,
    SPLIT_BOUND,
    cpu,
    linear,
    linear_split,
    quantize,
    widen,
)
from milonga.ops.linear.library import AVAILABLE
from milonga.ops.linear.split import split_product
from tests.ops.helpers import assert_matches, relative_rms


@given(st.integers(0, 70), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**31))
def test_matches_float64(rows: int, width: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(2, rows, width), torch.randn(out, width)]
    assert_matches(lambda x, w: [linear(x, w)], lambda x, w: [F.linear(x, w)], inputs, ERROR_BOUND)


def test_full_fp32_at_the_widest() -> None:
    x, w = torch.randn(300, 4096), torch.randn(257, 4096)
    assert relative_rms(linear(x, w), x.double() @ w.double().t()) <= ERROR_BOUND


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")
def test_takes_the_fast_product() -> None:
    x, w = torch.randn(MIN_ROWS, 6, requires_grad=True), torch.randn(5, 6)
    assert "milonga" in type(linear(x, w).grad_fn.next_functions[0][0]).__name__
    assert "milonga" not in type(linear(x[:1], w).grad_fn).__name__


def test_only_the_gradients_asked_for() -> None:
    x, w = torch.randn(20, 6), torch.randn(5, 6, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and relative_rms(w.grad, x.sum(0).expand(5, 6)) < ERROR_BOUND


def test_strided_and_expanded_rows() -> None:
    wide = torch.randn(3, 40, 64)
    w = torch.randn(9, 32)
    for x in (wide[..., 16:48], wide[:1, :, :32].expand(3, 40, 32), wide[:, ::2, :32]):
        assert relative_rms(linear(x, w), F.linear(x.double(), w.double())) <= ERROR_BOUND


def test_autocast_and_other_dtypes_pass_through() -> None:
    x, w = torch.randn(20, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert linear(x.double(), w.double()).dtype == torch.float64


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(lambda x, w: linear(x, w).sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (12, 33):
        x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        expected = torch.autograd.grad(linear(x, w).sum(), (x, w))
        got = torch.autograd.grad(compiled(x, w), (x, w))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_nan_comes_out() -> None:
    x = torch.randn(20, 8)
    x[3, 2] = float("nan")
    y = linear(x, torch.randn(4, 8))
    assert y[3].isnan().all() and y.isnan().sum() == 4


def test_wrong_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        linear(torch.randn(20, 8), torch.randn(4, 7))


@given(st.integers(0, 9), st.integers(1, 90), st.integers(1, 90), st.sampled_from(["fp32", "bf16", "int8"]))
@pytest.mark.parametrize("no_grad", [False, True])
def test_stored_weights_are_widened_exactly(no_grad: bool, rows: int, width: int, out: int, storage: str) -> None:
    """Few rows and many, with and without kernels of our own: the product with the very numbers that are stored."""
    torch.manual_seed(rows * 10000 + width * 100 + out)
    x, w = torch.randn(rows, width), torch.randn(out, width)
    weight, scale = quantize(w) if storage == "int8" else (w.bfloat16() if storage == "bf16" else w, None)
    exact = x.double() @ widen(weight, scale, torch.float64).t()
    with torch.set_grad_enabled(not no_grad):
        got = linear(x, weight, scale)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert rows == 0 or relative_rms(got, exact) <= ERROR_BOUND
    error = (widen(weight, scale, torch.float64) - w.double()).abs().amax(1)
    bound = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / LARGEST_INT8 * (1 + 1e-5)}[storage]
    assert bool((error <= bound * w.double().abs().amax(1)).all())


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_do_not_depend_on_threads_or_on_each_other(storage: str, threads: int) -> None:
    x, w = torch.randn(5, 1500), torch.randn(1111, 1500)
    weight, scale = quantize(w) if storage == "int8" else (w.bfloat16() if storage == "bf16" else w, None)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            alone = torch.cat([linear(row[None], weight, scale) for row in x])
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, weight, scale), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_nan_comes_out_of_every_storage(where: str, storage: str) -> None:
    x, w = torch.randn(2, 40), torch.randn(30, 40)
    (x if where == "x" else w)[1, 7] = torch.nan
    weight, scale = quantize(w) if storage == "int8" else (w.bfloat16() if storage == "bf16" else w, None)
    with torch.no_grad():
        bad = linear(x, weight, scale).isnan()
    assert torch.equal(bad[1] if where == "x" else bad[:, 1], torch.ones_like(bad[1] if where == "x" else bad[:, 1]))
    assert int(bad.sum()) == (30 if where == "x" else 2)


def test_one_signature_for_each_storage() -> None:
    with torch.no_grad():
        for rows in (1, 3):
            x, w = torch.randn(rows, 9), torch.randn(4, 9)
            linear(x, w), linear(x[:, :5], w[:, :5]), linear(x, w.bfloat16()), linear(x, *quantize(w))
    assert [len(kernel.signatures) for kernel in (cpu._full, cpu._half, cpu._whole)] == [1, 1, 1]


def test_scale_and_int8_come_together() -> None:
    x, w = torch.randn(2, 6), torch.randn(4, 6)
    with pytest.raises(ValueError, match="int8 weights take a scale \\[4\\]"):
        linear(x, w.to(torch.int8))
    with pytest.raises(ValueError, match="others none"):
        linear(x, w, torch.ones(4))


@pytest.mark.parametrize(
    ("x", "weight", "scale", "message"),
    [
        (
            torch.randn(2, 6),
            torch.randn(4, 6).double(),
            None,
            "weight must have the dtype of x, expected float32, got float64",
        ),
        (torch.randn(9, 6).bfloat16(), torch.randn(4, 6), None, "expected bfloat16, got float32"),
        (torch.ones(2, 6, dtype=torch.int64), torch.randn(4, 6), None, "expected int64, got float32"),
        (torch.randn(2, 6), torch.randn(4, 6, device="meta"), None, "weight must be on cpu as x is, got meta"),
        (torch.randn(2, 6, device="meta"), torch.randn(4, 6), None, "weight must be on meta as x is, got cpu"),
        (torch.randn(2, 6), torch.ones(4, 6, dtype=torch.int8), torch.ones(4, device="meta"), "scale must be on cpu"),
        (
            torch.ones(2, 6, dtype=torch.int64),
            torch.ones(4, 6, dtype=torch.int8),
            torch.ones(4),
            "floating .* got int64",
        ),
    ],
)
@pytest.mark.parametrize("no_grad", [False, True])
def test_what_does_not_go_together_is_named(
    no_grad: bool, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, message: str
) -> None:
    with torch.set_grad_enabled(not no_grad):
        for call in (lambda: linear(x, weight, scale), lambda: linear_split(x, weight, (1, 3), scale)):
            with pytest.raises(ValueError, match=f"linear: .*{message}"):
                call()


def test_autocast_mixes_dtypes_but_not_float64() -> None:
    x, w = torch.randn(20, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x.bfloat16(), w), linear(x, w))
        assert torch.equal(torch.cat(linear_split(x.bfloat16(), w, (1, 3)), -1), linear(x, w))
        with pytest.raises(ValueError, match=r"linear: .* expected float64, got float32"):
            linear(x.double(), w)


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("autocast", [False, True])
def test_split_product_has_the_gradients_of_the_product(used: tuple[int, ...], autocast: bool) -> None:
    x, w = torch.randn(2, 9, 12, requires_grad=True), torch.randn(11, 12, requires_grad=True)
    sizes = (4, 2, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = split_product(x, w, sizes)
        expected = F.linear(x, w).split(sizes, -1)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    upstream = [torch.randn_like(part) for part in parts]
    found = [
        torch.autograd.grad([ways[i] for i in used], (x, w), [upstream[i] for i in used]) for ways in (parts, expected)
    ]
    for got, exact in zip(*found, strict=True):
        assert relative_rms(got, exact.double()) <= (2.0**-7 if autocast else ERROR_BOUND)


def test_split_in_bf16_is_within_its_bound() -> None:
    x, w = torch.randn(200, 256).bfloat16().requires_grad_(), torch.randn(768, 256).bfloat16()
    upstream = [torch.randn(200, 256).bfloat16() for _ in range(3)]
    (got,) = torch.autograd.grad(split_product(x, w, (256,) * 3), x, upstream)
    exact = torch.cat(upstream, -1).double() @ w.double()
    assert relative_rms(got, exact) <= SPLIT_BOUND * torch.finfo(torch.bfloat16).eps / 2


def test_split_adds_up() -> None:
    x, w = torch.randn(3, 6), torch.randn(5, 6)
    assert torch.equal(torch.cat(linear_split(x, w, (2, 3)), -1), linear(x, w))
    with pytest.raises(ValueError, match="add up to 5, got \\[2, 2\\]"):
        linear_split(x, w, (2, 2))
