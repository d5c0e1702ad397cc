from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milonga.ops.selective_scan import ERROR_BOUND, selective_scan, selective_scan_reference
from milonga.segments import Segments
from tests.ops.helpers import assert_compiles_to_the_same, assert_matches, relative_rms

ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial")
OPTIONAL = ORDER[5:]


def make(batch: int, time: int, width: int, states: int, sequences: int | None = None) -> dict[str, Tensor]:
    """Every input, as a model would have it: steps around softplus(-1), decays between 0.05 and 1."""
    return {
        "x": torch.randn(batch, time, width),
        "dt": torch.randn(batch, time, width),
        "A": -torch.rand(width, states) * 2 - 0.01,
        "B": torch.randn(batch, time, states),
        "C": torch.randn(batch, time, states),
        "D": torch.randn(width),
        "z": torch.randn(batch, time, width),
        "dt_bias": torch.randn(width) - 1,
        "initial": torch.randn(batch if sequences is None else sequences, width, states),
    }


def piece(inputs: dict[str, Tensor], start: int, stop: int, initial: Tensor) -> dict[str, Tensor]:
    """The steps `start .. stop - 1`, continued from `initial`."""
    timed = {name: inputs[name][:, start:stop] for name in ("x", "dt", "B", "C", "z")}
    return {**inputs, **timed, "initial": initial}


