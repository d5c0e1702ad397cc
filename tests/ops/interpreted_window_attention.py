"""The Triton kernels of `window_attention` under Triton's interpreter, on CPU tensors, against the float64 reference.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch
from torch import Tensor

from milonga.ops.window_attention import ERROR_BOUND, triton, window_attention
from milonga.segments import Segments
from tests.ops.helpers import relative_rms, spread
from tests.ops.interpreter import prepare
from tests.ops.test_window_attention import ring

prepare()
# NumPy warns about what the kernels mean to do
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(lengths: tuple[int, ...], heads: int, groups: int, widths: tuple[int, int], past: tuple | None, packed: bool):
    """-> (q, k, v and with a past the rings; position or None; segments or None). Empty slots hold NaN."""
    batch, time = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    inputs = [torch.randn(batch, time, h, w) for h, w in ((heads, widths[0]), (groups, widths[0]), (groups, widths[1]))]
    position = None
    if past is not None:
        slots, positions = past
        position = torch.tensor(positions)
        for width in widths:
            whole = torch.randn(len(positions), max(positions), groups, width)
            inputs.append(torch.stack([ring(w, p, slots) for w, p in zip(whole, positions, strict=True)]))
    return inputs, position, Segments.from_lengths(lengths) if packed else None


def check(inputs: list[Tensor], position: Tensor | None, segments: Segments | None, window: int | None, scale: float):
    """Output and every gradient; the rings' slots without a key get none."""
    leaves = [t.double().requires_grad_() for t in inputs]
    past_k, past_v = leaves[3:] or (None, None)
    expected = window_attention(
        *leaves[:3], past_k=past_k, past_v=past_v, position=position, segments=segments, window=window, scale=scale,
        backend="reference",
    )  # fmt: skip
    upstream = torch.randn(expected.shape)
    exact = torch.autograd.grad(expected, leaves, upstream.double())
    q, k, v, *past = inputs
    arguments = (q, k, v, *(past or (None, None)), position, None if segments is None else segments.offsets)
    y, stats = triton.forward(*arguments, window, scale)
    gradients = triton.backward(upstream, *arguments, window, scale, y, stats)
    names = ("y", "q", "k", "v", "past_k", "past_v")
    for name, got, right in zip(names, (y, *gradients), (expected.detach(), *exact), strict=False):
        if right.norm() < 1e-12:  # whoever sees one key only gives scores no gradient
            assert got.abs().max() < 1e-5, name
        else:
            assert relative_rms(got, right) <= ERROR_BOUND, f"{name}: {relative_rms(got, right):.2e}"


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "widths", "window", "past", "packed"),
    [
        ((70,), 2, 2, (16, 16), None, None, False),
        ((77, 77), 3, 1, (20, 16), 40, None, False),
        ((65,), 2, 1, (16, 24), 1, None, False),
        ((0, 40, 1, 0, 59), 2, 1, (16, 16), 33, None, True),
        ((50, 50), 2, 1, (16, 16), 20, (19, (5, 100)), False),
        ((40, 0, 50), 2, 2, (16, 16), None, (40, (5, 30, 33)), True),
        ((40, 0, 50), 2, 2, (16, 16), 50, (57, (150, 30, 33)), True),
        ((35, 35, 35), 2, 1, (20, 16), None, (150, (150, 64, 0)), False),
        # blocks have 64 queries: the first, none or two of them see an empty, a partly and a quite filled ring
        ((130, 130, 130), 2, 1, (16, 16), 65, (64, (0, 40, 300)), False),
        ((129, 129, 129), 1, 1, (16, 16), 66, (65, (0, 64, 65)), False),
        ((64, 64, 64), 1, 1, (16, 16), 64, (63, (0, 62, 63)), False),
        ((70, 70), 1, 1, (16, 16), 1, (3, (0, 5)), False),
        ((130, 63, 65, 64), 2, 1, (16, 16), 65, (70, (0, 40, 300, 65)), True),
    ],
)
def test_matches_reference(lengths, heads, groups, widths, window, past, packed) -> None:
    check(*make(lengths, heads, groups, widths, past, packed), window, -0.3 if heads == 3 else 0.25)


