"""The laws of `selective_scan` on a GPU: against the float64 reference, over random shapes and dtypes.

With 16 states it runs in Gluon, else in Triton, and a few steps without gradients in a kernel of their own. A small
case under `compute-sanitizer`: `compute-sanitizer python -m pytest -q tests/gpu/test_scan_gpu.py -k sanitizer`.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.selective_scan import ERROR_BOUND, HALF_GRADIENT_BOUND, selective_scan
from milonga.ops.selective_scan.library import selective_scan_backward_op, selective_scan_op
from milonga.segments import Segments
from tests.ops.helpers import relative_rms
from tests.ops.test_selective_scan import OPTIONAL, ORDER, make

# the reference's matrix products warn where new memory is filled with NaN
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*[Dd]eterministic")]

LOW = ("x", "dt", "B", "C", "z")


def on_gpu(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: value.cuda().to(dtype if name in LOW else torch.float32) for name, value in inputs.items()}


def run(backend: str, inputs: dict[str, Tensor], upstream: list[Tensor] | None, segments: Segments | None = None):
    """-> (outputs, upstream gradients, gradients of every input)."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = selective_scan(**leaves, segments=segments, backend=backend)
    upstream = [torch.randn_like(out) for out in outputs] if upstream is None else upstream
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [out.detach() for out in outputs], upstream, gradients


def check(inputs: dict[str, Tensor], segments: Segments | None = None) -> None:
    """Outputs and all gradients; what is rounded to the dtype of x may be off by that rounding."""
    outputs, upstream, gradients = run("triton", inputs, None, segments)
    exact_outputs, _, exact = run("reference", {k: v.double() for k, v in inputs.items()}, upstream, segments)
    rounding = 0.0 if inputs["x"].dtype == torch.float32 else torch.finfo(inputs["x"].dtype).eps / 2
    for name, got, expected in zip(("y", "final"), outputs, exact_outputs, strict=True):
        bound = ERROR_BOUND + (rounding if got.dtype != torch.float32 else 0.0)
        assert relative_rms(got, expected) <= bound, f"{name}: {relative_rms(got, expected):.2e} > {bound:.1e}"
    exponential = HALF_GRADIENT_BOUND if rounding else ERROR_BOUND
    for name, got, expected in zip(inputs, gradients, exact, strict=True):
        bound = exponential if got.dtype == torch.float32 else ERROR_BOUND + rounding
        assert relative_rms(got, expected) <= bound, f"{name}: {relative_rms(got, expected):.2e} > {bound:.1e}"


@pytest.mark.parametrize(
    ("states", "dtype"),
    [(n, torch.float32) for n in (1, 2, 3, 4, 8, 16, 32, 64)] + [(16, torch.bfloat16), (16, torch.float16)],
)
def test_every_number_of_states(states: int, dtype: torch.dtype) -> None:
    check(on_gpu(make(2, 67, 75, states), dtype))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int) -> None:
    pick = torch.Generator().manual_seed(seed)

    def among(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=pick))]

    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    inputs = make(among(1, 2, 5), among(0, 1, 31, 33, 129, 300), among(1, 31, 32, 100, 515), among(2, 16))
    check(on_gpu({k: v for k, v in inputs.items() if k not in OPTIONAL or among(0, 1, 1)}, dtype))


