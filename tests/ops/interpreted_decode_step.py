"""The Triton kernels of one decoded step under Triton's interpreter, on CPU tensors, against the float64 definition.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from milonga.ops.decode_step import ERROR_BOUND, MambaWeights, Norm, ReplayInputs, reference, triton
from tests.ops.helpers import relative_rms, spread
from tests.ops.interpreter import prepare

prepare()


def wide(value):
    """The same in float64."""
    if isinstance(value, tuple):
        return type(value)(*(wide(part) for part in value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def norm_of(width: int, centred: bool) -> Norm:
    return Norm(torch.rand(width) + 0.5, torch.randn(width) if centred else None, 1e-5)


def weights_of(width: int, inner: int, rank: int, states: int, taps: int) -> MambaWeights:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    return MambaWeights(
        matrix(2 * inner, width),
        torch.randn(inner, taps),
        torch.randn(inner),
        matrix(rank + 2 * states, inner),
        matrix(inner, rank),
        torch.randn(inner, states),
        torch.randn(inner),
        torch.randn(inner) - 3,
        matrix(width, inner),
    )


@pytest.mark.parametrize(
    ("batch", "width", "features", "normed", "residual"),
    [(1, 24, 33, None, True), (3, 200, 48, False, False), (17, 272, 16, True, True), (2, 512, 20, True, False)],
)
def test_linear(batch: int, width: int, features: int, normed: bool | None, residual: bool) -> None:
    x, weight = torch.randn(batch, width), torch.randn(features, width)
    norm = None if normed is None else norm_of(width, normed)
    added = torch.randn(batch, features) if residual else None
    got = triton.linear_step(x, weight, norm, added, torch.float32)
    expected = reference.linear_step_reference(*(wide(value) for value in (x, weight, norm, added)), torch.float64)
    assert relative_rms(got, expected) <= ERROR_BOUND


@pytest.mark.parametrize(("batch", "width", "hidden"), [(1, 24, 40), (5, 130, 17)])
def test_swiglu(batch: int, width: int, hidden: int) -> None:
    values = (
        torch.randn(batch, width),
        norm_of(width, False),
        torch.randn(2 * hidden, width),
        torch.randn(width, hidden),
    )
    assert relative_rms(triton.swiglu_step(*values), reference.swiglu_step_reference(*map(wide, values))) <= ERROR_BOUND


@pytest.mark.parametrize(
    ("batch", "width", "inner", "rank", "states", "taps", "centred"),
    [
        (1, 24, 48, 2, 16, 4, True),
        (3, 40, 80, 5, 3, 1, False),
        (6, 16, 32, 1, 4, 2, True),
        (17, 32, 64, 33, 8, 8, False),
    ],
)
def test_mamba(batch: int, width: int, inner: int, rank: int, states: int, taps: int, centred: bool) -> None:
    weights, norm = weights_of(width, inner, rank, states, taps), norm_of(width, centred)
    conv, ssm = torch.randn(batch, taps - 1, inner), torch.randn(batch, inner, states)
    exact_conv, exact_ssm = conv.double(), ssm.double()
    for _ in range(2):
        x = torch.randn(batch, width)
        got = triton.mamba_step_(x, norm, weights, conv, ssm)
        expected = reference.mamba_step_reference(wide(x), wide(norm), wide(weights), exact_conv, exact_ssm)
        assert relative_rms(got, expected) <= ERROR_BOUND
        assert relative_rms(ssm, exact_ssm) <= ERROR_BOUND
        assert taps == 1 or relative_rms(conv, exact_conv) <= ERROR_BOUND


TILES = [
    triton.tile(7168, 1792, 2),
    triton.tile(1792, 3584, 2),
    triton.tile(1536, 2304, 2),
    triton.tile(8192, 2048, 2, gated=True),
    triton.Tile(16, 2, 32, 3, 4, 2),
]


@pytest.mark.parametrize("shape", TILES, ids=str)
@pytest.mark.parametrize("width", [64, 600, 1536])
def test_every_tile(monkeypatch: pytest.MonkeyPatch, shape: triton.Tile, width: int) -> None:
    """Those of large shapes in half precision too: here in fp32, where rounding hides nothing."""
    monkeypatch.setattr(triton, "tile", lambda *_, **__: shape)
    monkeypatch.setattr(triton, "_NARROW", shape)
    x, weight, residual = torch.randn(3, width), torch.randn(40, width), torch.randn(3, 40)
    got = triton.linear_step(x, weight, None, residual, torch.float32)
    assert relative_rms(got, x.double() @ weight.double().t() + residual) <= ERROR_BOUND
    gate_up, down = torch.randn(2 * 24, width) / width**0.5, torch.randn(width, 24)
    values = (x, norm_of(width, False), gate_up, down)
    assert relative_rms(triton.swiglu_step(*values), reference.swiglu_step_reference(*map(wide, values))) <= ERROR_BOUND
    if width == 64:
        weights, norm = weights_of(width, 2 * width, 9, 16, 4), norm_of(width, True)
        conv, ssm = torch.randn(3, 3, 2 * width), torch.randn(3, 2 * width, 16)
        exact_conv, exact_ssm = conv.double(), ssm.double()
        got = triton.mamba_step_(x, norm, weights, conv, ssm)
        expected = reference.mamba_step_reference(wide(x), wide(norm), wide(weights), exact_conv, exact_ssm)
        assert relative_rms(got, expected) <= ERROR_BOUND and relative_rms(ssm, exact_ssm) <= ERROR_BOUND


@pytest.mark.filterwarnings("ignore:overflow")  # exp of a large number: its gate is 0
def test_half_precision() -> None:
    """What is rounded to fp16 on the way costs what rounding costs (the interpreter has no products of bf16)."""
    weights, norm = weights_of(64, 128, 4, 16, 4), norm_of(64, True)
    low = MambaWeights(*(w if name in ("A_log", "D", "dt_bias") else w.half() for name, w in weights._asdict().items()))
    x, conv, ssm = torch.randn(5, 64).half(), torch.randn(5, 3, 128).half(), torch.randn(5, 128, 16)
    exact_conv, exact_ssm = conv.double(), ssm.double()
    got = triton.mamba_step_(x, norm, low, conv, ssm)
    expected = reference.mamba_step_reference(wide(x), wide(norm), wide(low), exact_conv, exact_ssm)
    assert got.dtype == conv.dtype == torch.float16 and ssm.dtype == torch.float32
    bound = 3 * torch.finfo(torch.float16).eps
    assert relative_rms(got, expected) <= bound and relative_rms(ssm, exact_ssm) <= bound
    assert relative_rms(conv, exact_conv) <= torch.finfo(torch.float16).eps


def test_a_row_does_not_depend_on_the_others() -> None:
    """Bit for bit: alone, at any place among others, and whatever those hold."""
    weights, norm = weights_of(24, 48, 2, 16, 4), norm_of(24, True)
    x, conv, ssm = torch.randn(9, 24), torch.randn(9, 3, 48), torch.randn(9, 48, 16)
    x[4] = float("nan")
    whole = triton.mamba_step_(x, norm, weights, conv_after := conv.clone(), ssm_after := ssm.clone())
    for rows in ([0], [8, 0], [3, 2, 1, 0, 8]):
        some_conv, some_ssm = conv[rows].clone(), ssm[rows].clone()
        assert torch.equal(triton.mamba_step_(x[rows], norm, weights, some_conv, some_ssm), whole[rows])
        assert torch.equal(some_conv, conv_after[rows]) and torch.equal(some_ssm, ssm_after[rows])
    assert whole[4].isnan().all() and not whole[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_replay_of_inputs_that_are_not_in_one_piece() -> None:
    """One step of each row, whose strides mean nothing along time; and one number of steps for all rows."""
    A_log, bias, states = torch.randn(50, 16), torch.randn(50), (torch.randn(3, 3, 50), torch.randn(3, 50, 16))
    for time in (1, 4):
        inputs = ReplayInputs(*(torch.randn(3, time, width) for width in (50, 50, 50, 16)))
        rows = ReplayInputs(*(torch.cat([v, v], -1)[..., : v.shape[-1]] for v in inputs))
        if time == 1:
            rows = ReplayInputs(*(v.as_strided(v.shape, (v.stride(0), v.shape[-1], 1)) for v in rows))
        results = []
        keep = torch.tensor([1])
        for given, steps in (
            (inputs, keep.repeat(3)),
            (rows, keep.expand(3)),
            (ReplayInputs(*map(spread, inputs)), keep.expand(3)),
        ):
            conv, ssm = (state.clone() for state in states)
            triton.mamba_replay_(given, A_log, bias, steps, conv, ssm)
            results.append((conv, ssm))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("time", "taps", "states"), [(5, 4, 16), (2, 8, 3), (3, 1, 4)])
def test_replay(time: int, taps: int, states: int) -> None:
    batch, inner = time + 1, 50
    inputs = ReplayInputs(
        torch.randn(batch, time, 2 * inner)[..., :inner],
        torch.randn(batch, time, inner),
        torch.randn(batch, time, inner) - 3,
        torch.randn(batch, time, 7 + states)[..., 7:],
    )
    A_log, bias, keep = torch.randn(inner, states), torch.randn(inner), torch.arange(batch)
    conv, ssm = torch.randn(batch, taps - 1, inner), torch.randn(batch, inner, states)
    exact_conv, exact_ssm = conv.double(), ssm.double()
    triton.mamba_replay_(inputs, A_log, bias, keep, conv, ssm)
    reference.mamba_replay_reference(wide(inputs), wide(A_log), wide(bias), keep.tolist(), exact_conv, exact_ssm)
    assert relative_rms(ssm, exact_ssm) <= ERROR_BOUND
    assert torch.equal(conv.double(), exact_conv)


@pytest.mark.parametrize("slots", [0, 1, 5])
def test_ring(slots: int) -> None:
    rings = torch.randn(2, 3, slots, 2, 5)
    mine, theirs = rings.clone(), rings.clone()
    position, other = torch.tensor([0, 4, 2**31 + 3]), torch.tensor([0, 4, 2**31 + 3])
    for _ in range(3):
        k, v = torch.randn(2, 3, 2, 5)
        triton.ring_write_(k, v, mine[0], mine[1], position)
        reference.ring_write_reference(k, v, theirs[0], theirs[1], other)
    assert torch.equal(mine, theirs) and torch.equal(position, other)
