"""The Triton kernels of `causal_conv` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.causal_conv import ERROR_BOUND, causal_conv, triton
from milonga.ops.gpu.triton_parts import rows, slots_of
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, assert_strides_change_nothing, relative_rms
from tests.ops.interpreter import prepare
from tests.ops.test_causal_conv import ORDER, make

prepare()
# what the kernels compute where exp(-v) is infinite is right
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


class Interpreted(torch.autograd.Function):
    """The kernels as the operator ties them together on a GPU."""

    @staticmethod
    def forward(ctx, offsets, silu, *inputs):
        ctx.set_materialize_grads(False)
        ctx.silu = silu
        ctx.save_for_backward(*inputs, offsets)
        return triton.forward(*inputs, offsets, silu)

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        *inputs, offsets = ctx.saved_tensors
        gradients = triton.backward(grad_y, grad_final, *inputs, offsets, ctx.silu)
        return None, None, *(g if v is not None else None for g, v in zip(gradients, inputs, strict=True))


def conv(names: tuple[str, ...], activation: str | None = "silu", segments: Segments | None = None):
    def run(*tensors: Tensor):
        values = dict(zip(names, tensors, strict=True))
        offsets = None if segments is None else segments.offsets
        return Interpreted.apply(offsets, activation == "silu", *(values.get(name) for name in ORDER))

    return run


def reference(names: tuple[str, ...], activation: str | None = "silu", segments: Segments | None = None):
    def run(*tensors: Tensor):
        values = dict(zip(names, tensors, strict=True))
        return causal_conv(**values, activation=activation, segments=segments, backend="reference")

    return run


def check(inputs: dict[str, Tensor], activation: str | None = "silu", segments: Segments | None = None) -> None:
    names = tuple(inputs)
    options = (names, activation, segments)
    assert_matches(conv(*options), reference(*options), list(inputs.values()), ERROR_BOUND)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 6 rows forward, and for W = 4 of 6 rows backward: three rows at a turn."""
    for name, value in {"_AHEAD": 3, "_TURNS": 2, "_AHEAD_BACKWARD": 3, "_TURNS_BACKWARD": 3, "_MOST_TURNS": 3}.items():
        monkeypatch.setattr(triton, name, value)
    triton._backward_length.cache_clear()


SHAPES = [(1, 0, 5, 4), (2, 1, 33, 4), (1, 14, 140, 4), (1, 7, 7, 1), (1, 13, 18, 2), (1, 12, 3, 3), (2, 9, 17, 8)]


def test_strides_change_nothing() -> None:
    inputs = make(2, 14, 40, 4)
    assert_strides_change_nothing(conv(tuple(inputs)), list(inputs.values()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", None])
def test_matches_reference(shape: tuple[int, ...], activation: str | None) -> None:
    check(make(*shape), activation)


@pytest.mark.parametrize("absent", [("bias",), ("initial",), ("bias", "initial")])
def test_options_may_be_absent(absent: tuple[str, ...]) -> None:
    check({name: value for name, value in make(2, 9, 6, 4).items() if name not in absent})


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 3, 0, 14, 1, 0)])
@pytest.mark.parametrize("initial", [False, True])
def test_packed(lengths: tuple[int, ...], initial: bool) -> None:
    segments = Segments.from_lengths(lengths)
    inputs = make(1, segments.total, 20, 4, segments.count)
    check(inputs if initial else {k: v for k, v in inputs.items() if k != "initial"}, "silu", segments)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used: int) -> None:
    inputs = make(2, 9, 20, 4)
    results = []
    for run, kind in ((conv(ORDER), torch.float32), (reference(ORDER), torch.float64)):
        leaves = [value.to(kind).requires_grad_() for value in inputs.values()]
        results.append(torch.autograd.grad(run(*leaves)[used].sum(), leaves, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*results, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND


def gradients(run, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    y, final = run(*leaves)
    return list(torch.autograd.grad(y.sum() + final.sum(), leaves))


def test_nan_in_the_state_of_an_empty_sequence_reaches_no_other_gradient() -> None:
    inputs, segments = make(1, 5, 20, 4, 3), Segments([0, 3, 3, 5])
    inputs["initial"][1, 1] = math.nan
    options = (tuple(inputs), "silu", segments)
    for got, expected in zip(gradients(conv(*options), inputs), gradients(reference(*options), inputs), strict=True):
        assert bool(expected.isfinite().all())
        assert bool(got.isfinite().all())


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_no_gradient_from_behind_the_end_of_a_sequence() -> None:
    """Sums that would overflow there, since the end's rows meet other taps, count for nothing."""
    inputs = make(1, 4, 20, 4)
    inputs["x"][0, 3], inputs["weight"][:, 0], inputs["weight"][:, 3] = -1e38, 10.0, 0.1
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(conv(tuple(inputs)), inputs))


def test_chunks_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    triton._backward_length.cache_clear()
    check(make(1, 70, 20, 4))


def test_the_last_wave_of_the_backward_pass_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for batch, time, blocks in ((8, 4096, 24), (1, 4096, 36), (1, 131072, 36), (1, 1, 24)):
        for held, wave in ((True, triton._WAVE), (False, triton._WAVE_UNHELD)):
            length = triton._backward_length.__wrapped__(batch, time, batch, False, blocks, 4, held)
            assert (length + 3) % triton._AHEAD_BACKWARD == 0
            waves = slots_of(batch, time, batch, False, length) * blocks / wave
            assert waves < 1 or waves / math.ceil(waves) > 0.95


def test_any_split_gives_the_same_bits() -> None:
    inputs = make(1, 16, 20, 4)
    x, weight, bias, state = inputs.values()
    y, final = triton.forward(x, weight, bias, state, None, True)
    pieces = []
    for start, stop in pairwise([0, 0, 1, 3, 12, 16]):
        out, state = triton.forward(x[:, start:stop], weight, bias, state, None, True)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 1), y) and torch.equal(state, final)