@pytest.fixture
def nan_in_new_memory():
    """`torch.empty` gives NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("states", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_time_leave_nothing_out(states: int, dtype: torch.dtype) -> None:
    """One sequence, cut in chunks; in fp32 also over so many steps that a bias of the exponential would show."""
    check(on_gpu(make(1, 700 if dtype == torch.float32 else 300, 75, states), dtype))


@pytest.mark.usefixtures("nan_in_new_memory")
def test_parts_of_time(monkeypatch) -> None:
    from milonga.ops.selective_scan import gluon

    monkeypatch.setattr(gluon, "WORKSPACE", 20_000)
    check(on_gpu(make(2, 500, 70, 16)))


@pytest.mark.usefixtures("nan_in_new_memory")
def test_finer_chunks_in_the_first_pass(monkeypatch) -> None:
    from milonga.ops.selective_scan import gluon

    monkeypatch.setattr(gluon, "FINE", 32)
    check(on_gpu(make(1, 700, 70, 16)))
    segments = Segments.from_lengths((0, 300, 65))
    check(on_gpu(make(1, segments.total, 70, 16, segments.count)), segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_programs_of_64_channels(dtype: torch.dtype, monkeypatch) -> None:
    """Not cut into chunks: elsewhere here so few programs have 32 channels."""
    from milonga.ops.selective_scan import gluon

    monkeypatch.setattr(gluon, "PROGRAMS", 1)
    check(on_gpu(make(2, 200, 150, 16), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_of_a_projection(dtype: torch.dtype) -> None:
    inputs = on_gpu(make(2, 67, 64, 16), dtype)
    wide = torch.cat([inputs["x"], inputs["z"]], -1)
    narrow = torch.cat([inputs["dt"][..., :5], inputs["B"], inputs["C"]], -1)
    strided = {**inputs, "x": wide[..., :64], "z": wide[..., 64:], "B": narrow[..., 5:21], "C": narrow[..., 21:]}
    outputs, upstream, gradients = run("triton", inputs, None)
    others, _, other_gradients = run("triton", strided, upstream)
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), (*others, *other_gradients), strict=True))


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("states", [8, 16])
@pytest.mark.parametrize("absent", [(), ("initial", "z", "D")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_from_the_backward_pass(states: int, absent: tuple[str, ...], dtype: torch.dtype) -> None:
    """Two roundings to the dtype may differ by one place."""
    inputs = {name: v for name, v in on_gpu(make(2, 300, 75, states), dtype).items() if name not in absent}
    *tensors, initial = (inputs.get(name) for name in ORDER)
    y, _, kept = selective_scan_op(*tensors, initial, None, True)
    arguments = (torch.randn_like(y), None, *tensors, initial is not None, None, kept)
    *gradients, again = selective_scan_backward_op(*arguments, True)
    *others, empty = selective_scan_backward_op(*arguments, False)
    assert again.dtype == dtype
    assert empty.shape == (0,)
    bound = ERROR_BOUND + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert relative_rms(again, y.double()) <= bound
    assert all(relative_rms(a, b.double()) <= bound for a, b in zip(gradients, others, strict=True))


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "states"), [(1, 16), (8, 16), (3, 5)])
def test_few_steps(steps: int, states: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(make(3, steps, 100, states), dtype)
    y, final = selective_scan(**inputs, backend="triton")
    exact_y, exact_final = selective_scan(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_rms(y, exact_y) <= ERROR_BOUND + rounding
    assert relative_rms(final, exact_final) <= ERROR_BOUND


def test_few_steps_of_packed_sequences() -> None:
    segments = Segments.from_lengths((1, 0, 2, 1))
    inputs = on_gpu(make(1, 4, 100, 16, 4))
    got = selective_scan(**inputs, segments=segments, backend="triton")
    exact = selective_scan(**{k: v.double() for k, v in inputs.items()}, segments=segments, backend="reference")
    assert all(relative_rms(a, b) <= ERROR_BOUND for a, b in zip(got, exact, strict=True))


def test_a_rest_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """MambaByte's shape: three chunks and a short fourth in the backward pass, beside three even ones."""
    from milonga.ops.selective_scan import gluon

    plan = gluon._Plan(torch.empty(4, 8192, 2048, device="meta"), None, gluon.ENOUGH_BACKWARD, 0.2, rest=True)
    assert (plan.length, plan.slots) == (2688, 16)
    inputs = on_gpu(make(4, 8192, 2048, 16), torch.bfloat16)
    gradients = []
    for _ in range(2):
        leaves = [value.detach().requires_grad_() for value in inputs.values()]
        y, _ = selective_scan(**dict(zip(inputs, leaves, strict=True)), backend="triton")
        gradients.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
        monkeypatch.setattr(gluon, "_with_a_rest", lambda steps, parallel, pieces, length, unit: length)
    for name, got, even in zip(inputs, *gradients, strict=True):
        assert relative_rms(got, even) <= torch.finfo(torch.bfloat16).eps / 8, name


