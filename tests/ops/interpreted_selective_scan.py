"""The Triton kernels of `selective_scan` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.selective_scan import ERROR_BOUND, selective_scan, triton
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, assert_strides_change_nothing, relative_rms, spread
from tests.ops.interpreter import prepare
from tests.ops.test_selective_scan import OPTIONAL, ORDER, make

prepare()


def gated_again(inputs: dict[str, Tensor], segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """y of the forward and of the backward pass."""
    *tensors, initial = (inputs.get(name) for name in ORDER)
    offsets = None if segments is None else segments.offsets
    y, _, kept = triton.forward(*tensors, initial, offsets, True)
    *gradients, again = triton.backward(torch.randn_like(y), None, *tensors, initial is not None, offsets, kept, True)
    *others, empty = triton.backward(torch.randn_like(y), None, *tensors, initial is not None, offsets, kept)
    assert [g.shape for g in gradients] == [g.shape for g in others]
    assert empty.shape == (0,)
    assert again.dtype == empty.dtype == y.dtype
    return y, again


class Interpreted(torch.autograd.Function):
    """The two kernels as the operator ties them together on a GPU."""

    @staticmethod
    def forward(ctx, offsets, *inputs):
        y, final, kept = triton.forward(*inputs, offsets, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, offsets, kept)
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        *inputs, initial, offsets, kept = ctx.saved_tensors
        gradients = triton.backward(grad_y, grad_final, *inputs, initial is not None, offsets, kept)[:-1]
        present = [value is not None for value in (*inputs, initial)]
        return None, *(g if there else None for g, there in zip(gradients, present, strict=True))


def scan(names: tuple[str, ...], segments: Segments | None = None):
    def run(*tensors: Tensor):
        values = dict(zip(names, tensors, strict=True))
        offsets = None if segments is None else segments.offsets
        return Interpreted.apply(offsets, *(values.get(name) for name in ORDER))

    return run


def reference(names: tuple[str, ...], segments: Segments | None = None):
    def run(*tensors: Tensor):
        return selective_scan(**dict(zip(names, tensors, strict=True)), segments=segments, backend="reference")

    return run


def check(inputs: dict[str, Tensor], segments: Segments | None = None) -> None:
    names = tuple(inputs)
    assert_matches(scan(names, segments), reference(names, segments), list(inputs.values()), ERROR_BOUND)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 32 steps wherever there is more than one."""
    monkeypatch.setattr(triton, "SHORTEST", 32)


SHAPES = [(1, 0, 5, 2), (2, 1, 33, 4), (1, 35, 37, 3), (1, 7, 5, 1), (1, 33, 18, 16), (1, 3, 17, 32), (1, 3, 3, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    check(make(*shape))


@pytest.mark.parametrize("absent", [*((name,) for name in OPTIONAL), OPTIONAL])
def test_options_may_be_absent(absent: tuple[str, ...]) -> None:
    check({name: value for name, value in make(2, 5, 6, 4).items() if name not in absent})


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("absent", [(), ("initial", "z")])
def test_chunks_of_time(absent: tuple[str, ...]) -> None:
    check({name: value for name, value in make(1, 70, 20, 4).items() if name not in absent})


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 3, 0, 33, 1, 0)])
def test_packed(lengths: tuple[int, ...]) -> None:
    segments = Segments.from_lengths(lengths)
    check(make(1, segments.total, 20, 4, segments.count), segments)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("lengths", [(0, 65, 0, 33, 1, 0)])
def test_packed_in_chunks(lengths: tuple[int, ...]) -> None:
    segments = Segments.from_lengths(lengths)
    check(make(1, segments.total, 20, 4, segments.count), segments)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("absent", [(), ("initial", "z")])
