"""The Triton kernels of `swiglu` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch

from milonga.ops.swiglu import ERROR_BOUND, swiglu_reference, triton
from tests.ops.helpers import assert_matches, relative_rms
from tests.ops.interpreter import prepare

prepare()
# what the kernels compute where exp(-v) is infinite is right
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


class Gate(torch.autograd.Function):
    """The kernels as the operator ties them together on a GPU."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return triton.forward(gate, up)

    @staticmethod
    def backward(ctx, grad):
        return triton.backward(grad, *ctx.saved_tensors)


class Fused(torch.autograd.Function):
    """The same from one projection."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        return triton.forward_fused(both)

    @staticmethod
    def backward(ctx, grad):
        return triton.backward_fused(grad, *ctx.saved_tensors)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1,), (7,), (3, 5, 70), (2, 1030), (130, 33)])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_matches_reference(shape: tuple[int, ...], size: float) -> None:
    gate, up = torch.randn(shape) * size, torch.randn(shape)
    assert_matches(lambda g, u: [Gate.apply(g, u)], lambda g, u: [swiglu_reference(g, u)], [gate, up], ERROR_BOUND)
    both = torch.cat([gate, up], -1)
    width = shape[-1]
    assert_matches(
        lambda v: [Fused.apply(v)], lambda v: [swiglu_reference(v[..., :width], v[..., width:])], [both], ERROR_BOUND
    )


def test_halves_of_a_projection_and_transposes() -> None:
    both, grad = torch.randn(3, 5, 64), torch.randn(5, 3, 32).transpose(0, 1)
    gate, up = both.chunk(2, -1)
    assert torch.equal(triton.forward(gate, up), triton.forward(gate.contiguous(), up.contiguous()))
    got = triton.backward(grad, gate, up)
    dense = triton.backward(grad.contiguous(), gate.contiguous(), up.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
    assert torch.equal(triton.backward_fused(grad, both), torch.cat(got, -1))


def test_extreme_gates() -> None:
    gate, up = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30]), torch.ones(8)
    expected = torch.tensor([0.0, 0.0, -5e-37, 0.0, 0.0, 88.0, 200.0, 1e30])
    torch.testing.assert_close(triton.forward(gate, up), expected, atol=1e-36, rtol=1e-6)
    slope = triton.backward(up, gate, up)[0]
    expected = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(slope, expected, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    gate, up = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype)
    y = triton.forward(gate, up)
    assert y.dtype == dtype
    assert (
        relative_rms(y, swiglu_reference(gate.double(), up.double())) <= torch.finfo(dtype).eps
    )  # the interpreter cuts bits off
    assert all(g.dtype == dtype for g in triton.backward(y, gate, up))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_comes_out(which: int) -> None:
    inputs = [torch.randn(2, 40), torch.randn(2, 40)]
    inputs[which][1, 17] = float("nan")
    y = triton.forward(*inputs)
    assert y[1, 17].isnan() and int(y.isnan().sum()) == 1