def scan(backend: str, names: tuple[str, ...], segments: Segments | None = None):
    """The op as a function of the tensors `names`, in this order."""

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, tensors, strict=True)), segments=segments, backend=backend)

    return run


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], Segments | None]:
    """Inputs with options present or absent, rectangular or packed with empty sequences."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    width, states = draw(st.sampled_from([1, 5, 16, 33, 70, 130])), draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64]))
    if draw(st.booleans()):
        segments = Segments.from_lengths(draw(st.lists(st.sampled_from([0, 0, 1, 2, 31, 32, 33]), max_size=5)))
        inputs = make(1, segments.total, width, states, segments.count)
    else:
        segments = None
        inputs = make(draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 71])), width, states)
    absent = draw(st.sets(st.sampled_from(OPTIONAL)))
    return {name: value for name, value in inputs.items() if name not in absent}, segments


@given(cases())
def test_matches_reference(case: tuple[dict[str, Tensor], Segments | None]) -> None:
    inputs, segments = case
    names = tuple(inputs)
    assert_matches(scan("cpu", names, segments), scan("reference", names, segments), list(inputs.values()), ERROR_BOUND)


def test_matches_reference_over_many_blocks_and_checkpoints() -> None:
    inputs = make(2, 130, 530, 16)
    assert_matches(scan("cpu", ORDER), scan("reference", ORDER), list(inputs.values()), ERROR_BOUND)


def test_reference_is_the_formula() -> None:
    inputs = {name: value.double() for name, value in make(1, 3, 1, 2).items()}
    x, dt, A, B, C, D, z, dt_bias, h = (inputs[name] for name in ORDER)
    for t in range(3):
        d = torch.log1p(torch.exp(dt[0, t, 0] + dt_bias[0]))
        h = torch.stack([torch.exp(d * A[0, n]) * h[0, 0, n] + d * B[0, t, n] * x[0, t, 0] for n in range(2)])[
            None, None
        ]
        y = (
            (sum(C[0, t, n] * h[0, 0, n] for n in range(2)) + D[0] * x[0, t, 0])
            * z[0, t, 0]
            * torch.sigmoid(z[0, t, 0])
        )
        assert torch.allclose(selective_scan(**inputs)[0][0, t, 0], y, rtol=1e-12)
    assert torch.allclose(selective_scan(**inputs)[1], h, rtol=1e-12)


@pytest.mark.parametrize("segments", [None, Segments([0, 2, 2, 5])])
def test_gradients_of_the_reference(segments: Segments | None) -> None:
    inputs = make(1, 5, 2, 3, 1 if segments is None else 3)
    leaves = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *values: scan("reference", ORDER, segments)(*values), leaves)


@given(st.lists(st.integers(0, 97), max_size=4), st.sampled_from([3, 16, 40]), st.integers(0, 2**31))
def test_split_law(cuts: list[int], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    time = 97
    inputs = make(2, time, width, 5)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, final = selective_scan(**leaves, backend="cpu")
    upstream = [torch.randn_like(y), torch.randn_like(final)]
    whole = torch.autograd.grad([y, final], list(leaves.values()), upstream)

    edges = [0, *sorted(cuts), time]
    outputs, state = [], leaves["initial"]
    for start, stop in pairwise(edges):
        out, state = selective_scan(**piece(leaves, start, stop, state), backend="cpu")
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)
    parts = torch.autograd.grad([torch.cat(outputs, 1), state], list(leaves.values()), upstream)
    for name, got, expected in zip(leaves, parts, whole, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND, name


def test_single_steps_are_the_whole() -> None:
    inputs = make(3, 40, 50, 16)
    y, final = selective_scan(**inputs, backend="cpu")
    state = inputs["initial"]
    with torch.no_grad():
        for t in range(40):
            out, state = selective_scan(**piece(inputs, t, t + 1, state), backend="cpu")
            assert torch.equal(out[:, 0], y[:, t])
    assert torch.equal(state, final)


@given(st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 60]), min_size=1, max_size=6), st.integers(0, 2**31))
def test_packed_is_separate(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    segments = Segments.from_lengths(lengths)
    inputs = make(1, segments.total, 37, 6, segments.count)
    y, final = selective_scan(**inputs, segments=segments, backend="cpu")
    for s, (start, stop) in enumerate(pairwise(segments.offsets.tolist())):
        alone, last = selective_scan(**piece(inputs, start, stop, inputs["initial"][s : s + 1]), backend="cpu")
        assert torch.equal(alone, y[:, start:stop])
        assert torch.equal(last[0], final[s])


def test_rows_are_independent() -> None:
    inputs = make(4, 20, 24, 4)
    y, final = selective_scan(**inputs, backend="cpu")
    row = {k: v[2:3] if k in ("x", "dt", "B", "C", "z", "initial") else v for k, v in inputs.items()}
    alone, last = selective_scan(**row, backend="cpu")
    assert torch.equal(alone[0], y[2])
    assert torch.equal(last[0], final[2])


@pytest.mark.parametrize("time", [0, 1])
def test_final_state_is_never_an_input(time: int) -> None:
    for backend in ("cpu", "reference"):
        inputs = make(2, time, 6, 3)
        kept = inputs["initial"].clone()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                _, final = selective_scan(**inputs, backend=backend)
            final.detach().zero_()
            assert torch.equal(inputs["initial"], kept)
    segments = Segments([0, 0])
    inputs = make(1, 0, 6, 3, 1)
    _, final = selective_scan(**inputs, segments=segments)
    assert torch.equal(final, inputs["initial"])
    assert final.data_ptr() != inputs["initial"].data_ptr()


def test_slices_of_projections_are_not_misread() -> None:
    inputs = make(2, 9, 24, 4)
    wide, narrow = torch.randn(2, 9, 72), torch.randn(2, 9, 20)
    views = {
        "x": wide[..., :24],
        "dt": wide[..., 24:48],
        "z": wide[..., 48:],
        "B": narrow[..., 3:7],
        "C": narrow[..., 16:],
    }
    copies = {name: view.contiguous() for name, view in views.items()}
    turned = {name: copy.mT.contiguous().mT for name, copy in copies.items()}
    expected = selective_scan(**{**inputs, **copies}, backend="cpu")
    for variant in (views, turned):
        got = selective_scan(**{**inputs, **variant}, backend="cpu")
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("grad", [True, False])
def test_thread_count_does_not_matter(grad: bool) -> None:
    inputs = {k: v.requires_grad_(grad) for k, v in make(3, 300, 200, 8).items()}
    packed = {k: v.requires_grad_(grad) for k, v in make(1, 900, 100, 8, 40).items()}
    segments = Segments.from_lengths([22] * 39 + [42])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tensors = []
            for case, bounds in ((inputs, None), (packed, segments)):
                outputs = selective_scan(**case, segments=bounds, backend="cpu")
                tensors.extend(outputs)
                if grad:
                    loss = outputs[0].sin().sum() + outputs[1].cos().sum()
                    tensors.extend(torch.autograd.grad(loss, list(case.values())))
            results.append(tensors)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_float64_goes_to_the_reference() -> None:
    inputs = {name: value.double() for name, value in make(1, 4, 3, 2).items()}
    y, final = selective_scan(**inputs)
    assert y.dtype == final.dtype == torch.float64
    with pytest.raises(ValueError, match=r"selective_scan.*float64"):
        selective_scan(**inputs, backend="cpu")


def test_one_signature_each_and_no_checkpoints_without_gradients() -> None:
    from milonga.ops.selective_scan import cpu, cpu_kernels

    inputs = make(2, 70, 130, 5)
    selective_scan(**{k: v.clone().requires_grad_() for k, v in inputs.items()})[0].sum().backward()
    selective_scan(**{k: v for k, v in inputs.items() if k not in OPTIONAL})
    selective_scan(**make(1, 1, 3, 2, 4), segments=Segments([0, 0, 1, 1, 1]))
    cpu.compile_kernels()
    assert len(cpu_kernels.scan.signatures) == len(cpu_kernels.scan_backward.signatures) == 1
    tensors = [inputs[name] for name in ORDER]
    assert cpu.forward(*tensors, None, False)[2].numel() == 0
    assert cpu.forward(*tensors, None, True)[2].numel() > 0


def test_only_the_final_state_used() -> None:
    inputs = make(2, 40, 20, 3)
    results = []
    for backend, kind in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [value.to(kind).requires_grad_() for value in inputs.values()]
        results.append(
            torch.autograd.grad(
                scan(backend, ORDER)(*leaves)[1].sum(), leaves, allow_unused=True, materialize_grads=True
            )
        )
    for got, expected in zip(*results, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND


@pytest.mark.parametrize("absent", [(), ("initial", "z"), ("D",)])
@pytest.mark.parametrize("lengths", [None, (0, 35, 0, 1)])
def test_output_from_the_backward_pass(absent: tuple[str, ...], lengths: tuple[int, ...] | None) -> None:
    from milonga.ops.selective_scan.library import selective_scan_backward_op, selective_scan_op

    segments = None if lengths is None else Segments.from_lengths(lengths)
    inputs = make(2, 35, 150, 3) if segments is None else make(1, segments.total, 150, 3, segments.count)
    *tensors, initial = (None if name in absent else inputs[name] for name in ORDER)
    offsets = None if segments is None else segments.offsets
    y, final, kept = selective_scan_op(*tensors, initial, offsets, True)
    arguments = (torch.randn_like(y), torch.randn_like(final), *tensors, initial is not None, offsets, kept)
    *gradients, again = selective_scan_backward_op(*arguments, True)
    *others, empty = selective_scan_backward_op(*arguments, False)
    assert torch.equal(again, y)
    assert empty.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    for gated in (True, False):
        torch.library.opcheck(
            selective_scan_backward_op.definition, (*arguments, gated), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_break(packed: bool) -> None:
    cases = [
        (make(1, sum(lengths), 20, 3, 2), Segments.from_lengths(lengths))
        if packed
        else (make(2, lengths[0], 20, 3), None)
        for lengths in ((7, 5), (40, 0), (33, 8))
    ]
    assert_compiles_to_the_same(selective_scan, cases)


def test_operator_is_registered_rightly() -> None:
    from milonga.ops.selective_scan.library import selective_scan_op

    inputs = [value.requires_grad_() for value in make(2, 5, 6, 3).values()]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(selective_scan_op.definition, (*inputs, None, True), test_utils=checks)


BAD = [
    ({"x": torch.randn(3, 4)}, r"x must be \[B T E\].*\[3, 4\]"),
    ({"x": torch.zeros(2, 5, 4, dtype=torch.int32)}, "x must be float32.*got int32"),
    ({"dt": torch.randn(2, 5, 3)}, r"dt must be \[B T E\], expected \[2, 5, 4\], got \[2, 5, 3\]"),
    ({"dt": torch.randn(2, 5, 4).bfloat16()}, "dt must be float32, got bfloat16"),
    ({"A": torch.randn(4)}, r"A must be \[E N\].*got \[4\]"),
    ({"A": torch.randn(4, 0)}, "A must be.*at least 1"),
    ({"A": torch.randn(3, 2)}, r"A must be \[E N\], expected \[4, 2\], got \[3, 2\]"),
    ({"A": torch.randn(4, 2).bfloat16()}, "A must be float32, got bfloat16"),
    ({"B": torch.randn(2, 5, 3)}, r"B must be \[B T N\], expected \[2, 5, 2\]"),
    ({"C": torch.randn(2, 4, 2)}, r"C must be \[B T N\], expected \[2, 5, 2\]"),
    ({"D": torch.randn(5)}, r"D must be \[E\], expected \[4\], got \[5\]"),
    ({"z": torch.randn(2, 5, 8)}, r"z must be \[B T E\]"),
    ({"z": torch.randn(2, 5, 4, device="meta")}, "z must be on cpu as x is, got meta"),
    ({"dt_bias": torch.randn(4).double()}, "dt_bias must be float32, got float64"),
    ({"initial": torch.randn(1, 4, 2)}, r"initial must be \[S E N\], expected \[2, 4, 2\], got \[1, 4, 2\]"),
    ({"initial": torch.randn(2, 4, 2).half()}, "initial must be float32, got float16"),
    ({"segments": Segments([0, 5])}, "packed as"),
    ({"backend": "triton"}, "backend 'triton' cannot run here"),
    ({"backend": "fast"}, "no such backend"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"selective_scan: .*{message}"):
        selective_scan(**{**make(2, 5, 4, 2), **change})


def test_segments_must_cover_the_batch() -> None:
    with pytest.raises(ValueError, match=r"selective_scan: segments must cover T.*end at 5, got 4"):
        selective_scan(**make(1, 5, 4, 2), segments=Segments([0, 4]))


def test_reference_is_exported_with_the_same_result() -> None:
    inputs = make(1, 4, 3, 2)
    direct = selective_scan_reference(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct, selective_scan(**inputs, backend="reference"), strict=True))