def check_half(inputs: list[Tensor], position: Tensor | None, window: int | None, upstream: Tensor) -> None:
    """Every gradient of half precision, not packed."""
    leaves = [t.double().requires_grad_() for t in inputs]
    past_k, past_v = leaves[3:] or (None, None)
    expected = window_attention(
        *leaves[:3], past_k=past_k, past_v=past_v, position=position, window=window, scale=0.25, backend="reference"
    )
    exact = torch.autograd.grad(expected, leaves, upstream.double())
    arguments = (*inputs, *(() if inputs[3:] else (None, None)), position, None, window, 0.25)
    y, stats = triton.forward(*arguments)
    gradients = triton.backward(upstream, *arguments, y, stats)
    for got, right in zip(gradients, exact, strict=False):
        if right.norm() < 1e-12:  # one key is seen
            assert got.abs().max() < 5e-3
        else:
            assert relative_rms(got, right) <= 2e-3


def plan_of(q: Tensor, k: Tensor, v: Tensor) -> triton._Plan:
    return triton._Plan(q, k, v, None, None, None, None, 65, 0.25)


@pytest.mark.parametrize(
    ("batch", "time", "window"),
    [(1, 150, 65), (2, 128, 100), (1, 64, None), (1, 77, 1), (2, 128, 1), (1, 193, None), (1, 130, 64), (1, 1, 65)],
)
@pytest.mark.parametrize("past", [None, 40])
def test_gradients_by_descriptors(batch: int, time: int, window: int | None, past: int | None) -> None:
    """Of half precision: the kernel of keys reads queries, and that of queries keys, by descriptors of all rows."""
    slots = (max(window or 0, past + 1) - 1 + 3, (past,) * batch) if past else None
    inputs, position, _ = make((time,) * batch, 4, 2, (16, 16), slots, False)
    inputs = [t.half() for t in inputs]
    q, k, v = inputs[:3]
    upstream = torch.randn_like(q)
    plan = plan_of(q, k, v)
    assert triton._described(plan, q, upstream, plan.described_tuning.keys.queries) is not None
    assert triton._described(plan, k, v, plan.described_tuning.queries.keys) is not None
    check_half(inputs, position, window, upstream)


@pytest.mark.parametrize(("widths", "time"), [((128, 128), 150), ((256, 256), 70), ((64, 64), 129), ((64, 128), 65)])
def test_gradients_by_descriptors_of_wide_heads(widths: tuple[int, int], time: int) -> None:
    fused = torch.randn(1, time, 4 * widths[0] + 2 * widths[1]).half()  # heads are slices of one projection
    q, k, v = fused.split([2 * widths[0], 2 * widths[0], 2 * widths[1]], 2)
    q, k, v = q.unflatten(2, (2, widths[0])), k.unflatten(2, (2, widths[0])), v.unflatten(2, (2, widths[1]))
    upstream = torch.randn(1, time, 2, widths[1]).half()
    assert triton._described(plan_of(q, k, v), k, v, 64) is not None
    check_half([q / 4, k, v], None, 66, upstream)


@pytest.mark.parametrize("time", [128, 100])
def test_rows_do_not_meet_a_neighbour_s_nan(time: int) -> None:
    """With descriptors, and where blocks would reach into the next row without."""
    inputs = [t.half() for t in make((time,) * 3, 4, 2, (16, 16), None, False)[0]]
    upstream = torch.randn_like(inputs[0])
    described = triton._described(plan_of(*inputs), *inputs[1:], 64)
    assert (described is None) == (time == 100)

    def gradients() -> list[Tensor]:
        arguments = (*inputs, None, None, None, None, 65, 0.25)
        return [t[1].clone() for t in triton.backward(upstream, *arguments, *triton.forward(*arguments))[:3]]

    clean = gradients()
    for tensor in (*inputs, upstream):
        tensor[0], tensor[2] = float("nan"), float("nan")
    assert all(torch.equal(a, b) for a, b in zip(clean, gradients(), strict=True))


