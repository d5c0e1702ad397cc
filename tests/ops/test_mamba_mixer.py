"""`mamba_mixer`: the ops that it stands for, in values to the last bit, and in every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from milonga.layers import MambaConfig
from milonga.layers.recompute import forgetting
from milonga.ops.causal_conv import causal_conv
from milonga.ops.linear import linear
from milonga.ops.mamba_mixer import ERROR_BOUND, Mixed, mamba_mixer, takes
from milonga.ops.selective_scan import selective_scan
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, assert_only_the_gradients_asked_for, outputs_and_gradients, relative_rms

NAMES = (
    "x", "in_weight", "conv_weight", "conv_bias", "x_weight", "dt_weight", "A", "out_weight", "D", "dt_bias",
    "conv_initial", "initial",
)  # fmt: skip
PRODUCTS = ("in_weight", "x_weight", "dt_weight", "out_weight")


def make(
    batch: int, time: int, features: int, width: int, states: int, rank: int, sequences: int | None = None
) -> dict[str, Tensor]:
    """Every input, scaled as a model has them: products of the size of their inputs."""
    sequences = batch if sequences is None else sequences
    return {
        "x": torch.randn(batch, time, features),
        "in_weight": torch.randn(2 * width, features) / features**0.5,
        "conv_weight": torch.randn(width, 4) / 2,
        "conv_bias": torch.randn(width) / 2,
        "x_weight": torch.randn(rank + 2 * states, width) / width**0.5,
        "dt_weight": torch.randn(width, rank) / rank**0.5,
        "A": -torch.rand(width, states) * 2 - 0.01,
        "out_weight": torch.randn(features, width) / width**0.5,
        "D": torch.randn(width),
        "dt_bias": torch.randn(width) - 1,
        "conv_initial": torch.randn(sequences, 3, width),
        "initial": torch.randn(sequences, width, states),
    }


def one_by_one(
    x: Tensor,
    in_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_initial: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    segments: Segments | None = None,
    backend: str = "auto",
) -> Mixed:
    """The definition."""
    columns, z = linear(x, in_weight).chunk(2, -1)
    u, conv_final = causal_conv(
        columns, conv_weight, conv_bias, initial=conv_initial, segments=segments, backend=backend
    )
    low, B, C = linear(u, x_weight).split((dt_weight.shape[1], A.shape[1], A.shape[1]), -1)
    dt = linear(low, dt_weight)
    y, final = selective_scan(
        u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial=initial, segments=segments, backend=backend
    )
    return Mixed(linear(y, out_weight), columns, conv_final, u, final, dt, B)


def mixed(*tensors: Tensor, segments: Segments | None = None) -> Mixed:
    """The op where it applies, else (in float64) its definition by the reference."""
    if tensors[0].dtype == torch.float64:
        return one_by_one(*tensors, segments=segments, backend="reference")
    named = dict(zip(NAMES, tensors, strict=False))
    return mamba_mixer(**named, segments=segments)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Segments | None]:
    """With or without states before, rectangular or packed with empty sequences."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(st.sampled_from(numbers)) for numbers in ([1, 9], [1, 5, 16, 70], [1, 3, 16], [1, 4])]
    segments = None
    if draw(st.booleans()):
        segments = Segments.from_lengths(draw(st.lists(st.sampled_from([0, 0, 1, 2, 31, 33]), min_size=1, max_size=4)))
        inputs = make(1, segments.total, *sizes, segments.count)
    else:
        inputs = make(draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 31, 33, 64])), *sizes)
    return list(inputs.values())[: draw(st.sampled_from([10, 12]))], segments


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([3, 16]), st.sampled_from([10, 12]))
@settings(max_examples=20)
def test_matches_float64(seed: int, packed: bool, states: int, count: int) -> None:
    """Sizes at which a bound on sums means something: of few numbers, they may cancel."""
    torch.manual_seed(seed)
    segments = Segments.from_lengths([33, 0, 31]) if packed else None
    sizes = (17, 70, states, 4)
    inputs = list((make(1, 64, *sizes, 3) if packed else make(2, 45, *sizes)).values())[:count]

    def run(*tensors: Tensor) -> Mixed:
        return mixed(*tensors, segments=segments)

    assert_matches(run, run, inputs, ERROR_BOUND)


