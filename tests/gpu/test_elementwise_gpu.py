"""The laws of `causal_conv`, `rms_norm`, `swiglu` and `rotary` on a GPU, in Triton, against the float64 reference."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops import causal_conv, rms_norm, rotary, swiglu
from milonga.ops.causal_conv import ERROR_BOUND
from milonga.ops.layer_norm import from_rows, layer_norm_and_rows
from milonga.segments import Segments
from tests.ops.helpers import assert_compiles_to_the_same, relative_rms
from tests.ops.test_causal_conv import make

pytestmark = pytest.mark.gpu

LOW = (torch.float32, torch.bfloat16, torch.float16)
Op = Callable[..., Sequence[Tensor]]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def run(op: Op, inputs: Sequence[Tensor], upstream: Sequence[Tensor] | None) -> tuple[list[Tensor], ...]:
    """-> (outputs, upstream gradients, gradients of every input)."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = list(op(*leaves))
    upstream = [torch.randn_like(out) for out in outputs] if upstream is None else list(upstream)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [out.detach() for out in outputs], upstream, list(gradients)


def check(op: Op, inputs: Sequence[Tensor]) -> None:
    """`op(*inputs, backend)`: outputs and all gradients, off by no more than the bound and the rounding of each."""
    outputs, upstream, gradients = run(lambda *v: op(*v, "triton"), inputs, None)
    again, _, other = run(lambda *v: op(*v, "triton"), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), (*again, *other), strict=True))
    exact, _, exact_gradients = run(lambda *v: op(*v, "reference"), [v.double() for v in inputs], upstream)
    for kind, ours, theirs in (("output", outputs, exact), ("gradient", gradients, exact_gradients)):
        for index, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
            rounding = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
            error = relative_rms(got, expected)
            assert error <= ERROR_BOUND + rounding, f"{kind} {index}: {error:.2e}"


def conv(names: tuple[str, ...], activation: str | None = "silu", segments: Segments | None = None) -> Op:
    def call(*arguments: Tensor | str) -> tuple[Tensor, Tensor]:
        *tensors, backend = arguments
        inputs = dict(zip(names, tensors, strict=True))
        return causal_conv(**inputs, activation=activation, segments=segments, backend=backend)

    return call


def on_gpu(inputs: dict[str, Tensor], dtype: torch.dtype, parameters: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: v.cuda().to(dtype if k in ("x", "initial") else parameters) for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 8])
def test_conv_of_every_width(taps: int, dtype: torch.dtype) -> None:
    inputs = on_gpu(make(3, 203, 264, taps), dtype)
    check(conv(tuple(inputs)), list(inputs.values()))


@pytest.mark.parametrize("seed", range(8))
def test_conv_of_random_shapes(seed: int) -> None:
    pick = torch.Generator().manual_seed(seed)

    def among(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=pick))]

    dtype = LOW[seed % 3]
    inputs = make(among(1, 2, 5), among(0, 1, 61, 64, 65, 500), among(1, 31, 128, 515), among(2, 4, 8))
    inputs = {k: v for k, v in inputs.items() if k not in ("bias", "initial") or among(0, 1)}
    inputs = on_gpu(inputs, dtype, (among(0, 1) and dtype) or torch.float32)
    check(conv(tuple(inputs), "silu" if among(0, 1) else None), list(inputs.values()))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 5, 0, 0, 300, 128, 1, 0), (33,) * 9, (1,) * 200])
@pytest.mark.parametrize("initial", [False, True])
def test_conv_of_packed_sequences(lengths: tuple[int, ...], initial: bool) -> None:
    segments = Segments.from_lengths(lengths)
    inputs = on_gpu(make(1, segments.total, 70, 4, segments.count), torch.float32)
    inputs = {k: v for k, v in inputs.items() if initial or k != "initial"}
    check(conv(tuple(inputs), "silu", segments), list(inputs.values()))