@pytest.mark.parametrize("lengths", [None, (0, 35, 0, 1)])
def test_output_from_the_backward_pass(absent: tuple[str, ...], lengths: tuple[int, ...] | None) -> None:
    segments = None if lengths is None else Segments.from_lengths(lengths)
    inputs = make(2, 35, 20, 3) if segments is None else make(1, segments.total, 20, 3, segments.count)
    y, again = gated_again({name: value for name, value in inputs.items() if name not in absent}, segments)
    assert relative_rms(again, y) <= ERROR_BOUND


@pytest.mark.usefixtures("short_chunks")
def test_split_law() -> None:
    inputs = make(1, 50, 20, 4)
    tensors = [inputs[name] for name in ORDER]
    y, final, kept = triton.forward(*tensors, None, False)
    assert kept.numel() == 0
    state, pieces = inputs["initial"], []
    for start, stop in pairwise([0, 0, 33, 50]):
        piece = {name: inputs[name][:, start:stop] for name in ("x", "dt", "B", "C", "z")}
        values = {**inputs, **piece, "initial": state}
        out, state, _ = triton.forward(*(values[name] for name in ORDER), None, False)
        pieces.append(out)
    assert relative_rms(torch.cat(pieces, 1), y) <= ERROR_BOUND
    assert relative_rms(state, final) <= ERROR_BOUND


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used: int) -> None:
    inputs = make(2, 9, 20, 4)
    results = []
    for run, kind in ((scan(ORDER), torch.float32), (reference(ORDER), torch.float64)):
        leaves = [value.to(kind).requires_grad_() for value in inputs.values()]
        results.append(torch.autograd.grad(run(*leaves)[used].sum(), leaves, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*results, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND


def test_halves_of_a_projection_need_no_copy() -> None:
    inputs = make(2, 5, 20, 4)
    projected = torch.cat([inputs["x"], inputs["z"]], -1)
    x, z = projected.chunk(2, -1)
    assert triton._rows(x, 20)[0] is x
    plain = triton.forward(*(inputs[name] for name in ORDER), None, False)
    strided = triton.forward(*({**inputs, "x": x, "z": z}[name] for name in ORDER), None, False)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("states", [4, 16])
def test_strides_change_nothing(states: int) -> None:
    inputs = make(2, 9, 20, states)
    assert_strides_change_nothing(scan(ORDER), [inputs[name] for name in ORDER])
    few = triton.forward(*(inputs[name] for name in ORDER), None, False)
    assert inputs["x"].shape[1] > triton.FEW
    plain, strided = (
        triton._steps(*(turned(inputs[name]) for name in ORDER), None) for turned in (torch.clone, spread)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert all(relative_rms(a, b) <= ERROR_BOUND for a, b in zip(plain[:2], few[:2], strict=True))


@pytest.mark.parametrize("name", ORDER)
def test_nan_comes_out_and_stays_in_its_row(name: str) -> None:
    inputs = make(2, 6, 20, 4)
    index = {"A": (7, 1), "D": (7,), "dt_bias": (7,), "initial": (1, 7, 1), "B": (1, 5, 1), "C": (1, 5, 1)}
    inputs[name][index.get(name, (1, 5, 7))] = float("nan")
    y, final, _ = triton.forward(*(inputs[name] for name in ORDER), None, False)
    expected_y, expected_final = selective_scan(**inputs, backend="reference")
    assert expected_y.isnan().any()
    assert torch.equal(y.isnan(), expected_y.isnan())
    assert torch.equal(final.isnan(), expected_final.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs = make(2, 6, 24, 4)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype)
    leaves = [value.requires_grad_() for value in inputs.values()]
    y, final = scan(ORDER)(*leaves)
    exact = selective_scan(**{k: v.detach().double() for k, v in inputs.items()})
    assert y.dtype == dtype
    assert relative_rms(y.detach(), exact[0]) < torch.finfo(dtype).eps
    assert relative_rms(final.detach(), exact[1]) <= ERROR_BOUND
    gradients = torch.autograd.grad([y.float().sum(), final.sum()], leaves)
    assert [g.dtype for g in gradients] == [v.dtype for v in leaves]
