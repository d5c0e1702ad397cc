from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milonga.ops.causal_conv import ERROR_BOUND, causal_conv
from milonga.segments import Segments
from tests.ops.helpers import assert_compiles_to_the_same, assert_matches, relative_rms

ORDER = ("x", "weight", "bias", "initial")


def make(batch: int, time: int, width: int, taps: int, sequences: int | None = None) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, time, width),
        "weight": torch.randn(width, taps),
        "bias": torch.randn(width),
        "initial": torch.randn(batch if sequences is None else sequences, taps - 1, width),
    }


def conv(backend: str, names: tuple[str, ...], activation: str | None, segments: Segments | None = None):
    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(names, tensors, strict=True))
        return causal_conv(**inputs, activation=activation, segments=segments, backend=backend)

    return run


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], str | None, Segments | None]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    width, taps = draw(st.sampled_from([1, 7, 32, 65, 515])), draw(st.integers(1, 8))
    if draw(st.booleans()):
        segments = Segments.from_lengths(draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 6, 63, 64, 65]), max_size=6)))
        inputs = make(1, segments.total, width, taps, segments.count)
    else:
        segments = None
        inputs = make(draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 130])), width, taps)
    absent = draw(st.sets(st.sampled_from(["bias", "initial"])))
    kept = {name: value for name, value in inputs.items() if name not in absent}
    return kept, draw(st.sampled_from(["silu", None])), segments


@given(cases())
def test_matches_reference(case: tuple[dict[str, Tensor], str | None, Segments | None]) -> None:
    inputs, activation, segments = case
    names = tuple(inputs)
    assert_matches(
        conv("cpu", names, activation, segments),
        conv("reference", names, activation, segments),
        list(inputs.values()),
        ERROR_BOUND,
    )


def test_reference_is_a_padded_convolution() -> None:
    inputs = {name: value.double() for name, value in make(2, 9, 5, 4).items()}
    del inputs["initial"]
    padded = torch.nn.functional.pad(inputs["x"].mT, (3, 0))
    sums = torch.nn.functional.conv1d(padded, inputs["weight"][:, None], inputs["bias"], groups=5).mT
    assert torch.allclose(causal_conv(**inputs, activation=None)[0], sums, rtol=1e-12)
    assert torch.allclose(causal_conv(**inputs)[0], torch.nn.functional.silu(sums), rtol=1e-12)
    assert torch.equal(causal_conv(**inputs)[1], inputs["x"][:, -3:])


@pytest.mark.parametrize("segments", [None, Segments([0, 2, 2, 6])])
def test_gradients_of_the_reference(segments: Segments | None) -> None:
    inputs = make(1, 6, 2, 4, 1 if segments is None else 3)
    leaves = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(conv("reference", ORDER, "silu", segments), leaves)


