"""One decoded step of a Mamba layer in one kernel, against its definition in float64."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.ops import cpu_pool
from milonga.ops.linear import quantize
from milonga.ops.mamba_step import (
    ERROR_BOUND,
    StepResult,
    StepWeights,
    StoredWeight,
    cpu,
    cpu_kernels,
    has_step,
    join_steps,
    mamba_step,
    mamba_step_reference,
    mamba_steps,
    prepare_step,
)
from milonga.ops.rms_norm import rms_norm_reference
from milonga.ops.selective_scan import selective_scan
from tests.ops.helpers import relative_rms

STORAGES = ("fp32", "bf16", "int8")
SIZES = {"width": 40, "inner": 75, "states": 16, "rank": 5, "taps": 4}


def _weights(storage: str, *, width: int, inner: int, states: int, rank: int, taps: int) -> StepWeights:
    def stored(features: int, inputs: int) -> StoredWeight:
        weight = torch.randn(features, inputs) / inputs**0.5
        if storage == "int8":
            return StoredWeight(*quantize(weight))
        return StoredWeight(weight.bfloat16() if storage == "bf16" else weight, None)

    return StepWeights(
        stored(2 * inner, width), torch.randn(inner, taps), torch.randn(inner), stored(rank + 2 * states, inner),
        stored(inner, rank), -torch.randn(inner, states).exp(), torch.randn(inner), torch.randn(inner) - 2,
        stored(width, inner),
    )  # fmt: skip


def _inputs(rows: int, *, width: int, inner: int, states: int, taps: int, **_: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, width), torch.randn(rows, taps - 1, inner), torch.randn(rows, inner, states)


def _step(x: torch.Tensor, weights: StepWeights, conv: torch.Tensor, ssm: torch.Tensor) -> StepResult:
    with torch.no_grad():
        return mamba_step(x, weights, conv, ssm, backend="cpu")


@pytest.mark.parametrize("storage", STORAGES)
@given(data=st.data())
@settings(max_examples=40)
def test_matches_float64(storage: str, data: st.DataObject) -> None:
    """Every result, with sizes around those of vectors and of pieces.

    Sums of few terms may all but cancel, and then no bound relative to what is left holds: see the next test.
    """
    draw = data.draw
    sizes = {
        "width": draw(st.integers(8, 150)),
        "inner": draw(st.integers(24, 150)),
        "states": draw(st.integers(4, 64)),
        "rank": draw(st.integers(4, 70)),
        "taps": draw(st.integers(1, 5)),
    }
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weights, (x, conv, ssm) = _weights(storage, **sizes), _inputs(draw(st.integers(1, 7)), **sizes)
    before = conv.clone(), ssm.clone()
    got = _step(x, weights, conv, ssm)
    assert torch.equal(conv, before[0]) and torch.equal(ssm, before[1])  # the state is read and not written
    expected = mamba_step_reference(x.double(), weights, conv.double(), ssm.double())
    for name, value, wanted in zip(got._fields, got, expected, strict=True):
        assert value.shape == wanted.shape and value.dtype == torch.float32
        assert relative_rms(value, wanted) <= ERROR_BOUND, name
    kept = torch.cat([conv, got.column[:, None]], 1)[:, 1:]
    assert torch.equal(got.conv, kept)  # columns are moved, not computed


@given(data=st.data())
@settings(max_examples=40)
def test_the_smallest_sizes(data: st.DataObject) -> None:
    sizes = {name: data.draw(st.integers(1, 9)) for name in SIZES}
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    weights, (x, conv, ssm) = _weights("fp32", **sizes), _inputs(2, **sizes)
    got = _step(x, weights, conv, ssm)
    expected = mamba_step_reference(x.double(), weights, conv.double(), ssm.double())
    for value, wanted in zip(got, expected, strict=True):
        assert torch.allclose(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_matches_float64_at_the_size_of_a_model() -> None:
    torch.manual_seed(0)
    sizes = {"width": 768, "inner": 1536, "states": 16, "rank": 48, "taps": 4}
    weights, inputs = _weights("int8", **sizes), _inputs(1, **sizes)
    got = _step(inputs[0], weights, *inputs[1:])
    expected = mamba_step_reference(inputs[0].double(), weights, *(state.double() for state in inputs[1:]))
    assert all(relative_rms(a, b) <= ERROR_BOUND for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shift", [-300.0, -90.0, -20.0, 20.0, 300.0])
def test_step_sizes_near_zero_and_far_from_it(shift: float) -> None:
    """dt from 0 to hundreds: what is small is right relatively, and a state that is forgotten is 0, not NaN."""
    torch.manual_seed(1)
    weights, (x, conv, ssm) = _weights("fp32", **SIZES), _inputs(2, **SIZES)
    weights = weights._replace(dt_bias=weights.dt_bias + shift)
    got = _step(x, weights, conv, ssm)
    expected = mamba_step_reference(x.double(), weights, conv.double(), ssm.double())
    assert relative_rms(got.ssm, expected.ssm) <= ERROR_BOUND and relative_rms(got.y, expected.y) <= ERROR_BOUND


def test_the_recurrence_is_that_of_the_scan() -> None:
    torch.manual_seed(2)
    weights, (x, conv, ssm) = _weights("fp32", **SIZES), _inputs(3, **SIZES)
    with torch.no_grad():
        got = mamba_step(x, weights, conv, ssm)
        u, dt, B = got.x[:, None], got.dt[:, None], got.B[:, None]
        _, after = selective_scan(u, dt, weights.A, B, B, dt_bias=weights.dt_bias, initial=ssm)
    assert relative_rms(got.ssm, after) <= 2e-7


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads_or_on_other_rows(
    storage: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_pool, "INLINE_SHARED", 0)
    torch.manual_seed(3)
    sizes = SIZES | {"width": 200, "inner": 330}
    weights, (x, conv, ssm) = _weights(storage, **sizes), _inputs(5, **sizes)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [_step(x[i : i + 1], weights, conv[i : i + 1], ssm[i : i + 1]) for i in range(5)]
        torch.set_num_threads(threads)
        for _ in range(20):  # threads come early, late, and not at all
            got = _step(x, weights, conv, ssm)
            for value, rows in zip(got, zip(*alone, strict=True), strict=True):
                assert torch.equal(value, torch.cat(rows))
    finally:
        torch.set_num_threads(before)


def test_two_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared is only read: two threads of Python may step the same layer."""
    monkeypatch.setattr(cpu_pool, "INLINE_SHARED", 0)
    torch.manual_seed(4)
    prepared = prepare_step(_weights("fp32", **SIZES))
    assert prepared is not None
    inputs = [_inputs(1, **SIZES) for _ in range(2)]
    expected = [cpu.forward(prepared, *one) for one in inputs]
    wrong: list[int] = []

    def caller(which: int) -> None:
        for _ in range(200):
            got = cpu.forward(prepared, *inputs[which])
            if not all(torch.equal(a, b) for a, b in zip(got, expected[which], strict=True)):
                wrong.append(which)

    callers = [threading.Thread(target=caller, args=(which,)) for which in range(2)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert wrong == []


@pytest.mark.parametrize("storage", STORAGES)
@given(
    count=st.integers(1, 4), rows=st.integers(1, 7), branch=st.booleans(), taps=st.integers(1, 4), seed=st.integers(0)
)
@settings(max_examples=20)
def test_layers_in_one_kernel_match_float64(
    storage: str, count: int, rows: int, branch: bool, taps: int, seed: int
) -> None:
    """Norm, layer and residual of several layers, and the state of each."""
    torch.manual_seed(seed % 2**31)
    sizes = SIZES | {"taps": taps}
    layers = [_weights(storage, **sizes) for _ in range(count)]
    norms = [(torch.randn(40), 1e-5 * 10**k) for k in range(count)]
    states = [_inputs(rows, **sizes)[1:] for _ in range(count)]
    x, added = torch.randn(rows, 40), torch.randn(rows, 40) if branch else None
    prepared = [one for one in map(prepare_step, layers) if one is not None]
    joined = join_steps(prepared, norms)
    assert joined is not None
    convs, ssms = zip(*states, strict=True)
    stream, output, conv_after, ssm_after = mamba_steps(x, added, joined, convs, ssms)
    wide, wide_added = x.double(), None if added is None else added.double()
    for k, (weights, (weight, eps), (conv, ssm)) in enumerate(zip(layers, norms, states, strict=True)):
        wide = wide if wide_added is None else wide + wide_added
        result = mamba_step_reference(
            rms_norm_reference(wide, weight.double(), eps), weights, conv.double(), ssm.double()
        )
        wide_added = result.y
        # What a layer makes of the one before is that one's error too.
        assert relative_rms(conv_after[k], result.conv) <= ERROR_BOUND * (k + 1)
        assert relative_rms(ssm_after[k], result.ssm) <= ERROR_BOUND * (k + 1)
    assert wide_added is not None
    assert relative_rms(stream, wide) <= ERROR_BOUND * count
    assert relative_rms(output, wide_added) <= ERROR_BOUND * count


def test_layers_that_cannot_be_joined() -> None:
    norm = (torch.ones(40), 1e-5)
    one, other = prepare_step(_weights("fp32", **SIZES)), prepare_step(_weights("bf16", **SIZES))
    wider = prepare_step(_weights("fp32", **SIZES | {"states": 8}))
    assert one is not None and other is not None and wider is not None
    assert join_steps([one, other], [norm, norm]) is None and join_steps([one, wider], [norm, norm]) is None
    assert join_steps([one], [(torch.ones(40).double(), 1e-5)]) is None
    joined = join_steps([one], [norm])
    assert joined is not None
    x, conv, ssm = _inputs(2, **SIZES)
    with pytest.raises(ValueError, match="1 layers, but states of 2"):
        mamba_steps(x, None, joined, [conv, conv], [ssm, ssm])
    with pytest.raises(ValueError, match="branch must be"):
        mamba_steps(x, x[:1], joined, [conv], [ssm])
    with pytest.raises(ValueError, match="states must be"):
        mamba_steps(x, None, joined, [conv[:1]], [ssm])
    with pytest.raises(ValueError, match="states must be"):
        mamba_steps(x, None, joined, [conv.double()], [ssm])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("where", ["x", "conv", "ssm", "in_proj", "A", "D", "dt_bias", "conv_weight"])
def test_nan_comes_out_where_it_belongs(storage: str, where: str) -> None:
    """The same numbers are NaN as in the definition, of each result."""
    torch.manual_seed(5)
    weights, (x, conv, ssm) = _weights(storage, **SIZES), _inputs(2, **SIZES)
    nan = float("nan")
    if where in ("x", "conv", "ssm"):
        {"x": x, "conv": conv, "ssm": ssm}[where][1].view(-1)[3] = nan
    elif where == "in_proj":
        stored = weights.in_proj
        (stored.weight if stored.scale is None else stored.scale).view(-1)[3] = nan
    else:
        {"A": weights.A, "D": weights.D, "dt_bias": weights.dt_bias, "conv_weight": weights.conv_weight}[where].view(
            -1
        )[3] = nan
    got = _step(x, weights, conv, ssm)
    expected = mamba_step_reference(x, weights, conv, ssm)
    assert any(bool(value.isnan().any()) for value in got)
    for name, value, wanted in zip(got._fields, got, expected, strict=True):
        assert torch.equal(value.isnan(), wanted.isnan()), name


def test_gates_that_are_wide_open_or_shut() -> None:
    torch.manual_seed(6)
    weights, (x, conv, ssm) = _weights("fp32", **SIZES), _inputs(1, **SIZES)
    weights.in_proj.weight[SIZES["inner"] :] *= 1e4
    got = _step(x, weights, conv, ssm)
    expected = mamba_step_reference(x.double(), weights, conv.double(), ssm.double())
    assert all(relative_rms(a, b) <= ERROR_BOUND for a, b in zip(got, expected, strict=True))


def test_strided_states_and_rows() -> None:
    torch.manual_seed(7)
    weights, (x, conv, ssm) = _weights("fp32", **SIZES), _inputs(4, **SIZES)
    strided = x[::2], conv[::2], ssm.transpose(1, 2).contiguous().transpose(1, 2)[::2]
    expected = _step(x[::2].contiguous(), weights, conv[::2].contiguous(), ssm[::2].contiguous())
    got = _step(strided[0], weights, *strided[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_prepared_weights_are_read_where_they_lie() -> None:
    torch.manual_seed(8)
    weights, inputs = _weights("fp32", **SIZES), _inputs(1, **SIZES)
    prepared = prepare_step(weights)
    assert prepared is not None
    before = mamba_step(inputs[0], prepared, *inputs[1:])
    weights.out_proj.weight.mul_(2)
    assert torch.equal(mamba_step(inputs[0], prepared, *inputs[1:]).y, 2 * before.y)


def test_what_the_kernel_does_not_take() -> None:
    weights, (x, conv, ssm) = _weights("fp32", **SIZES), _inputs(1, **SIZES)
    mixed = weights._replace(out_proj=_weights("bf16", **SIZES).out_proj)
    assert prepare_step(mixed) is None
    with torch.no_grad():
        assert has_step(x, conv, ssm) and not has_step(x, conv, ssm.double())
        assert not has_step(x.expand(8, -1), conv, ssm) and not has_step(x[:0], conv, ssm)
    assert not has_step(x, conv, ssm)  # gradients are on
    with pytest.raises(ValueError, match="takes products stored in one way"):
        mamba_step(x, mixed, conv, ssm, backend="cpu")
    assert relative_rms(mamba_step(x, mixed, conv, ssm).y, mamba_step(x, mixed, conv, ssm, backend="reference").y) == 0
    with pytest.raises(ValueError, match="float32"):
        mamba_step(x.double(), weights, conv.double(), ssm.double(), backend="cpu")
    with pytest.raises(ValueError, match="x must be \\[B, 40\\]"):
        mamba_step(x[:, 1:], weights, conv, ssm)
    with pytest.raises(ValueError, match="conv must be \\[B W-1 E\\]"):
        mamba_step(x, weights, conv[:, 1:], ssm)
    with pytest.raises(ValueError, match="ssm must be \\[B E N\\]"):
        mamba_step(x, weights, conv, ssm[:, 1:])
    prepared = prepare_step(weights)
    assert prepared is not None
    with pytest.raises(ValueError, match="ssm must be \\[B E N\\]"):
        mamba_step(x, prepared, conv, ssm[:, 1:])
    with pytest.raises(ValueError, match="take float32 on the CPU"):
        mamba_step(x.double(), prepared, conv.double(), ssm.double())


def test_one_signature_for_each_storage() -> None:
    for storage in STORAGES:
        for rows in (1, 3):
            inputs = _inputs(rows, **SIZES)
            _step(inputs[0], _weights(storage, **SIZES), *inputs[1:])
    assert len(cpu_kernels.steps.signatures) == 3


def test_a_late_thread_finds_everything_done() -> None:
    """A thread that comes after the step has ended touches none of its tensors."""
    torch.manual_seed(9)
    prepared = prepare_step(_weights("fp32", **SIZES))
    assert prepared is not None
    counters = np.full((1, cpu.COUNTERS), 10**6, np.int64)
    call = np.zeros((1, cpu_kernels.CALL_SIZE), np.int64)  # address 0: any access would end the process
    call[0, cpu_kernels.ROWS] = 1
    cpu_kernels.steps(prepared.like, prepared.table, call, counters)