@given(cases())
@settings(max_examples=25)
def test_values_are_those_of_the_ops_to_the_last_bit(case: tuple[list[Tensor], Segments | None]) -> None:
    inputs, segments = case
    leaves = [value.requires_grad_() for value in inputs]
    got, expected = mixed(*leaves, segments=segments), one_by_one(*leaves, segments=segments)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("output", Mixed._fields)
def test_each_output_alone_has_gradients(output: str) -> None:
    """One of them may be all that a loss depends on."""
    torch.manual_seed(1)
    inputs = list(make(2, 20, 6, 18, 3, 4).values())

    def one(*tensors: Tensor) -> list[Tensor]:
        return [mixed(*tensors)[Mixed._fields.index(output)]]

    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(2)
        found.append(outputs_and_gradients(one, [value.to(dtype) for value in inputs])[2])
    for name, exact, got in zip(NAMES, *found, strict=True):
        assert relative_rms(got, exact) <= ERROR_BOUND, name


def test_only_the_gradients_asked_for() -> None:
    inputs = make(2, 20, 6, 18, 3, 4)
    assert_only_the_gradients_asked_for(mamba_mixer, inputs)


@pytest.mark.parametrize("recast", [False, True])
def test_half_precision_by_autocast(recast: bool) -> None:
    """Gradients of fp32 weights are at least as near to float64 as those of the ops one by one."""
    torch.manual_seed(0)
    inputs = make(2, 70, 24, 48, 16, 8)
    found = []
    for run, dtype in ((one_by_one, torch.float64), (one_by_one, torch.float32), (mamba_mixer, torch.float32)):
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in inputs.items()}
        more = {"recast": recast} if run is mamba_mixer else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            given_ = leaves
            if run is one_by_one and dtype == torch.float32:  # states before come in the dtype of what they go on
                given_ = {**leaves, "conv_initial": leaves["conv_initial"].bfloat16()}
            out = run(**given_, **more).out
        assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        torch.manual_seed(3)
        out.backward(torch.randn(out.shape).to(out.dtype))
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    exact, usual, got = found
    for name in NAMES:
        bound = 1.1 * relative_rms(usual[name], exact[name]) + 1e-5
        assert relative_rms(got[name], exact[name]) <= bound, name
        assert got[name].dtype == torch.float32


def test_it_is_not_for_float64_nor_without_gradients() -> None:
    x = torch.zeros(1, 2, 3)
    assert takes(x) and not takes(x.double())
    with torch.no_grad():
        assert not takes(x)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_nothing(packed: bool) -> None:
    """No step at all, or sequences that are all empty: parameters get zeros, and states what goes through them."""
    segments = Segments.from_lengths([0, 0]) if packed else None
    made = make(1 if packed else 2, 0, 6, 18, 3, 4, 2)
    leaves = {name: value.requires_grad_() for name, value in made.items()}
    found = mamba_mixer(**leaves, segments=segments)
    gradients = torch.autograd.grad(sum(out.square().sum() for out in found), list(leaves.values()))
    for name, leaf, got in zip(NAMES, leaves.values(), gradients, strict=True):
        assert torch.equal(got, 2 * leaf if name in ("conv_initial", "initial") else torch.zeros_like(leaf)), name


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("x", (20, 6), "x must be"),
        ("in_weight", (35, 6), r"in_weight must be \[2E D\], expected \[36, 6\]"),
        ("conv_weight", (17, 4), "conv_weight must be"),
        ("conv_weight", (18,), "conv_weight must be"),
        ("conv_bias", (17,), "conv_bias must be"),
        ("x_weight", (10, 17), "x_weight must be"),
        ("dt_weight", (17, 4), "dt_weight must be"),
        ("A", (18, 0), "A must be"),
        ("out_weight", (7, 18), "out_weight must be"),
        ("D", (17,), "D must be"),
        ("dt_bias", (1,), "dt_bias must be"),
        ("conv_initial", (1, 3, 18), r"conv_initial must be \[S W-1 E\], expected \[2, 3, 18\]"),
        ("initial", (1, 18, 3), r"initial must be \[S E N\], expected \[2, 18, 3\]"),
    ],
)
def test_what_does_not_fit(name: str, shape: tuple[int, ...], expected: str) -> None:
    """Kernels would read beyond a state of fewer rows."""
    inputs = make(2, 20, 6, 18, 3, 4) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"mamba_mixer: {expected}"):
        mamba_mixer(**inputs)


