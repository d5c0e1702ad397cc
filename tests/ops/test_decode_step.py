"""The products and the recurrence of a decoded step: what goes in is checked, and the definitions take it."""

import pytest
import torch
from torch import Tensor

from milonga.ops.decode_step import (
    ERROR_BOUND,
    MambaWeights,
    Norm,
    linear_step,
    mamba_step_,
    swiglu_step,
)
from tests.ops.helpers import relative_rms

NORM = Norm(torch.rand(6) + 0.5, None, 1e-5)


def weights(**changes: Tensor) -> MambaWeights:
    """Of a layer with D 6, E 8, N 3, R 2, W 4."""
    shapes = {"in_proj": (16, 6), "conv_weight": (8, 4), "conv_bias": (8,), "x_proj": (8, 8), "dt_proj": (8, 2)}
    shapes |= {"A_log": (8, 3), "D": (8,), "dt_bias": (8,), "out_proj": (6, 8)}
    return MambaWeights(**({name: torch.randn(shape) for name, shape in shapes.items()} | changes))


def test_steps_are_their_formulas() -> None:
    x, weight, residual = torch.randn(3, 6), torch.randn(5, 6), torch.randn(3, 5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * NORM.weight
    got = linear_step(x, weight, norm=NORM, residual=residual)
    assert relative_rms(got, exact @ weight.double().t() + residual) <= ERROR_BOUND
    gate_up, down = torch.randn(8, 6), torch.randn(6, 4)
    gate, up = (exact @ gate_up.double().t()).chunk(2, -1)
    expected = x + (gate * gate.sigmoid() * up) @ down.double().t()
    assert relative_rms(swiglu_step(x, NORM, gate_up, down), expected) <= ERROR_BOUND


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(6)}, r"x must be \[B, 6\].* got \[6\]"),
        ({"x": torch.ones(3, 6, dtype=torch.int64)}, "x must be float32, .* got int64"),
        ({"x": torch.randn(6, 3).t()}, r"x must be contiguous, got strides \[1, 3\]"),
        ({"weight": torch.randn(5, 6).double()}, "weight must be float32, got float64"),
        ({"weight": torch.randn(5, 6, device="meta")}, "weight must be on cpu as x is, got meta"),
        ({"weight": torch.randn(6, 5).t()}, "weight must be contiguous"),
        ({"weight": torch.randn(6)}, r"weight must be \[F D\], expected \[6, 6\], got \[6\]"),
        ({"norm": Norm(torch.ones(5), None, 1e-5)}, r"norm.weight must be \[D\], expected \[6\], got \[5\]"),
        ({"norm": Norm(torch.ones(6), torch.ones(6).half(), 1e-5)}, "norm.bias must be float32, got float16"),
        ({"residual": torch.randn(3, 6)}, r"residual must be \[B F\], expected \[3, 5\], got \[3, 6\]"),
        ({"residual": torch.randn(5, 3).t()}, "residual must be contiguous"),
    ],
)
def test_bad_input_of_linear_step_is_named(changes: dict, message: str) -> None:
    arguments = {"x": torch.randn(3, 6), "weight": torch.randn(5, 6), "norm": NORM, "residual": torch.randn(3, 5)}
    linear_step(**arguments)
    with pytest.raises(ValueError, match=f"decode_step: {message}"):
        linear_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_up": torch.randn(7, 6)}, r"gate_up must be \[2H D\], expected \[8, 6\], got \[7, 6\]"),
        ({"gate_up": torch.randn(8, 6).bfloat16()}, "gate_up must be float32, got bfloat16"),
        ({"down": torch.randn(6, 4, device="meta")}, "down must be on cpu as x is, got meta"),
        ({"down": torch.randn(4, 6).t()}, "down must be contiguous"),
        ({"norm": Norm(torch.ones(6).double(), None, 1e-5)}, "norm.weight must be float32, got float64"),
    ],
)
def test_bad_input_of_swiglu_step_is_named(changes: dict, message: str) -> None:
    arguments = {"x": torch.randn(3, 6), "norm": NORM, "gate_up": torch.randn(8, 6), "down": torch.randn(6, 4)}
    swiglu_step(**arguments)
    with pytest.raises(ValueError, match=f"decode_step: {message}"):
        swiglu_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": weights(in_proj=torch.randn(15, 6))}, r"in_proj must be \[2E D\], expected \[16, 6\]"),
        ({"weights": weights(in_proj=torch.randn(16, 6).half())}, "in_proj must be float32, got float16"),
        ({"weights": weights(x_proj=torch.randn(8, 8).t())}, "x_proj must be contiguous"),
        ({"weights": weights(dt_proj=torch.randn(8, 2).double())}, "dt_proj must be float32, got float64"),
        ({"weights": weights(A_log=torch.randn(8, 3).half())}, "A_log must be float32, got float16"),
        ({"weights": weights(D=torch.randn(7))}, r"D must be \[E\], expected \[8\], got \[7\]"),
        ({"weights": weights(out_proj=torch.randn(6, 8, device="meta"))}, "out_proj must be on cpu as x is, got meta"),
        ({"conv": torch.randn(2, 4, 8)}, r"conv must be \[B W-1 E\], expected \[2, 3, 8\], got \[2, 4, 8\]"),
        ({"conv": torch.randn(2, 3, 8).half()}, "conv must be float32, got float16"),
        ({"ssm": torch.randn(2, 3, 8).mT}, "ssm must be contiguous"),
        ({"ssm": torch.randn(2, 8, 3).half()}, "ssm must be float32, got float16"),
    ],
)
def test_bad_input_of_mamba_step_is_named_and_leaves_the_state(changes: dict, message: str) -> None:
    arguments = {"x": torch.randn(2, 6), "norm": NORM, "weights": weights()}
    arguments |= {"conv": torch.randn(2, 3, 8), "ssm": torch.randn(2, 8, 3)}
    mamba_step_(**arguments)
    arguments |= changes
    before = arguments["ssm"].clone()
    with pytest.raises(ValueError, match=f"decode_step: {message}"):
        mamba_step_(**arguments)
    assert torch.equal(arguments["ssm"], before)
