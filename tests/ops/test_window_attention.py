import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from milonga.ops.window_attention import ERROR_BOUND, window_attention, window_attention_reference
from milonga.segments import Segments
from tests.ops.helpers import assert_matches, relative_rms

# Bound of the relative RMS difference that cutting a text may make.
SPLIT_BOUND = 3e-7


def ring(values: Tensor, position: int, slots: int) -> Tensor:
    """The last keys of `values` `[T, G, K]` before `position` as a ring `[slots, G, K]`, NaN where no key is."""
    result = torch.full((slots, *values.shape[1:]), float("nan"), dtype=values.dtype)
    for at in range(max(0, position - slots), position):
        result[at % slots] = values[at]
    return result


@st.composite
def calls(draw) -> dict:
    """Sizes and options of one call; past and packing included."""
    groups, repeats = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    packed, past = draw(st.booleans()), draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3))
    if not packed:
        lengths = [lengths[0]] * len(lengths)
    longest = max(lengths)
    window = draw(st.sampled_from([None, 1, 2, max(1, longest - 1), max(1, longest), longest + 1, 33, 64, 70]))
    positions = [0] * len(lengths)
    slots = 0
    if past:
        positions = draw(st.lists(st.integers(0, 200), min_size=len(lengths), max_size=len(lengths)))
        needed = max(positions) if window is None else window - 1
        slots = needed + draw(st.sampled_from([0, 0, 1, 7]))
    return {
        "heads": groups * repeats,
        "groups": groups,
        "width": draw(st.sampled_from([1, 4, 16, 20, 33, 64])),
        "value_width": draw(st.sampled_from([1, 5, 16, 32, 40])),
        "lengths": lengths,
        "packed": packed,
        "past": past,
        "positions": positions,
        "slots": slots,
        "window": window,
        "scale": draw(st.sampled_from([None, 0.3])),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(calls())
def test_matches_reference(call: dict) -> None:
    torch.manual_seed(call["seed"])
    lengths, groups = call["lengths"], call["groups"]
    batch, time = (1, sum(lengths)) if call["packed"] else (len(lengths), lengths[0])
    segments = Segments.from_lengths(lengths) if call["packed"] else None
    inputs = [
        torch.randn(batch, time, call["heads"], call["width"]),
        torch.randn(batch, time, groups, call["width"]),
        torch.randn(batch, time, groups, call["value_width"]),
    ]
    position = None
    if call["past"]:
        position = torch.tensor(call["positions"])
        for width in (call["width"], call["value_width"]):
            whole = torch.randn(len(lengths), 200, groups, width)
            inputs.append(
                torch.stack([ring(w, p, call["slots"]) for w, p in zip(whole, call["positions"], strict=True)])
            )

    def run(op, *tensors, **options):
        q, k, v, *past = tensors
        past_k, past_v = past or (None, None)
        return [
            op(
                q, k, v, past_k=past_k, past_v=past_v, position=position, window=call["window"], segments=segments,
                scale=call["scale"], **options,
            )
        ]  # fmt: skip

    assert_matches(
        lambda *t: run(window_attention, *t, backend="cpu"),
        lambda *t: run(window_attention_reference, *t),
        inputs,
        ERROR_BOUND,
    )


def test_reference_is_masked_softmax() -> None:
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    y = window_attention_reference(q, k, v, window=3)
    for t in range(9):
        seen = slice(max(0, t - 2), t + 1)
        for h in range(2):
            weights = torch.softmax(k[0, seen, h] @ q[0, t, h] / 2.0, 0)
            torch.testing.assert_close(y[0, t, h], weights @ v[0, seen, h])


@pytest.mark.parametrize(("window", "slots"), [(4, 3), (4, 5), (None, 6), (1, 0)])
def test_reference_gradients(window: int | None, slots: int) -> None:
    q = torch.randn(1, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    past_k = torch.randn(2, slots, 2, 3, dtype=torch.float64, requires_grad=True)
    past_v = torch.randn(2, slots, 2, 2, dtype=torch.float64, requires_grad=True)
    position, segments = torch.tensor([5, 1]), Segments([0, 2, 5])

    def op(*tensors):
        return window_attention_reference(
            *tensors[:3], past_k=tensors[3], past_v=tensors[4], position=position, segments=segments, window=window
        )

    assert torch.autograd.gradcheck(op, (q, k, v, past_k, past_v))


@given(st.data())
def test_split_law(data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    window = data.draw(st.sampled_from([1, 2, 20, 64, 100, None]))
    time = 300
    q, k, v = torch.randn(1, time, 4, 24), torch.randn(1, time, 2, 24), torch.randn(1, time, 2, 24)
    whole = window_attention(q, k, v, window=window, backend="cpu")
    cuts = sorted(data.draw(st.lists(st.integers(0, time), max_size=6)))
    pieces = []
    for first, last in zip([0, *cuts], [*cuts, time], strict=True):
        slots = first if window is None else window - 1
        past = {
            "past_k": ring(k[0], first, slots)[None],
            "past_v": ring(v[0], first, slots)[None],
            "position": torch.tensor([first]),
        }
        pieces.append(
            window_attention(*(t[:, first:last] for t in (q, k, v)), window=window, backend="cpu", **past)
        )  # fmt: skip
    assert relative_rms(torch.cat(pieces, 1), whole) <= SPLIT_BOUND


@given(st.lists(st.integers(0, 80), min_size=1, max_size=5), st.sampled_from([1, 16, 65, None]), st.integers(0, 2**31))
def test_packed_is_separate(lengths: list[int], window: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = torch.randn(1, total, 2, 16), torch.randn(1, total, 1, 16), torch.randn(1, total, 1, 16)
    segments = Segments.from_lengths(lengths)
    packed = window_attention(q, k, v, window=window, segments=segments, backend="cpu")
    parts = [t.split(lengths, 1) for t in (q, k, v)]
    separate = [window_attention(*part, window=window, backend="cpu") for part in zip(*parts, strict=True)]
    assert torch.equal(packed, torch.cat(separate, 1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_are_independent(backend: str) -> None:
    q, k, v = (torch.randn(3, 50, 2, 8) for _ in range(3))
    before = window_attention(q, k, v, window=20, backend=backend)
    for t in (q, k, v):
        t[1] = float("nan")
    after = window_attention(q, k, v, window=20, backend=backend)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and after[1].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("window", [10, None])
def test_nan_reaches_exactly_those_who_see_it(backend: str, which: str, window: int | None) -> None:
    tensors = {name: torch.randn(1, 150, 2, 8) for name in "qkv"}
    clean = window_attention(tensors["q"], tensors["k"], tensors["v"], window=window, backend=backend)
    tensors[which][0, 70, 1] = float("nan")
    y = window_attention(tensors["q"], tensors["k"], tensors["v"], window=window, backend=backend)
    reach = slice(70, 71 if which == "q" else 70 + (window or 80))
    assert y[0, reach, 1].isnan().all()
    y[0, reach, 1] = clean[0, reach, 1]
    assert relative_rms(y, clean) <= SPLIT_BOUND


def test_thread_count_does_not_matter() -> None:
    inputs = [torch.randn(1, 3000, 4, 16), torch.randn(1, 3000, 2, 16), torch.randn(1, 3000, 2, 16)]
    inputs += [torch.randn(3, 99, 2, 16), torch.randn(3, 99, 2, 16)]
    segments, position = Segments([0, 2000, 2000, 3000]), torch.tensor([1000, 3, 50])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        q, k, v, past_k, past_v = leaves = [t.clone().requires_grad_() for t in inputs]
        y = window_attention(
            q, k, v, past_k=past_k, past_v=past_v, position=position, window=100, segments=segments, backend="cpu"
        )
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_spans_match_reference() -> None:
    inputs = [torch.randn(1, 1400, 1, 4), torch.randn(1, 1400, 1, 4), torch.randn(1, 1400, 1, 4)]
    assert_matches(
        lambda *t: [window_attention(*t, window=40, backend="cpu")],
        lambda *t: [window_attention_reference(*t, window=40)],
        inputs,
        ERROR_BOUND,
    )


def test_slices_of_a_fused_projection() -> None:
    fused = torch.randn(2, 60, (4 + 2 + 2) * 16)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in fused.split([64, 32, 32], -1))
    y = window_attention(q, k, v, window=9, backend="cpu")
    assert torch.equal(y, window_attention(q.contiguous(), k.contiguous(), v.contiguous(), window=9, backend="cpu"))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(y, window_attention(turned, k, v, window=9, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 20, 2, 8).to(dtype).requires_grad_() for _ in range(3))
    y = window_attention(q, k, v, window=5)
    gradients = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(t.dtype == dtype for t in (y, *gradients))
    y = y.detach()
    exact = window_attention_reference(q.double(), k.double(), v.double(), window=5).detach()
    assert relative_rms(y, exact) < 5e-3


def test_one_signature_each() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3))
    window_attention(q, k, v, window=None).sum().backward()
    window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), window=3).sum().backward()
    past = {"past_k": torch.randn(2, 4, 2, 8), "past_v": torch.randn(2, 4, 2, 8), "position": torch.tensor([3, 9])}
    window_attention(q[..., ::1], k, v, window=5, **past).sum().backward()
    from milonga.ops.window_attention import cpu

    cpu.compile_kernels()
    assert len(cpu._forward.signatures) == 1 and len(cpu._backward.signatures) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    def loss(q, k, v, past_k, past_v, position):
        y = window_attention(
            q, k, v, past_k=past_k, past_v=past_v, position=position, window=5, backend="cpu"
        )  # fmt: skip
        return y.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for time in (7, 12) if dynamic else (7,):
        leaves = [
            torch.randn(2, t, g, 8, requires_grad=True) for t, g in ((time, 4), (time, 2), (time, 2), (4, 2), (4, 2))
        ]
        position = torch.tensor([2, 11])
        expected = torch.autograd.grad(loss(*leaves, position), leaves)
        got = torch.autograd.grad(compiled(*leaves, position), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_memory_grows_with_time_alone() -> None:
    # T^2 scores of one head would take 16 GiB; inputs, outputs and gradients together take 80 MiB.
    script = """
import resource, torch
from milonga.ops.window_attention import window_attention
q, k, v = (torch.randn(1, t, 2, 16, requires_grad=True) for t in (65536,) * 3)
window_attention(q[:, :64], k[:, :64], v[:, :64], window=64, backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
window_attention(q, k, v, window=64, backend="cpu").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160


def bad(**changes) -> dict:
    """Arguments of a valid call, with changes."""
    arguments = {
        "q": torch.randn(2, 5, 4, 8),
        "k": torch.randn(2, 5, 2, 8),
        "v": torch.randn(2, 5, 2, 6),
        "window": 4,
        "past_k": torch.randn(2, 3, 2, 8),
        "past_v": torch.randn(2, 3, 2, 6),
        "position": torch.tensor([9, 2]),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1 .* got 0"),
        ({"q": torch.randn(2, 5, 3, 8)}, "expected a divisor of 3, got 2"),
        ({"q": torch.randn(5, 4, 8)}, "q must be \\[B, T, H, K\\]"),
        ({"k": torch.randn(2, 5, 2, 7)}, "k must .* expected \\[2, 5, G, 8\\], got \\[2, 5, 2, 7\\]"),
        ({"v": torch.randn(2, 5, 1, 8)}, "v must .* expected \\[2, 5, 2, 8\\], got \\[2, 5, 1, 8\\]"),
        ({"v": torch.randn(2, 5, 2)}, "v must be \\[B, T, G, V\\], got \\[2, 5, 2\\]"),
        ({"q": torch.ones(2, 5, 4, 8, dtype=torch.int64)}, "q must be float32, .* got int64"),
        ({"k": torch.randn(2, 5, 2, 8).half()}, "k must be float32, got float16"),
        ({"v": torch.randn(2, 5, 2, 6).double()}, "v must be float32, got float64"),
        ({"k": torch.randn(2, 5, 2, 8, device="meta")}, "k must be on cpu as q is, got meta"),
        ({"v": torch.randn(2, 5, 2, 6, device="meta")}, "v must be on cpu as q is, got meta"),
        ({"past_k": torch.ones(2, 3, 2, 8, dtype=torch.int32)}, "past_k must be float32, got int32"),
        ({"past_k": torch.randn(2, 3, 2, 8).bfloat16()}, "past_k must be float32, got bfloat16"),
        ({"past_v": torch.randn(2, 3, 2, 6).double()}, "past_v must be float32, got float64"),
        ({"past_k": torch.randn(2, 3, 2, 8, device="meta")}, "past_k must be on cpu as q is, got meta"),
        ({"past_v": torch.randn(2, 3, 2, 6, device="meta")}, "past_v must be on cpu as q is, got meta"),
        ({"past_k": torch.randn(2, 3, 2)}, "past_k must be \\[S, P, G, K\\], got \\[2, 3, 2\\]"),
        ({"position": torch.tensor([9, 2], device="meta")}, "position must be on cpu as q is, got meta"),
        ({"position": torch.tensor([9, 2, 3])}, "position must be \\[S\\], expected \\[2\\], got \\[3\\]"),
        ({"past_k": None}, "together or not at all, got past_v and position"),
        ({"past_k": torch.randn(1, 3, 2, 8)}, "past_k must .* expected \\[2, 3, 2, 8\\], got \\[1, 3, 2, 8\\]"),
        ({"past_v": torch.randn(2, 4, 2, 6)}, "past_v must .* expected \\[2, 3, 2, 6\\], got \\[2, 4, 2, 6\\]"),
        ({"position": torch.tensor([9.0, 2.0])}, "position must be int64"),
        ({"position": torch.tensor([9, -2])}, "position must not be negative, got -2"),
        ({"window": 5}, "expected at least 4 slots at position 9, got 3"),
        ({"window": None}, "expected at least 9 slots at position 9, got 3"),
        ({"segments": Segments([0, 5])}, "packed as \\[1, T\\], got 2 rows"),
        ({"backend": "triton"}, "cannot run here"),
        ({"backend": "cuda"}, "no such backend"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    window_attention(**bad())
    with pytest.raises(ValueError, match=f"window_attention: .*{message}"):
        window_attention(**bad(**changes))
