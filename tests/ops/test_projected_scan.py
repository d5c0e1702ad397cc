"""`projected_scan`: the ops that it stands for, in values to the last bit, and in every gradient."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milonga.ops.linear import linear
from milonga.ops.projected_scan import ERROR_BOUND, Projected, projected_scan
from milonga.ops.selective_scan import selective_scan
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, assert_only_the_gradients_asked_for, outputs_and_gradients, relative_rms

NAMES = ("u", "z", "x_weight", "dt_weight", "A", "out_weight", "D", "dt_bias", "initial")
OPTIONAL = NAMES[6:]
WIDE = ("A", "D", "dt_bias", "initial")  # never below fp32


def make(
    batch: int, time: int, width: int, states: int, rank: int, features: int, sequences: int | None = None
) -> dict[str, Tensor]:
    """Every input, scaled as a model has them: products of the size of their inputs."""
    return {
        "u": torch.randn(batch, time, width),
        "z": torch.randn(batch, time, width),
        "x_weight": torch.randn(rank + 2 * states, width) / width**0.5,
        "dt_weight": torch.randn(width, rank) / rank**0.5,
        "A": -torch.rand(width, states) * 2 - 0.01,
        "out_weight": torch.randn(features, width) / width**0.5,
        "D": torch.randn(width),
        "dt_bias": torch.randn(width) - 1,
        "initial": torch.randn(batch if sequences is None else sequences, width, states),
    }


def one_by_one(
    u: Tensor,
    z: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    *,
    segments: Segments | None = None,
    backend: str = "auto",
    **optional: Tensor,
) -> Projected:
    """The definition."""
    low, B, C = linear(u, x_weight).split((dt_weight.shape[1], A.shape[1], A.shape[1]), -1)
    dt = linear(low, dt_weight)
    y, final = selective_scan(u, dt, A, B, C, z=z, segments=segments, backend=backend, **optional)
    return Projected(linear(y, out_weight), final, dt, B)


def of(
    op: Callable[..., Projected], names: tuple[str, ...], segments: Segments | None = None, backend: str = "auto"
) -> Callable[..., Projected]:
    """The op as a function of the tensors `names`, in this order."""

    def run(*tensors: Tensor) -> Projected:
        return op(**dict(zip(names, tensors, strict=True)), segments=segments, backend=backend)

    return run


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], Segments | None]:
    """Inputs with options present or absent, rectangular or packed with empty sequences."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(st.sampled_from(numbers)) for numbers in ([1, 5, 16, 70], [1, 3, 16], [1, 4], [1, 9])]
    if draw(st.booleans()):
        segments = Segments.from_lengths(draw(st.lists(st.sampled_from([0, 0, 1, 2, 31, 33]), max_size=4)))
        inputs = make(1, segments.total, *sizes, segments.count)
    else:
        segments = None
        inputs = make(draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 31, 33, 64])), *sizes)
    absent = draw(st.sets(st.sampled_from(OPTIONAL)))
    return {name: value for name, value in inputs.items() if name not in absent}, segments


@given(cases())
@settings(max_examples=40)
def test_matches_float64(case: tuple[dict[str, Tensor], Segments | None]) -> None:
    inputs, segments = case
    names = tuple(inputs)
    exact = of(one_by_one, names, segments, "reference")
    assert_matches(of(projected_scan, names, segments), exact, list(inputs.values()), ERROR_BOUND)


@given(cases())
@settings(max_examples=25)
def test_values_are_those_of_the_ops_to_the_last_bit(case: tuple[dict[str, Tensor], Segments | None]) -> None:
    inputs, segments = case
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    got, expected = projected_scan(**leaves, segments=segments), one_by_one(**leaves, segments=segments)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_matches_float64_at_a_width_of_a_model() -> None:
    inputs = make(2, 130, 1024, 16, 32, 512)
    names = tuple(inputs)
    exact = of(one_by_one, names, None, "reference")
    assert_matches(of(projected_scan, names), exact, list(inputs.values()), ERROR_BOUND)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_derivatives(packed: bool) -> None:
    """In float64, by differences: every input, through every output."""
    torch.manual_seed(0)
    segments = Segments.from_lengths([3, 0, 2]) if packed else None
    inputs = make(1, 5, 3, 2, 2, 2, 3) if packed else make(2, 3, 3, 2, 2, 2)
    leaves = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(of(projected_scan, tuple(inputs), segments), leaves)


@pytest.mark.parametrize("output", Projected._fields)
def test_each_output_alone_has_gradients(output: str) -> None:
    """One of them may be all that a loss depends on."""
    torch.manual_seed(1)
    inputs = make(2, 20, 18, 3, 4, 6)
    found = []
    for op, dtype in ((one_by_one, torch.float64), (projected_scan, torch.float64), (projected_scan, torch.float32)):

        def one(*tensors: Tensor, op: Callable[..., Projected] = op) -> list[Tensor]:
            return [of(op, tuple(inputs))(*tensors)[Projected._fields.index(output)]]

        torch.manual_seed(2)
        found.append(outputs_and_gradients(one, [value.to(dtype) for value in inputs.values()])[2])
    for name, exact, wide, narrow in zip(inputs, *found, strict=True):
        assert relative_rms(wide, exact) <= 1e-13, name
        assert relative_rms(narrow, exact) <= ERROR_BOUND, name