@pytest.mark.parametrize("which", ["queries", "keys", "values", "gradient"])
def test_steps_that_share_memory_have_no_descriptor(which: str) -> None:
    """As the gradient of a sum over time has: the same for every step."""
    q, k, v = (t.half() for t in make((128,), 2, 2, (16, 16), None, False)[0])
    once = torch.randn(1, 1, 2, 16).half().expand(1, 128, 2, 16)
    grad = torch.randn(1, 128, 2, 16).half()
    q, k, v, grad = (
        once if name == which else tensor
        for name, tensor in (("queries", q), ("keys", k), ("values", v), ("gradient", grad))
    )
    plan = plan_of(q, k, v)
    assert (triton._described(plan, q, grad, 64) is None) == (which in ("queries", "gradient"))
    assert (triton._described(plan, k, v, 64) is None) == (which in ("keys", "values"))
    check_half([q, k, v], None, 65, grad)


def test_blocks_of_every_width() -> None:
    """Those for descriptors are of width 128 in half precision alone."""
    for dtype in (torch.float16, torch.bfloat16):
        for width in (16, 64, 256):
            assert triton.tuning(dtype, width, described=True) == triton.tuning(dtype, width)
        narrow, wide = triton.tuning(dtype, 128, described=True), triton.tuning(dtype, 128)
        assert narrow.forward == wide.forward
        assert narrow.keys == narrow.queries == triton.Blocks(64, 64, 4, 2)
        assert wide.keys.keys == wide.queries.queries == 128
    for width in (16, 128, 256):
        assert triton.tuning(torch.float32, width, described=True) == triton.SINGLE[width]


@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 129, 130, 131, 500, None])
@pytest.mark.parametrize("packed", [False, True])
def test_each_block_of_queries_is_launched_once(window: int | None, packed: bool) -> None:
    """And with the past where a query of it sees the ring."""
    lengths, slots = (130, 64, 1) if packed else (130, 130, 130), 600 if window is None else max(window - 1, 1)
    inputs, position, segments = make(lengths, 1, 1, (16, 16), (slots, (0, 40, 600)), packed)
    plan = triton._Plan(*inputs, position, None if segments is None else segments.offsets, window, 0.25)
    found = [
        (first, past)
        for (programs, _, _), low, high, past in plan.query_launches(64)
        for first in range(low, high, 64)
        if packed or (first - low) // 64 < programs
    ]
    seen = {first: window is None or first < window - 1 for first in range(0, plan.time, 64)}
    assert sorted(found) == sorted(seen.items())


@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "widths", "window", "past"),
    [
        ((1, 1), 4, 2, (16, 24), 20, (19, (5, 100))),
        ((4, 4), 4, 1, (20, 16), 160, (159, (0, 300))),
        ((16, 16), 2, 2, (16, 16), None, (150, (5, 133))),
        ((3, 3), 2, 2, (16, 16), 10, (30, (5, 99))),
    ],
)
def test_decoding_matches_reference(lengths, heads, groups, widths, window, past) -> None:
    inputs, position, segments = make(lengths, heads, groups, widths, past, False)
    plan = triton._Plan(*inputs, position, None, window, 0.25)
    assert triton._way(plan, window) == "decode"
    check(inputs, position, segments, window, 0.25)


@pytest.mark.parametrize("time", [1, 40])
@pytest.mark.parametrize("turned", [spread, lambda position: position[:1].expand(2)])
def test_positions_that_are_not_in_one_piece(time: int, turned) -> None:
    inputs, position, _ = make((time, time), 2, 1, (16, 16), (19, (12, 12)), False)
    check(inputs, turned(position), None, 20, 0.25)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("window", [10, None])
def test_nan_reaches_exactly_those_who_see_it(which: int, window: int | None) -> None:
    inputs = [torch.randn(1, 70, 2, 8) for _ in range(3)]
    clean = triton.forward(*inputs, None, None, None, None, window, 0.3)[0]
    inputs[which][0, 50, 1] = float("nan")
    y = triton.forward(*inputs, None, None, None, None, window, 0.3)[0]
    reach = slice(50, 51 if which == 0 else 50 + (window or 20))
    assert y[0, reach, 1].isnan().all()
    y[0, reach, 1] = clean[0, reach, 1]
    assert torch.equal(y, clean)
