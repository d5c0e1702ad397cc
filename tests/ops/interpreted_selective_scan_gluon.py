"""The Gluon kernels of `selective_scan` on CPU tensors, emulated, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the sums over programs are Triton's, interpreted.
"""

import pytest
import torch

from milonga.ops.selective_scan import ERROR_BOUND, HALF_GRADIENT_BOUND, gluon, gluon_common
from milonga.segments import Segments
from tests.ops.helpers import assert_strides_change_nothing, relative_rms
from tests.ops.interpreted_selective_scan import ORDER, check, gated_again, reference, scan
from tests.ops.selective_scan_gluon_emulator import Emulated, plain
from tests.ops.test_selective_scan import OPTIONAL, make


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(gluon, "suits", lambda x, A: A.shape[1] == gluon.STATES)
    for module, kernel in (
        (gluon.gluon_forward, "scan_forward"),
        (gluon.gluon_backward, "scan_backward"),
        (gluon.gluon_backward, "scan_back_ends"),
    ):
        monkeypatch.setattr(module, kernel, Emulated(getattr(module, kernel)))
    # chunks of 32 steps where there are few programs
    monkeypatch.setattr(gluon, "SHORTEST", 32)


@pytest.mark.parametrize("shape", [(1, 0, 5), (1, 1, 33), (1, 35, 65)])
def test_matches_reference(shape: tuple[int, int, int]) -> None:
    check(make(*shape, 16))


@pytest.mark.parametrize("absent", [OPTIONAL, ("z",), ("initial", "D")])
def test_options_may_be_absent(absent: tuple[str, ...]) -> None:
    check({name: value for name, value in make(1, 6, 6, 16).items() if name not in absent})


@pytest.mark.parametrize("absent", [(), ("initial", "z"), ("D",)])
def test_output_from_the_backward_pass(absent: tuple[str, ...]) -> None:
    y, again = gated_again({name: value for name, value in make(1, 35, 20, 16).items() if name not in absent})
    assert relative_rms(again, y) <= ERROR_BOUND


def test_output_from_the_backward_pass_of_packed_sequences() -> None:
    segments = Segments.from_lengths((0, 35, 0, 3))
    y, again = gated_again(make(1, segments.total, 8, 16, segments.count), segments)
    assert relative_rms(again, y) <= ERROR_BOUND


def test_strides_change_nothing() -> None:
    inputs = make(1, 40, 20, gluon.STATES)
    assert_strides_change_nothing(scan(ORDER), [inputs[name] for name in ORDER])


