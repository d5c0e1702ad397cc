"""The laws of `selective_scan` on a GPU, in Triton: against the float64 reference, over random shapes and dtypes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.selective_scan import ERROR_BOUND, selective_scan
from milonga.segments import Segments
from tests.ops.helpers import relative_rms
from tests.ops.test_selective_scan import OPTIONAL, make

pytestmark = pytest.mark.gpu

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
    for name, got, expected in zip(inputs, gradients, exact, strict=True):
        bound = ERROR_BOUND + (rounding if got.dtype != torch.float32 else 0.0)
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