@pytest.mark.parametrize("dtype", LOW)
def test_conv_in_pieces_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias, state = on_gpu(make(2, 900, 160, 4), dtype).values()
    y, final = causal_conv(x, weight, bias, initial=state)
    pieces = []
    for start, stop in pairwise([0, 0, 1, 3, 67, 450, 900]):
        out, state = causal_conv(x[:, start:stop], weight, bias, initial=state)
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 1), y) and torch.equal(state, final)


def test_conv_of_half_a_projection_in_training_shape() -> None:
    projected = randn(4, 1000, 3072, dtype=torch.bfloat16)
    weight, bias = randn(1536, 4), randn(1536)
    check(lambda p, w, b, backend: causal_conv(p.chunk(2, -1)[0], w, b, backend=backend), [projected, weight, bias])


def test_conv_of_more_than_two_to_the_31_elements() -> None:
    time, width = 700_001, 3072
    assert time * width > 2**31
    x = torch.empty(1, time, width, dtype=torch.bfloat16, device="cuda").normal_()
    weight, bias = randn(width, 4), randn(width)
    with torch.no_grad():
        y, final = causal_conv(x, weight, bias, backend="triton")
        for start in (3, 350_000, time - 1000):
            stop = start + 1000
            expected, _ = causal_conv(x[:, start:stop], weight, bias, initial=x[:, start - 3 : start])
            assert torch.equal(y[:, start:stop], expected)
    assert torch.equal(final, x[:, -3:])


def test_conv_nan_stays_in_its_row_and_channel() -> None:
    inputs = on_gpu(make(2, 300, 70, 4), torch.float32)
    inputs["x"][1, 100, 3] = float("nan")
    results = []
    for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
        values = [v.to(kind) for v in inputs.values()]
        outputs, _, gradients = run(lambda *v, b=backend: conv(tuple(inputs))(*v, b), values, None)
        results.append([v.isnan() for v in (*outputs, *gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def norm(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor]:
    return (rms_norm(x, weight, backend=backend),)


def norm_of_sum(x: Tensor, residual: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, residual=residual, backend=backend)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (3000, 40), (7, 256), (2, 5, 257), (3001, 1536), (9, 8192)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(norm, [randn(*shape, dtype=dtype), randn(shape[-1])])
    if dtype == torch.float32:
        check(norm_of_sum, [randn(*shape), randn(*shape), randn(shape[-1])])


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (3000, 40), (2, 5, 257), (3001, 1536), (9, 8192)])
def test_gradients_without_the_sum(shape: tuple[int, ...], stream: torch.dtype, layer: bool) -> None:
    """The backward pass reads bf16 in place of the sum: values to the last bit, gradients within rounding."""
    x, residual, weight = randn(*shape, dtype=torch.bfloat16), randn(*shape, dtype=stream), randn(shape[-1])
    weight[::7] = 0.0
    values = [x, residual, weight, randn(shape[-1]) * 10] if layer else [x, residual, weight]
    found, kept = [], []
    for keep_sum in (True, False):
        leaves = [value.clone().requires_grad_() for value in values]
        options = {"residual": leaves[1], "dtype": torch.bfloat16, "keep_sum": keep_sum}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
            if layer:
                y, total, rows = layer_norm_and_rows(leaves[0], *leaves[2:], **options)
            else:
                (y, total), rows = rms_norm(leaves[0], leaves[2], **options), None
        if rows is not None:
            assert relative_rms(from_rows(rows, *values[2:]), y.detach()) <= 2.0**-8
        torch.manual_seed(1)
        upstream = [torch.randn_like(y), torch.randn_like(total)]
        found.append([y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, upstream)])
    assert kept[0] == stream and kept[len(kept) // 2] == torch.bfloat16
    assert torch.equal(found[0][1], found[1][1])
    there = weight.abs() > 0 if not layer else slice(None)  # 0 counts as 2^-60, so that y says the row
    assert torch.equal(found[0][0][..., there], found[1][0][..., there])
    assert float((found[0][0] - found[1][0]).abs().nan_to_num().sum()) <= 1e-10
    for usual, other in zip(found[0][2:], found[1][2:], strict=True):
        assert other.dtype == usual.dtype
        assert relative_rms(other, usual) <= 2.0**-8


@pytest.mark.parametrize("dtype", LOW)
def test_norm_of_a_sum_is_that_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, residual, weight = randn(100, 700, dtype=dtype), randn(100, 700, dtype=dtype), randn(700)
    outputs, upstream, gradients = run(lambda *v: norm_of_sum(*v, "triton"), [x, residual, weight], None)
    assert torch.equal(outputs[1], x + residual)
    assert torch.equal(outputs[0], rms_norm(x + residual, weight))
    composed = run(lambda x, r, w: (rms_norm(x + r, w), x + r), [x, residual, weight], upstream)[2]
    for got, expected in zip(gradients, composed, strict=True):
        # composed, the two gradients of the sum are rounded before they are added
        assert (
            relative_rms(got, expected)
            <= ERROR_BOUND + (0 if got.dtype == torch.float32 else 2) * torch.finfo(got.dtype).eps
        )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(0, 4), (7,), (3, 5, 70), (301, 1030), (1000, 4096)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        lambda g, u, backend: (swiglu(g, u, backend=backend),),
        [randn(*shape, dtype=dtype) * 5, randn(*shape, dtype=dtype)],
    )
    both = randn(*shape[:-1], 2 * shape[-1], dtype=dtype)
    check(lambda v, backend: (swiglu(*v.chunk(2, -1), backend=backend),), [both])
    check(lambda v, backend: (swiglu(v, backend=backend),), [both])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (1, 5, 1, 2), (2, 77, 24, 128), (1, 30, 70, 6), (3, 100, 5, 96)])