def test_dtypes_and_packing_that_do_not_fit() -> None:
    inputs = make(2, 20, 6, 18, 3, 4)
    for name in ("A", "D", "dt_bias", "initial", "conv_weight"):
        with pytest.raises(ValueError, match=f"{name} must be .*float32, got float64"):
            mamba_mixer(**inputs | {name: inputs[name].double()})
    with pytest.raises(ValueError, match="packed as"):
        mamba_mixer(**inputs, segments=Segments([0, 20]))


@pytest.mark.parametrize(
    ("dtype", "device", "got"),
    [
        (torch.float64, "cpu", "float64, a Tensor on cpu, gradients on"),
        (torch.int64, "cpu", "int64, a Tensor on cpu, gradients on"),
        (torch.complex64, "cpu", "complex64, a Tensor on cpu, gradients on"),
        (torch.float32, "meta", "float32, a Tensor on meta, gradients on"),
    ],
)
def test_an_x_that_has_no_kernel(dtype: torch.dtype, device: str, got: str) -> None:
    inputs = make(2, 20, 6, 18, 3, 4)
    with pytest.raises(ValueError, match=f"mamba_mixer: x must be float32, bfloat16 or float16, .*, got {got}"):
        mamba_mixer(**inputs | {"x": inputs["x"].to(device, dtype)})


def test_no_gradients_or_no_floats() -> None:
    inputs = make(2, 20, 6, 18, 3, 4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"mamba_mixer: x must be .* gradients off and not compiled"):
        mamba_mixer(**inputs)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"x must be float32, .* got int64"):
        mamba_mixer(**inputs | {"x": inputs["x"].long()})


def test_fake_tensors_go_through_the_ops() -> None:
    """Sizes of a step can be asked for without its memory."""
    with FakeTensorMode(), forgetting(("conv", "scan")):
        y, trace = MambaConfig(d_state=4).build(16).advance(torch.randn(2, 9, 16), None)
        assert y.shape == (2, 9, 16) and y.requires_grad and trace.final.ssm.shape == (2, 32, 4)


def test_gradients_of_gradients_are_refused() -> None:
    leaves = {name: value.requires_grad_() for name, value in make(1, 5, 3, 4, 2, 2).items()}
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(mamba_mixer(**leaves).out.sum(), leaves["x"], create_graph=True)


def test_the_layer_takes_it_where_nothing_is_kept() -> None:
    """Values to the last bit; gradients within rounding of those with everything kept."""
    torch.manual_seed(0)
    layer = MambaConfig(d_state=4).build(16).train()
    x = torch.randn(2, 37, 16)
    found = []
    for names in ((), ("conv", "scan"), ("conv", "scan", "dt", "cast")):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with forgetting(names):
            y, trace = layer.advance(leaf, None)
        (y.square().sum() + trace.final.ssm.square().sum()).backward()
        assert ("MambaMixer" in type(y.grad_fn).__name__) == bool(names)
        found.append((y.detach(), leaf.grad, [p.grad.clone() for p in layer.parameters()]))
    for y, grad, grads in found[1:]:
        assert torch.equal(y, found[0][0])
        for a, b in zip([grad, *grads], [found[0][1], *found[0][2]], strict=True):
            assert relative_rms(a, b) <= 2 * ERROR_BOUND