@given(st.lists(st.integers(0, 131), max_size=5), st.integers(1, 8), st.integers(0, 2**31))
def test_split_law(cuts: list[int], taps: int, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = {name: value.requires_grad_() for name, value in make(2, 131, 21, taps).items()}
    y, final = causal_conv(**leaves, backend="cpu")
    upstream = [torch.randn_like(y), torch.randn_like(final)]
    whole = torch.autograd.grad([y, final], list(leaves.values()), upstream)
    outputs, state = [], leaves["initial"]
    for start, stop in pairwise([0, *sorted(cuts), 131]):
        out, state = causal_conv(**{**leaves, "x": leaves["x"][:, start:stop], "initial": state}, backend="cpu")
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)
    parts = torch.autograd.grad([torch.cat(outputs, 1), state], list(leaves.values()), upstream)
    for name, got, expected in zip(leaves, parts, whole, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND, name


@given(st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 66]), min_size=1, max_size=6), st.integers(0, 2**31))
def test_packed_is_separate(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    segments = Segments.from_lengths(lengths)
    inputs = make(1, segments.total, 11, 4, segments.count)
    y, final = causal_conv(**inputs, segments=segments, backend="cpu")
    for s, (start, stop) in enumerate(pairwise(segments.offsets.tolist())):
        one = {**inputs, "x": inputs["x"][:, start:stop], "initial": inputs["initial"][s : s + 1]}
        alone, last = causal_conv(**one, backend="cpu")
        assert torch.equal(alone, y[:, start:stop])
        assert torch.equal(last[0], final[s])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_state_is_never_an_input(backend: str) -> None:
    for time, taps in ((0, 4), (1, 4), (9, 4), (3, 1)):
        inputs = make(2, time, 6, taps)
        kept = [inputs["initial"].clone(), inputs["x"].clone()]
        with torch.no_grad():
            y, final = causal_conv(**inputs, backend=backend)
        final.fill_(9.0)
        y.fill_(9.0)
        assert torch.equal(inputs["initial"], kept[0])
        assert torch.equal(inputs["x"], kept[1])


def test_slices_of_a_projection_are_not_misread() -> None:
    inputs = make(2, 70, 24, 4)
    wide = torch.randn(2, 70, 48)
    expected = causal_conv(**{**inputs, "x": wide[..., 24:].contiguous()}, backend="cpu")
    for x in (wide[..., 24:], wide[..., 24:].mT.contiguous().mT):
        got = causal_conv(**{**inputs, "x": x}, backend="cpu")
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_thread_count_does_not_matter() -> None:
    leaves = {name: value.requires_grad_() for name, value in make(3, 700, 200, 4).items()}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, final = causal_conv(**leaves, backend="cpu")
            loss = y.sin().sum() + final.cos().sum()
            results.append([y, final, *torch.autograd.grad(loss, list(leaves.values()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
@pytest.mark.parametrize("name", ORDER)
def test_nan_comes_out(name: str, bits: int) -> None:
    inputs = make(2, 70, 20, 4)
    index = {"weight": (7, 0), "bias": (7,), "initial": (1, 2, 7), "x": (1, 66, 7)}[name]
    inputs[name][index] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    results = {}
    for backend in ("cpu", "reference"):
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        outputs = conv(backend, ORDER, "silu")(*leaves)
        results[backend] = [*outputs, *torch.autograd.grad([o.sum() for o in outputs], leaves)]
    assert results["reference"][0].isnan().any()
    for got, expected in zip(results["cpu"][:2], results["reference"][:2], strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
    for got, expected in zip(results["cpu"][2:], results["reference"][2:], strict=True):
        assert bool((got.isnan() | ~expected.isnan()).all())


def test_nan_weight_without_initial() -> None:
    inputs = make(1, 1, 6, 4)
    del inputs["initial"]
    inputs["weight"][2, 0] = float("nan")
    y, _ = causal_conv(**inputs, backend="cpu")
    assert torch.equal(y.isnan(), causal_conv(**inputs, backend="reference")[0].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_low_precision(dtype: torch.dtype, parameters: str) -> None:
    inputs = make(2, 40, 24, 4)
    for name in ORDER if parameters == "same" else ("x", "initial"):
        inputs[name] = inputs[name].to(dtype)
    for backend in ("cpu", "reference"):
        leaves = [value.clone().requires_grad_() for value in inputs.values()]
        y, final = conv(backend, ORDER, "silu")(*leaves)
        assert y.dtype == final.dtype == dtype
        exact = causal_conv(**{k: v.double() for k, v in inputs.items()})
        assert relative_rms(y.detach(), exact[0]) < torch.finfo(dtype).eps
        assert torch.equal(final, inputs["x"][:, -3:])
        gradients = torch.autograd.grad([y.float().sum(), final.float().sum()], leaves)
        assert [g.dtype for g in gradients] == [v.dtype for v in leaves]


def test_extreme_sums() -> None:
    x = torch.tensor([-1e4, -88.0, -50.0, 0.0, 50.0, 1e4])[None, :, None]
    y, _ = causal_conv(x, torch.ones(1, 1), backend="cpu")
    exact = torch.nn.functional.silu(x.double())
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-37)


def test_one_signature_each() -> None:
    from milonga.ops.causal_conv import cpu

    inputs = make(2, 70, 130, 5)
    causal_conv(**{k: v.requires_grad_() for k, v in inputs.items()})[0].sum().backward()
    causal_conv(torch.randn(1, 1, 3), torch.randn(3, 1), activation=None)
    cpu.compile_kernels()
    assert len(cpu._forward.signatures) == len(cpu._backward.signatures) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_break(packed: bool) -> None:
    cases = [
        (make(1, sum(lengths), 20, 4, 2), Segments.from_lengths(lengths))
        if packed
        else (make(2, lengths[0], 20, 4), None)
        for lengths in ((7, 5), (40, 0), (63, 2))
    ]
    assert_compiles_to_the_same(causal_conv, cases)


def test_operator_is_registered_rightly() -> None:
    from milonga.ops.causal_conv.library import causal_conv_op

    inputs = [value.requires_grad_() for value in make(2, 5, 6, 3).values()]
    torch.library.opcheck(
        causal_conv_op.definition, (*inputs, None, True), test_utils=("test_schema", "test_faketensor")
    )


BAD = [
    ({"x": torch.randn(3, 4)}, r"x must be \[B T E\].*\[3, 4\]"),
    ({"x": torch.zeros(2, 5, 4, dtype=torch.int64)}, "x must be float32.*got int64"),
    ({"weight": torch.randn(4)}, r"weight must be \[E W\].*got \[4\]"),
    ({"weight": torch.randn(4, 9)}, "W from 1 to 8"),
    ({"weight": torch.randn(4, 0)}, "W from 1 to 8"),
    ({"weight": torch.randn(3, 3)}, r"weight must be \[E W\], expected \[4, 3\], got \[3, 3\]"),
    ({"weight": torch.randn(4, 3).half()}, "weight must be float32, got float16"),
    ({"bias": torch.randn(3)}, r"bias must be \[E\], expected \[4\], got \[3\]"),
    ({"bias": torch.randn(4, device="meta")}, "bias must be on cpu as x is, got meta"),
    ({"activation": "gelu"}, "activation must be 'silu' or None, got 'gelu'"),
    ({"initial": torch.randn(2, 3, 4)}, r"initial must be \[S W-1 E\], expected \[2, 2, 4\], got \[2, 3, 4\]"),
    ({"initial": torch.randn(2, 2, 4).half()}, "initial must be float32, got float16"),
    ({"segments": Segments([0, 5])}, "packed as"),
    ({"backend": "triton"}, "backend 'triton' cannot run here"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"causal_conv: .*{message}"):
        causal_conv(**{**make(2, 5, 4, 3), **change})