@pytest.mark.parametrize("start", [0, 2**31])
def test_rotary(shape: tuple[int, ...], start: int, dtype: torch.dtype) -> None:
    for size in (shape[:2], shape[1:2]):
        positions = start + torch.randint(0, 5000, size, device="cuda")
        check(lambda x, backend, p=positions: (rotary(x, p, backend=backend),), [randn(*shape, dtype=dtype)])
    batch, time, heads, width = shape
    projected = randn(batch, time, heads + 2, width, dtype=dtype)
    check(lambda v, backend: (rotary(v[:, :, :heads], positions, backend=backend),), [projected])


def test_compiles_without_graph_break() -> None:
    def conv_of(**values: Tensor | Segments | None) -> tuple[Tensor, Tensor]:
        return causal_conv(**values)

    cases = []
    for lengths in ((7, 5), (40, 0), (33, 8)):
        segments = Segments.from_lengths(lengths)
        cases.append((on_gpu(make(1, sum(lengths), 20, 4, 2), torch.float32), segments))
    assert_compiles_to_the_same(conv_of, cases)

    def loss(v: Tensor, weight: Tensor) -> Tensor:
        x, h = rms_norm(v, weight, residual=v.sin())
        x = swiglu(torch.cat([x, h], -1)) + swiglu(*torch.cat([h, x], -1).chunk(2, -1))
        u, final = causal_conv(x.cos(), weight[:, None].expand(-1, 4).contiguous())
        y = rotary(rms_norm(u, weight).unflatten(-1, (5, 8)), torch.arange(v.shape[1], device=v.device))
        return y.sin().sum() + final.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for time in (5, 9, 64):
        leaves = [randn(2, time, 40).requires_grad_(), randn(40).requires_grad_()]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            # around the ops, the compiler's own sines and sums
            assert relative_rms(a, b) <= 2e-5


def test_one_step_is_captured_in_a_graph() -> None:
    def step(x: Tensor, state: Tensor, position: Tensor) -> list[Tensor]:
        u, final = causal_conv(x.chunk(2, -1)[0], weight, bias, initial=state)
        y, total = rms_norm(u, scale, residual=u)
        return [u, final, y, total, swiglu(x), rotary(y.unflatten(-1, (4, 32)), position)]

    weight, bias, scale = randn(128, 4), randn(128), randn(128)
    x, state, position = randn(16, 1, 256), randn(16, 3, 128), torch.arange(16, device="cuda")[:, None]
    with torch.no_grad():
        step(x, state, position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x, state, position)
        for _ in range(2):
            x.normal_(), state.normal_(), position.add_(2**30)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, step(x, state, position), strict=True))