def test_small_for_the_sanitizer() -> None:
    check(on_gpu(make(1, 200, 70, 16), torch.bfloat16))


def test_more_than_2_to_the_31_elements() -> None:
    """The end of a sequence so long that offsets pass 2^31, against the reference: decays are fast."""
    if torch.cuda.mem_get_info()[0] < 72 * 2**30:
        pytest.skip("needs 72 GiB of GPU memory")
    time, width, warm, compared = 2**20, 2304, 256, 512
    torch.manual_seed(0)

    def low(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    inputs = {
        "x": low(1, time, width), "dt": low(1, time, width).add_(2), "B": low(1, time, 16), "C": low(1, time, 16),
        "z": low(1, time, width), "A": -1 - torch.rand(width, 16, device="cuda"),
        "D": torch.randn(width, device="cuda"), "dt_bias": torch.rand(width, device="cuda"),
    }  # fmt: skip
    assert inputs["x"].numel() > 2**31
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y, _ = selective_scan(**leaves, backend="triton")
    upstream = low(1, time, width)
    gradients = dict(zip(LOW, torch.autograd.grad(y, [leaves[name] for name in LOW], upstream), strict=True))
    end = {k: (v.detach()[:, -warm - compared :] if k in LOW else v.detach()).double() for k, v in inputs.items()}
    short = {name: value.requires_grad_() for name, value in end.items()}
    exact, _ = selective_scan(**short, backend="reference")
    wanted = torch.autograd.grad(exact, [short[name] for name in LOW], upstream[:, -warm - compared :].double())
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert relative_rms(y.detach()[:, -compared:], exact.detach()[:, -compared:]) <= rounding
    for name, expected in zip(LOW, wanted, strict=True):
        assert relative_rms(gradients[name][:, -compared:], expected[:, -compared:]) <= rounding, name


@pytest.mark.parametrize("lengths", [(), (0,), (0, 5, 0, 0, 300, 128, 1, 0), (33,) * 9])
def test_packed(lengths: tuple[int, ...]) -> None:
    segments = Segments.from_lengths(lengths)
    check(on_gpu(make(1, segments.total, 70, 16, segments.count)), segments)


def test_split_law_and_determinism() -> None:
    inputs = on_gpu(make(2, 900, 70, 16))
    y, final = selective_scan(**inputs, backend="triton")
    state, pieces = inputs["initial"], []
    for start, stop in pairwise([0, 0, 1, 33, 450, 900]):
        piece = {name: inputs[name][:, start:stop] for name in LOW}
        out, state = selective_scan(**{**inputs, **piece, "initial": state}, backend="triton")
        pieces.append(out)
    assert relative_rms(torch.cat(pieces, 1), y) <= ERROR_BOUND
    assert relative_rms(state, final) <= ERROR_BOUND
    first, upstream, gradients = run("triton", inputs, None)
    for _ in range(3):
        again, _, other = run("triton", inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip((*first, *gradients), (*again, *other), strict=True))


def test_rows_are_independent_of_nan() -> None:
    inputs = on_gpu(make(2, 300, 70, 16))
    inputs["x"][1, 100, 3] = float("nan")
    outputs, _, gradients = run("triton", inputs, None)
    expected = selective_scan(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(outputs, expected, strict=True))
    for name, gradient in zip(inputs, gradients, strict=True):
        if gradient.shape[0] == 2 and name in (*LOW, "initial"):
            assert not gradient[0].isnan().any(), name


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_break(packed: bool) -> None:
    def loss(values: dict[str, Tensor], segments: Segments | None) -> Tensor:
        y, final = selective_scan(**values, segments=segments)
        return y.sin().sum() + final.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for lengths in ((7, 5), (40, 0), (33, 8)):
        segments = Segments.from_lengths(lengths) if packed else None
        inputs = on_gpu(make(1, sum(lengths), 20, 3, 2) if packed else make(2, lengths[0], 20, 3))
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        expected = torch.autograd.grad(loss(leaves, segments), list(leaves.values()))
        got = torch.autograd.grad(compiled(leaves, segments), list(leaves.values()))
        for a, b in zip(got, expected, strict=True):
            assert relative_rms(a, b) <= ERROR_BOUND
