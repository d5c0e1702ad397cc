"""`mamba_mixer` over the GPU's kernels on CPU tensors, interpreted and emulated, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch

from milonga.ops.causal_conv import causal_conv
from milonga.ops.mamba_mixer import ERROR_BOUND, Mixed, function, gluon_convolution, mamba_mixer, triton
from milonga.ops.selective_scan import gluon
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, relative_rms
from tests.ops.interpreter import prepare
from tests.ops.selective_scan_gluon_emulator import Emulated
from tests.ops.test_mamba_mixer import NAMES, make, one_by_one

prepare()


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, kernel in (
        (gluon.gluon_forward, "scan_forward"),
        (gluon.gluon_backward, "scan_backward"),
        (gluon.gluon_backward, "scan_back_ends"),
        (gluon_convolution, "conv_backward"),
    ):
        monkeypatch.setattr(module, kernel, Emulated(getattr(module, kernel)))
    monkeypatch.setattr(function, "choice", lambda *_: "triton")
    monkeypatch.setattr(gluon, "suits", lambda x, A: A.shape[1] == gluon.STATES)


@pytest.mark.parametrize("states", [16, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_matches_float64(states: int, packed: bool) -> None:
    """With 16 states gradients lie side by side, with 3 they do not."""
    torch.manual_seed(0)
    segments = Segments.from_lengths([33, 0, 3]) if packed else None
    inputs = make(1, 36, 9, 30, states, 4, 3) if packed else make(2, 18, 9, 30, states, 4)

    def exact(*tensors: torch.Tensor) -> Mixed:
        return one_by_one(*tensors, segments=segments, backend="reference")

    def fast(*tensors: torch.Tensor) -> Mixed:
        return mamba_mixer(**dict(zip(NAMES, tensors, strict=True)), segments=segments)

    assert_matches(fast, exact, list(inputs.values()), ERROR_BOUND)


@pytest.mark.parametrize("shape", [(1, 17), (3, 1)])
def test_with_the_product_in_the_convolution(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = triton.conv_backward
    monkeypatch.setattr(triton, "suits", lambda *_: True)
    monkeypatch.setattr(triton, "conv_backward", lambda *a: calls.append(1) or own(*a))
    torch.manual_seed(0)
    inputs = list(make(*shape, 9, 128, 16, 8).values())[:10]
    for index in range(2):  # of the output alone; through the convolution's last columns it goes the other way

        def exact(*tensors: torch.Tensor, index: int = index) -> list[torch.Tensor]:
            found = one_by_one(*tensors, backend="reference")
            return [found.out, found.final, *([found.conv_final] if index else [])]

        def fast(*tensors: torch.Tensor, index: int = index) -> list[torch.Tensor]:
            found = mamba_mixer(**dict(zip(NAMES, tensors, strict=False)))
            return [found.out, found.final, *([found.conv_final] if index else [])]

        assert_matches(fast, exact, inputs, ERROR_BOUND)
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("batch", "time", "width", "columns", "length"),
    [(1, 30, 128, 40, 61), (2, 61, 256, 96, 29), (3, 1, 128, 40, 61), (2, 0, 128, 40, 61)],
)
def test_the_convolution_with_the_product(
    batch: int, time: int, width: int, columns: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks longer and shorter than a sequence; rows that are halves of wider ones, of which the rest is untouched."""
    monkeypatch.setattr(triton, "chunk_length", lambda *_: length)
    torch.manual_seed(0)
    pair, wide = torch.randn(batch, time, 2 * width), torch.randn(batch, time, 2 * width)
    narrow, into = torch.randn(batch * time, columns), torch.randn(columns, width) / columns**0.5
    weight, bias = torch.randn(width, 4) / 2, torch.randn(width)
    grad_u, x = pair[..., :width], wide[..., width:]
    if time == 1:  # rows of one step lie as far apart as ever, whatever the stride of their only step
        grad_u = grad_u.as_strided(grad_u.shape, (2 * width, width, 1))
    out = torch.full((batch, time, 2 * width), float("nan"))
    found = triton.conv_backward(grad_u, narrow, into, x, weight, bias, out[..., :width])
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    y, _ = causal_conv(*leaves, backend="reference")
    upstream = grad_u.double() + (narrow.double() @ into.double()).view(batch, time, width)
    for got, expected in zip((out[..., :width], *found), torch.autograd.grad(y, leaves, upstream), strict=True):
        assert relative_rms(got, expected) <= 1e-6
    assert bool(out[..., width:].isnan().all())


def test_weights_in_another_order_of_memory() -> None:
    """A parameter that is another's transpose: read as the matrix that it is."""
    torch.manual_seed(0)
    grad_u, x = torch.randn(2, 1, 20, 128)
    narrow, into, weight, bias = torch.randn(20, 8), torch.randn(8, 128), torch.randn(128, 4), torch.randn(128)
    results = []
    for turned in (False, True):
        weights = (into.t().contiguous().t(), weight.t().contiguous().t()) if turned else (into, weight)
        grad_x = torch.full((1, 20, 128), float("nan"))
        found = triton.conv_backward(grad_u, narrow, weights[0], x, weights[1], bias, grad_x)
        results.append((grad_x, *found))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_are_whole_turns_and_fill_the_gpu() -> None:
    for batch, time, blocks in ((4, 8192, 16), (32, 4096, 8), (1, 1, 1), (1, 100_000, 12)):
        length = triton.chunk_length(batch, time, blocks)
        assert (length + triton.TAPS - 1) % triton.TURN == 0
    warps = 4 * -(-8192 // triton.chunk_length(4, 8192, 16)) * 16
    assert 0.9 * triton.WAVE <= warps <= triton.WAVE