def test_only_the_final_state_used() -> None:
    """No upstream gradient of y: what it would have reached is zero, not left out."""
    inputs = make(1, 33, 8, 16)
    results = []
    for kind in (torch.float32, torch.float64):
        leaves = {name: value.to(kind).requires_grad_() for name, value in inputs.items()}
        run = scan(ORDER) if kind == torch.float32 else reference(ORDER)
        final = run(*leaves.values())[1].sum()
        results.append(torch.autograd.grad(final, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, got, expected in zip(ORDER, *results, strict=True):
        assert relative_rms(got, expected) <= ERROR_BOUND, name


@pytest.mark.parametrize("programs", [1, 100])
def test_whole_sequences(programs: int, monkeypatch) -> None:
    """In programs of 64 channels, and of 32."""
    monkeypatch.setattr(gluon, "ENOUGH", 0)
    monkeypatch.setattr(gluon, "ENOUGH_BACKWARD", 0)
    monkeypatch.setattr(gluon, "PROGRAMS", programs)
    check(make(1, 35, 70, 16))


@pytest.mark.parametrize("first", [0.8, 0.2])
def test_chunks_fill_the_gpu_once_or_twice(first: float) -> None:
    for parallel in range(1, gluon.PROGRAMS):
        programs = gluon._pieces(parallel, first) * parallel
        turns = -(-programs // gluon.PROGRAMS)
        assert turns <= 2
        assert programs > turns * gluon.PROGRAMS - parallel


def test_a_rest_fits_beside_the_chunks() -> None:
    """Of MambaByte's shape a short fourth chunk makes three shorter; where no place is free none is cut off."""
    assert gluon._length(4 * 8192, 4, False, 32, gluon.ENOUGH_BACKWARD, 0.2, rest=True) == (2688, 2)
    assert gluon._length(4 * 8192, 4, False, 32, gluon.ENOUGH_BACKWARD, 0.2, rest=False) == (2752, 2)
    for sequences in range(1, 5):
        for blocks in range(1, 200):
            steps, parallel = 8192, sequences * blocks
            length, _ = gluon._length(sequences * steps, sequences, False, blocks, 250, 0.2, rest=True)
            even, _ = gluon._length(sequences * steps, sequences, False, blocks, 250, 0.2, rest=False)
            assert length <= even
            if length < even:
                whole, rest = divmod(steps, length)
                turns = -(-whole * parallel // gluon.PROGRAMS)
                free = turns * gluon.PROGRAMS - whole * parallel
                assert -(-parallel // free) * rest < length


def test_the_last_chunks_come_last() -> None:
    """Two sequences of 64, 64 and 2 steps: a slot says where results lie, chunk by chunk of each sequence."""
    slot_of = plain(gluon_common.slot_of)
    slots = [int(slot_of(torch.as_tensor(place), 130, 2, 64, PACKED=False)) for place in range(6)]
    assert slots == [0, 3, 1, 4, 2, 5]
    assert [int(slot_of(torch.as_tensor(place), 130, 2, 64, PACKED=True)) for place in range(6)] == list(range(6))


@pytest.mark.parametrize(("steps", "fine", "finer"), [(130, 384, 1), (150, 16, 2), (640, 32, 4)])
def test_short_chunks_of_several_sequences(steps: int, fine: int, finer: int, monkeypatch) -> None:
    """Each sequence in two chunks and a rest, with shorter ones in the first pass and without."""
    monkeypatch.setattr(
        gluon, "_with_a_rest", lambda steps, parallel, pieces, length, unit: -(-steps // (3 * unit)) * unit
    )
    monkeypatch.setattr(gluon, "PROGRAMS", 5)
    monkeypatch.setattr(gluon, "FINE", fine)
    length, pieces = gluon._length(2 * steps, 2, False, 1, gluon.ENOUGH_BACKWARD, 0.2, rest=True)
    assert pieces == finer
    assert steps % length > 0
    check(make(2, steps, 8, 16))


def test_no_rest_where_time_is_walked_in_parts(monkeypatch) -> None:
    """Sums of dB and dC have a slot for each chunk: a rest would take a whole one."""
    x, enough = torch.empty(4, 8192, 2048, device="meta"), gluon.ENOUGH_BACKWARD
    assert gluon._Plan(x, None, enough, 0.2, rest=True).length == 2688
    monkeypatch.setattr(gluon, "WORKSPACE", 2**20)
    assert gluon._Plan(x, None, enough, 0.2, rest=True).length == 2752


def test_finer_chunks_in_the_first_pass(monkeypatch) -> None:
    monkeypatch.setattr(gluon, "FINE", 32)
    monkeypatch.setattr(gluon, "PROGRAMS", 2)
    segments = Segments.from_lengths((0, 130, 33))
    check(make(1, segments.total, 8, 16, segments.count), segments)
    check(make(1, 130, 8, 16))


def test_parts(monkeypatch) -> None:
    monkeypatch.setattr(gluon, "SHORTEST", 64)
    monkeypatch.setattr(gluon, "WORKSPACE", 1000)
    check(make(1, 70, 20, 16))


@pytest.mark.parametrize("lengths", [(0,), (0, 35, 0, 33)])
def test_packed(lengths: tuple[int, ...]) -> None:
    segments = Segments.from_lengths(lengths)
    check(make(1, segments.total, 20, 16, segments.count), segments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """What stays in the dtype is as good as its rounding. Steps small and large: their slopes come from delta."""
    low = make(1, 37, 24, 16)
    low["dt"] = low["dt"] * 4 - 3
    low = {n: v.to(dtype) if n in ("x", "dt", "B", "C", "z") else v for n, v in low.items()}
    upstream = [torch.randn(1, 37, 24).to(dtype), torch.randn(1, 24, 16)]
    results = []
    for run, double in ((scan(ORDER), False), (reference(ORDER), True)):
        leaves = [(v.double() if double else v.clone()).requires_grad_() for v in low.values()]
        outputs = run(*leaves)
        gradients = torch.autograd.grad(
            outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        )
        results.append([*(o.detach() for o in outputs), *gradients])
    rounding = torch.finfo(dtype).eps / 2
    for name, got, expected in zip(("y", "final", *ORDER), *results, strict=True):
        kind = dtype if name in ("y", "x", "dt", "B", "C", "z") else torch.float32
        assert got.dtype == kind, name
        bound = HALF_GRADIENT_BOUND if kind == torch.float32 else rounding
        assert relative_rms(got, expected) <= bound, name