def test_half_of_a_projection_needs_no_copy() -> None:
    projected, weight, grad = torch.randn(2, 8, 40), torch.randn(20, 4), torch.randn(2, 8, 40)
    x, upstream = projected.chunk(2, -1)[0], grad.chunk(2, -1)[1]
    assert rows(x, 20)[0] is x
    y, final = triton.forward(x, weight, None, None, None, True)
    expected = triton.forward(x.contiguous(), weight, None, None, None, True)
    assert torch.equal(y, expected[0]) and torch.equal(final, expected[1])
    got = triton.backward(upstream, None, x, weight, None, None, None, True)
    dense = triton.backward(upstream.contiguous(), None, x.contiguous(), weight, None, None, None, True)
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_extreme_values() -> None:
    x = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]).view(1, 7, 1)
    weight = torch.ones(1, 1)
    y, _ = triton.forward(x, weight, None, None, None, True)
    expected = torch.tensor([0.0, 0.0, -5e-37, 0.0, 88.0, 200.0, 1e30])
    torch.testing.assert_close(y.flatten(), expected, atol=1e-36, rtol=1e-6)
    slope = triton.backward(torch.ones_like(x), None, x, weight, None, None, None, True)[0]
    torch.testing.assert_close(
        slope.flatten(), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), atol=1e-30, rtol=1e-6
    )


@pytest.mark.parametrize("name", ORDER)
def test_nan_comes_out_and_stays_in_its_row(name: str) -> None:
    inputs = make(2, 12, 20, 4)
    inputs[name][{"x": (1, 7, 7), "weight": (7, 1), "bias": (7,), "initial": (1, 1, 7)}[name]] = float("nan")
    for run, kind in ((conv(ORDER), torch.float32), (reference(ORDER), torch.float64)):
        leaves = [value.to(kind).requires_grad_() for value in inputs.values()]
        outputs = run(*leaves)
        gradients = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), leaves)
        nan = [value.isnan() for value in (*outputs, *gradients)]
        assert nan[0].any()
        if kind == torch.float32:
            ours = nan
        else:
            assert all(torch.equal(a, b) for a, b in zip(ours, nan, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_low_precision(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    inputs = {
        name: value.to(dtype if name in ("x", "initial") else parameters or dtype).requires_grad_()
        for name, value in make(2, 6, 24, 4).items()
    }
    y, final = conv(ORDER)(*inputs.values())
    exact = causal_conv(**{k: v.detach().double() for k, v in inputs.items()})
    assert y.dtype == final.dtype == dtype
    assert relative_rms(y.detach(), exact[0]) < torch.finfo(dtype).eps
    assert torch.equal(final.double(), exact[1])
    gradients = torch.autograd.grad([y.float().sum(), final.float().sum()], list(inputs.values()))
    assert [g.dtype for g in gradients] == [v.dtype for v in inputs.values()]
