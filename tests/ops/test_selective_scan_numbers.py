"""The numbers of the scan: NaN comes out, extremes do not overflow, long sums and low precision stay accurate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.ops.selective_scan import ERROR_BOUND, selective_scan
from tests.ops.helpers import assert_matches, relative_rms
from tests.ops.test_selective_scan import ORDER, make, scan

NANS = (0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1)  # quiet, all payload bits, signalling, negative


@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("name", ORDER)
def test_nan_comes_out(name: str, bits: int) -> None:
    inputs = make(2, 40, 20, 3)
    index = {"A": (7, 1), "D": (7,), "dt_bias": (7,), "initial": (1, 7, 1), "B": (1, 5, 1), "C": (1, 5, 1)}
    inputs[name][index.get(name, (1, 5, 7))] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    y, final = selective_scan(**inputs, backend="cpu")
    expected_y, expected_final = selective_scan(**inputs, backend="reference")
    assert expected_y.isnan().any()
    assert torch.equal(y.isnan(), expected_y.isnan())
    assert torch.equal(final.isnan(), expected_final.isnan())


@pytest.mark.parametrize("bits", NANS)
@pytest.mark.parametrize("name", ORDER)
def test_nan_comes_out_of_gradients(name: str, bits: int) -> None:
    inputs = make(1, 40, 20, 3)
    index = {"A": (7, 1), "D": (7,), "dt_bias": (7,), "initial": (0, 7, 1), "B": (0, 5, 1), "C": (0, 5, 1)}
    inputs[name][index.get(name, (0, 5, 7))] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    gradients = {}
    for backend in ("cpu", "reference"):
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        outputs = scan(backend, ORDER)(*leaves)
        gradients[backend] = torch.autograd.grad([o.sum() for o in outputs], leaves)
    for argument, got, expected in zip(ORDER, gradients["cpu"], gradients["reference"], strict=True):
        assert bool((got.isnan() | ~expected.isnan()).all()), f"NaN in {name}: lost in the gradient of {argument}"


def test_nan_upstream_comes_out() -> None:
    leaves = [value.requires_grad_() for value in make(1, 40, 20, 3).values()]
    y, final = scan("cpu", ORDER)(*leaves)
    upstream = torch.ones_like(y)
    upstream[0, 39, 4] = float("nan")
    gradients = dict(
        zip(ORDER, torch.autograd.grad([y, final], leaves, [upstream, torch.ones_like(final)]), strict=True)
    )
    assert gradients["x"][0, :, 4].isnan().all()
    assert gradients["initial"][0, 4].isnan().all()
    assert not gradients["x"][0, :, 5].isnan().any()


def test_extreme_steps() -> None:
    inputs = make(1, 8, 20, 4)
    inputs["dt"] = (
        torch.tensor([-200.0, -80.0, -30.0, -10.0, 0.0, 15.0, 60.0, 1e4])[None, :, None].expand(1, 8, 20).clone()
    )
    inputs["dt_bias"] = torch.zeros(20)
    inputs["A"] = -torch.tensor([1e-3, 1.0, 1e3, 1e30])[None].expand(20, 4).clone()
    exact = selective_scan(**{k: v.double() for k, v in inputs.items()})
    got = selective_scan(**inputs, backend="cpu")
    for t in range(8):
        assert relative_rms(got[0][:, t], exact[0][:, t]) <= ERROR_BOUND, t
    assert relative_rms(got[1], exact[1]) <= ERROR_BOUND


@pytest.mark.parametrize("dt", [-85.0, -40.0, -17.0, -5.0, -0.5, 0.0, 0.5, 5.0, 17.0, 40.0, 1000.0])
def test_softplus_is_relatively_accurate(dt: float) -> None:
    one = torch.ones(1, 1, 1)
    _, final = selective_scan(one, one * dt, -torch.ones(1, 1), one, one, backend="cpu")
    exact = torch.logaddexp(torch.tensor(dt, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    assert abs(float(final) / float(exact) - 1) < 5e-7


def test_decay_underflows_to_zero() -> None:
    one = torch.ones(1, 1, 1)
    for decay in (100.0, 1e6, 1e38):
        initial = torch.full((1, 1, 1), 1e30)
        _, final = selective_scan(
            one * 0, one * 5, -torch.full((1, 1), decay), one, one, initial=initial, backend="cpu"
        )
        assert float(final) == 0.0


def test_no_decay_keeps_the_state() -> None:
    zero = torch.zeros(1, 5000, 1)
    initial = torch.tensor([[[0.7]]])
    _, final = selective_scan(zero, zero - 100, -torch.ones(1, 1), zero, zero, initial=initial, backend="cpu")
    assert torch.equal(final, initial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs = make(2, 40, 24, 4)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype)
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    y, final = scan("cpu", ORDER)(*leaves)
    assert y.dtype == dtype and final.dtype == torch.float32
    exact = selective_scan(**{k: v.double() for k, v in inputs.items()})
    assert relative_rms(y.detach(), exact[0]) < torch.finfo(dtype).eps
    assert relative_rms(final.detach(), exact[1]) <= ERROR_BOUND
    gradients = torch.autograd.grad([y.float().sum(), final.sum()], leaves)
    assert [g.dtype for g in gradients] == [v.dtype for v in leaves]
    _, reference_final = scan("reference", ORDER)(*leaves)
    assert reference_final.dtype == torch.float32


@settings(max_examples=5)
@given(st.integers(0, 2**31))
def test_long_sequences_stay_accurate(seed: int) -> None:
    torch.manual_seed(seed)
    inputs = make(1, 1500, 3, 4)
    assert_matches(scan("cpu", ORDER), scan("reference", ORDER), list(inputs.values()), ERROR_BOUND)
