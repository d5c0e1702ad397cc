"""`window_attention` on a GPU against the float64 reference: windows, packings, rings, decoding, the library's path."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.window_attention import ERROR_BOUND, window_attention
from milonga.segments import Segments
from tests.ops.helpers import relative_rms
from tests.ops.test_window_attention import ring

pytestmark = pytest.mark.gpu

HALF_BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # what rounding inputs of the products and the output costs


def make(
    lengths: tuple[int, ...],
    heads: int,
    groups: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    packed: bool = False,
    past: tuple[int, tuple[int, ...]] | None = None,
) -> tuple[list[Tensor], Tensor | None, Segments | None]:
    """-> (q, k, v, slices of one projection where widths agree, and the rings), position, segments."""
    batch, time = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    if widths[0] == widths[1]:
        fused = torch.randn(batch, time, heads + 2 * groups, widths[0], device="cuda", dtype=dtype)
        inputs = list(fused.split([heads, groups, groups], 2))
    else:
        shapes = ((heads, widths[0]), (groups, widths[0]), (groups, widths[1]))
        inputs = [torch.randn(batch, time, h, w, device="cuda", dtype=dtype) for h, w in shapes]
    position = None
    if past is not None:
        slots, positions = past
        position = torch.tensor(positions, device="cuda")
        for width in widths:
            whole = torch.randn(len(positions), max(positions), groups, width, dtype=dtype)
            rings = [ring(w, p, slots) for w, p in zip(whole, positions, strict=True)]
            inputs.append(torch.stack(rings).cuda())
    return inputs, position, Segments.from_lengths(lengths) if packed else None


def run(inputs, position, segments, window, backend, upstream=None, deterministic=True):
    """-> (output, upstream gradient, gradients)."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    past_k, past_v = leaves[3:] or (None, None)
    y = window_attention(
        *leaves[:3], past_k=past_k, past_v=past_v, position=position, segments=segments, window=window,
        deterministic=deterministic, backend=backend,
    )  # fmt: skip
    upstream = torch.randn_like(y) if upstream is None else upstream.to(y.dtype)
    return y.detach(), upstream, torch.autograd.grad(y, leaves, upstream)


def check(inputs, position, segments, window, deterministic=True) -> None:
    y, upstream, gradients = run(inputs, position, segments, window, "triton", deterministic=deterministic)
    exact_y, _, exact = run([t.double() for t in inputs], position, segments, window, "reference", upstream)
    bound = HALF_BOUND.get(y.dtype, ERROR_BOUND)
    names = ("y", "q", "k", "v", "past_k", "past_v")
    for name, got, right in zip(names, (y, *gradients), (exact_y, *exact), strict=False):
        assert got.shape == right.shape, name
        if right.numel() == 0:
            continue
        if right.norm() < 1e-12:  # whoever sees one key only gives scores no gradient
            assert got.abs().max() < (1e-5 if got.dtype == torch.float32 else 0.1), name
        else:
            assert relative_rms(got, right) <= bound, f"{name}: {relative_rms(got, right):.2e} > {bound:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [1, 99, 100, 101, 300, None])
def test_windows(dtype: torch.dtype, window: int | None) -> None:
    check(*make((100, 100), 4, 2, (64, 64), dtype), window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("batch", "time", "window"), [(3, 320, 100), (3, 320, 1), (1, 451, 129), (1, 77, 1), (1, 451, None)]
)
def test_blocks_read_by_the_copy_engine(batch: int, time: int, window: int | None, width: int, dtype) -> None:
    """Rows of whole blocks, and one row of any length."""
    check(*make((time,) * batch, 4, 2, (width, width), dtype), window)