def test_only_the_gradients_asked_for() -> None:
    inputs = make(2, 20, 18, 3, 4, 6)
    assert_only_the_gradients_asked_for(projected_scan, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    """As near to float64 as the ops one by one, which round a gradient of u more: values the same bits."""
    torch.manual_seed(3)
    inputs = make(2, 70, 50, 16, 8, 20)
    narrow = {name: value if name in WIDE else value.to(dtype) for name, value in inputs.items()}
    upstream = [torch.randn_like(out) for out in one_by_one(**{k: v.double() for k, v in narrow.items()})[:2]]
    results = []
    for op, backend in ((one_by_one, "reference"), (one_by_one, "auto"), (projected_scan, "auto")):
        exact = backend == "reference"
        given_ = {k: v.double() if exact else inputs[k] if autocast else v for k, v in narrow.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in given_.items()}
        with torch.autocast("cpu", dtype, enabled=autocast and not exact):
            if op is one_by_one and autocast and not exact:
                leaves_in = {k: v if k in WIDE else v.to(dtype) for k, v in leaves.items()}
                outputs = op(**leaves_in, backend=backend)
            else:
                outputs = op(**leaves, backend=backend)
        graded = [g.to(o.dtype) for o, g in zip(outputs[:2], upstream, strict=True)]
        results.append((outputs, torch.autograd.grad(outputs[:2], list(leaves.values()), graded)))
    assert all(torch.equal(a, b) for a, b in zip(results[1][0], results[2][0], strict=True))
    assert results[2][0].out.dtype == dtype and results[2][0].final.dtype == torch.float32
    for name, exact, usual, got in zip(inputs, *(gradients for _, gradients in results), strict=True):
        bound = 1.05 * relative_rms(usual, exact) + ERROR_BOUND
        assert relative_rms(got, exact) <= bound, f"{name}: {relative_rms(got, exact):.2e} > {bound:.2e}"


def test_backward_under_autocast_is_in_the_dtype_of_the_forward_pass() -> None:
    inputs = make(1, 20, 18, 3, 4, 6)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    expected = torch.autograd.grad(projected_scan(**leaves).out.sum(), list(leaves.values()))
    loss = projected_scan(**leaves).out.sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_neither_dt_nor_the_output_of_the_scan_is_kept() -> None:
    """Of tensors `[B T E]` the inputs u and z, and views of one narrow product."""
    inputs = make(2, 64, 48, 4, 5, 16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = projected_scan(**leaves).out
    assert out.grad_fn is not None
    given_ = {value.untyped_storage().data_ptr(): name for name, value in leaves.items()}
    others = sorted(size for address, size in kept.items() if address not in given_)
    rows = 2 * 64
    assert others == sorted([rows * (5 + 2 * 4) * 4, (rows // 32 + 2) * 48 * 4 * 4]), "the narrow product, checkpoints"


def test_a_second_derivative_is_refused() -> None:
    leaves = {name: value.requires_grad_() for name, value in make(1, 4, 3, 2, 2, 2).items()}
    out = projected_scan(**leaves).out
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.sum(), leaves["u"], create_graph=True)


def test_nan_comes_out() -> None:
    inputs = make(2, 6, 5, 2, 2, 3)
    inputs["u"][1, 3, 2] = torch.nan
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = projected_scan(**leaves).out
    assert out[1, 3:].isnan().all() and not out[0].isnan().any() and not out[1, :3].isnan().any()
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(bool(gradient.isnan().any()) for gradient in gradients)


def test_without_gradients_and_compiled_it_is_the_ops_one_by_one() -> None:
    inputs = make(2, 20, 18, 3, 4, 6)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(projected_scan(**inputs), one_by_one(**inputs), strict=True))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}

    def loss(op: Callable[..., Projected], values: dict[str, Tensor]) -> Tensor:
        return op(**values).out.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(projected_scan, leaves), list(leaves.values()))
    expected = torch.autograd.grad(loss(one_by_one, leaves), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(2, 3)}, "u must be \\[B T E\\]"),
        ({"z": torch.zeros(2, 4, 6)}, "z must be \\[B T E\\], expected \\[2, 4, 5\\], got \\[2, 4, 6\\]"),
        ({"x_weight": torch.zeros(5, 5)}, "x_weight must be \\[R\\+2N E\\], expected \\[6, 5\\]"),
        ({"x_weight": torch.zeros(6, 5).double()}, "x_weight must be float32, got float64"),
        ({"dt_weight": torch.zeros(5)}, "dt_weight must be \\[E R\\]"),
        ({"A": torch.zeros(5, 0)}, "A must be \\[E N\\]"),
        ({"A": torch.zeros(5, 2).bfloat16()}, "A must be float32, got bfloat16"),
        ({"out_weight": torch.zeros(3, 4)}, "out_weight must be \\[D E\\], expected \\[3, 5\\]"),
        ({"out_weight": torch.zeros(3)}, "out_weight must be \\[D E\\]"),
        ({"out_weight": torch.zeros(3, 5, device="meta")}, "out_weight must be on cpu as u is, got meta"),
        ({"u": torch.zeros(2, 4, 5, device="meta")}, "z must be on meta as u is, got cpu"),
        ({"D": torch.zeros(4)}, "D must be \\[E\\]"),
        ({"initial": torch.zeros(1, 5, 2)}, "initial must be \\[S E N\\], expected \\[2, 5, 2\\]"),
        ({"segments": Segments([0, 4])}, "must be packed"),
        ({"backend": "triton"}, "selective_scan: backend 'triton' cannot run here"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projected_scan(**{**make(2, 4, 5, 2, 2, 3), **changes})
