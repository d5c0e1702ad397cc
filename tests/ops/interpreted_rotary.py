"""The Triton kernel of `rotary` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import mpmath
import pytest
import torch

from milonga.ops.rotary import ANGLE_BOUND, ERROR_BOUND, rotary_reference, triton
from tests.ops.helpers import assert_matches, relative_rms
from tests.ops.interpreter import prepare
from tests.ops.test_rotary import ROUNDING

prepare()


class Turn(torch.autograd.Function):
    """The kernel as the operator ties it together on a GPU."""

    @staticmethod
    def forward(ctx, x, positions, base):
        ctx.save_for_backward(positions)
        ctx.base = base
        return triton.rotate(x, positions, base, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return triton.rotate(grad, *ctx.saved_tensors, ctx.base, -1.0), None, None


SHAPES = [
    (2, 0, 3, 8),
    (1, 5, 0, 8),
    (2, 3, 2, 0),
    (1, 4, 1, 2),
    (2, 5, 3, 8),
    (2, 2, 24, 128),
    (1, 2, 70, 6),
    (1, 1, 5, 96),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "base"), [(0, 10000.0), (10**6, 500.0), (2**31, 1e6)])
@pytest.mark.parametrize("shared", [False, True])
def test_matches_reference(shape: tuple[int, ...], start: int, base: float, shared: bool) -> None:
    positions = start + torch.randint(0, 200, shape[1:2] if shared else shape[:2])
    assert_matches(
        lambda x: [Turn.apply(x, positions, base)],
        lambda x: [rotary_reference(x, positions, base)],
        [torch.randn(shape)],
        ERROR_BOUND,
    )


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_angles_at_two_to_the_31(base: float) -> None:
    positions = torch.tensor([0, 1, 65535, 2**31 - 1, 2**31, 2**31 - 777, 2**32 + 5])
    width = 16
    x = torch.zeros(1, len(positions), 1, width)
    x[..., : width // 2] = 1.0
    y = triton.rotate(x, positions, base, 1.0)[0, :, 0]
    with mpmath.workdps(50):
        for row, position in enumerate(positions.tolist()):
            for i in range(width // 2):
                angle = position * mpmath.power(mpmath.mpf(base), mpmath.mpf(-2 * i) / width)
                assert abs(float(y[row, i]) - float(mpmath.cos(angle))) <= ANGLE_BOUND / 4 + ROUNDING
                assert abs(float(y[row, i + width // 2]) - float(mpmath.sin(angle))) <= ANGLE_BOUND / 4 + ROUNDING


def test_queries_and_keys_in_one_call_and_any_split() -> None:
    fused = torch.randn(2, 9, 8 * 16)
    x = fused[..., : 6 * 16].unflatten(-1, (6, 16))
    positions = torch.stack([torch.arange(9), torch.arange(1000, 1009)])
    whole = triton.rotate(x, positions, 10000.0, 1.0)
    assert whole.is_contiguous()
    assert torch.equal(whole[:, :, :4], triton.rotate(x[:, :, :4].contiguous(), positions, 10000.0, 1.0))
    pieces = [triton.rotate(x[:, a:b], positions[:, a:b], 10000.0, 1.0) for a, b in ((0, 4), (4, 5), (5, 5), (5, 9))]
    assert torch.equal(whole, torch.cat(pieces, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, positions = torch.randn(2, 5, 2, 8).to(dtype), torch.arange(5)
    y = triton.rotate(x, positions, 10000.0, 1.0)
    assert y.dtype == dtype
    assert (
        relative_rms(y, rotary_reference(x.double(), positions, 10000.0)) <= torch.finfo(dtype).eps
    )  # the interpreter cuts bits off


def test_nan_comes_out() -> None:
    x = torch.randn(2, 5, 2, 8)
    x[1, 3, 0, 2] = float("nan")
    y = triton.rotate(x, torch.arange(5), 10000.0, 1.0)
    assert y[1, 3, 0, [2, 6]].isnan().all() and int(y.isnan().sum()) == 2