def test_rows_do_not_meet_a_neighbour_s_nan() -> None:
    inputs, position, segments = make((320,) * 3, 4, 2, (128, 128), torch.bfloat16)
    _, upstream, clean = run(inputs, position, segments, 100, "triton")
    for tensor in (*inputs, upstream):
        tensor[0], tensor[2] = float("nan"), float("nan")
    _, _, gradients = run(inputs, position, segments, 100, "triton", upstream)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(clean, gradients, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed: int) -> None:
    pick = torch.Generator().manual_seed(seed)

    def among(*values):
        return values[int(torch.randint(len(values), (), generator=pick))]

    packed = among(False, True)
    lengths = tuple(among(0, 1, 31, 64, 129, 300, 555) for _ in range(among(1, 2, 4)))
    lengths = lengths if packed else lengths[:1] * len(lengths)
    groups = among(1, 2, 3)
    width = among(8, 16, 33, 64, 128)
    window = among(None, 1, 17, 64, 65, 200)
    past = None
    if among(False, True):
        positions = tuple(among(0, 1, 63, 64, 200, 401) for _ in lengths)
        past = (max(1, max(positions) if window is None else window - 1) + among(0, 0, 5), positions)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    check(*make(lengths, groups * among(1, 2, 4), groups, (width, among(width, 24)), dtype, packed, past), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("time", "width", "window"),
    [(300, 64, 64), (300, 64, 65), (300, 64, 66), (400, 128, 129), (400, 128, 130), (129, 128, 129), (200, 64, 1)],
)
def test_rings_at_the_end_of_the_window(time: int, width: int, window: int, packed: bool, dtype: torch.dtype) -> None:
    """Only blocks that begin before the step `window - 1` look into the ring: empty, partly filled, full, wrapped."""
    positions = (0, window // 2, window - 1, 3 * window + 5)
    lengths = (time, 64, 0, 128) if packed else (time,) * 4
    check(*make(lengths, 4, 2, (width, width), dtype, packed, (max(1, window - 1), positions)), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("time", "heads", "groups", "width", "window", "slots", "positions"),
    [
        (1, 32, 4, 64, 2048, 2047, (0, 5, 2046, 2047, 2048, 99999)),
        (1, 12, 12, 128, 256, 255, (3, 700)),
        (1, 8, 2, 64, None, 9000, (1, 8999, 4096)),
        (5, 32, 4, 64, 300, 299, (0, 150, 299, 1000)),
        (16, 8, 1, 128, None, 500, (0, 500, 77)),
        (3, 11, 1, 256, 100, 120, (5, 1000)),
    ],
)
def test_decoding(dtype, time, heads, groups, width, window, slots, positions) -> None:
    check(*make((time,) * len(positions), heads, groups, (width, width), dtype, past=(slots, positions)), window)


def test_decoding_does_not_depend_on_the_other_rows() -> None:
    inputs, position, _ = make((1,) * 5, 8, 2, (64, 64), torch.bfloat16, past=(511, (0, 3, 511, 700, 9000)))
    whole = run(inputs, position, None, 512, "triton")[0]
    for row in range(5):
        alone = run([t[row : row + 1] for t in inputs], position[row : row + 1], None, 512, "triton")[0]
        assert torch.equal(alone, whole[row : row + 1])


def test_decoding_in_a_graph_follows_the_positions() -> None:
    inputs, position, _ = make((1, 1), 8, 2, (64, 64), torch.bfloat16, past=(511, (5, 400)))
    q, k, v, past_k, past_v = inputs
    past_k.nan_to_num_(), past_v.nan_to_num_()
    arguments = {"past_k": past_k, "past_v": past_v, "position": position, "window": 512}
    with torch.no_grad():
        for _ in range(2):
            window_attention(q, k, v, **arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = window_attention(q, k, v, **arguments)
        for positions in ((5, 400), (511, 512), (100000, 1)):
            position.copy_(torch.tensor(positions))
            graph.replay()
            assert torch.equal(captured, window_attention(q, k, v, **arguments))


@pytest.mark.parametrize("window", [None, 5000])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 128), (8, 2, 64)])
def test_library(heads: int, groups: int, width: int, window: int | None) -> None:
    inputs, position, segments = make((777, 777), heads, groups, (width, width), torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # the library may warn otherwise
    for deterministic in (True, False):  # the backward pass is our own, the library's
        check(inputs, position, segments, window, deterministic)


def test_deterministic() -> None:
    for arguments in (
        (*make((1500,), 4, 2, (128, 128), torch.bfloat16), 700),
        (*make((900,), 4, 4, (64, 64), torch.bfloat16), None),  # the library's forward pass
        (*make((300, 0, 400), 4, 2, (64, 64), torch.bfloat16, True, (99, (50, 3, 700))), 100),
        (*make((1, 1), 8, 2, (64, 64), torch.bfloat16, past=(9000, (9000, 50))), None),
    ):
        y, upstream, gradients = run(*arguments, "triton")
        for _ in range(3):
            again, _, other = run(*arguments, "triton", upstream)
            assert all(torch.equal(a, b) for a, b in zip((y, *gradients), (again, *other), strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("window", [10, None])
def test_nan_reaches_exactly_those_who_see_it(which: int, window: int | None) -> None:
    inputs = [torch.randn(2, 300, 2, 64, device="cuda") for _ in range(3)]
    clean = window_attention(*inputs, window=window, backend="triton")
    inputs[which][0, 150, 1] = float("nan")
    y = window_attention(*inputs, window=window, backend="triton")
    reach = slice(150, 151 if which == 0 else 150 + (window or 150))
    assert y[0, reach, 1].isnan().all()
    y[0, reach, 1] = clean[0, reach, 1]
    # a block of queries that meets a NaN is computed once more, in another order
    assert relative_rms(y[0, :, 1], clean[0, :, 1]) <= ERROR_BOUND
    y[0, :, 1] = clean[0, :, 1]
    assert torch.equal(y, clean)


def test_split_law() -> None:
    inputs, _, _ = make((700,), 4, 2, (64, 64), torch.float32)
    whole = window_attention(*inputs, window=100, backend="triton")
    pieces = []
    cuts = (0, 1, 2, 100, 116, 450, 700)
    for first, last in pairwise(cuts):
        past = [ring(t[0].cpu(), first, 99)[None].cuda() for t in inputs[1:]]
        pieces.append(
            window_attention(
                *(t[:, first:last] for t in inputs), window=100, past_k=past[0], past_v=past[1],
                position=torch.tensor([first], device="cuda"), backend="triton",
            )
        )  # fmt: skip
    assert relative_rms(torch.cat(pieces, 1), whole) <= ERROR_BOUND


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_break(packed: bool) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        return window_attention(q, k, v, window=20, segments=segments).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for lengths in ((7, 5), (40, 0), (33, 8)):
        inputs, _, segments = make(lengths if packed else lengths[:1] * 2, 4, 2, (16, 16), torch.float32, packed)
        leaves = [t.detach().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(loss(*leaves, segments), leaves)
        got = torch.autograd.grad(compiled(*leaves, segments), leaves)
        assert all(relative_rms(a, b) <= ERROR_BOUND for a, b in zip(got, expected, strict=True))


def test_keys_beyond_2_to_the_31_elements() -> None:
    time = 1_200_000  # times 2048 numbers a step
    fused = torch.randn(1, time, 3, 8, 128, device="cuda", dtype=torch.bfloat16)[:, :, :, ::4]
    q, k, v = fused.unbind(2)
    y = window_attention(q, k, v, window=50, backend="triton")
    last = slice(time - 200, time)
    expected = window_attention(q[:, last], k[:, last], v[:, last], window=50, backend="triton")
    assert relative_rms(y[:, time - 100 :], expected[:, 100:]) <= HALF_BOUND[torch.bfloat16]
