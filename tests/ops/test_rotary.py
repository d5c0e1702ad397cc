import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.ops.rotary import ANGLE_BOUND, ERROR_BOUND, rotary, rotary_reference, rotary_tables
from tests.ops.helpers import assert_matches, relative_rms

# fp32 rounding of a cosine or sine near 1.
ROUNDING = 1.2e-7


@given(
    st.integers(0, 3),
    st.integers(0, 90),
    st.integers(1, 5),
    st.integers(0, 35),
    st.sampled_from([10000.0, 500.0, 1e6]),
    st.sampled_from([0, 63, 10**6, 2**31]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_matches_reference(
    batch: int, time: int, heads: int, half: int, base: float, start: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    positions = start + torch.randint(0, 200, (time,) if shared else (batch, time))
    assert_matches(
        lambda x: [rotary(x, positions, base=base, backend="cpu")],
        lambda x: [rotary_reference(x, positions, base)],
        [torch.randn(batch, time, heads, 2 * half)],
        ERROR_BOUND,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_angles_at_two_to_the_31(backend: str, base: float) -> None:
    positions = torch.tensor([0, 1, 65535, 2**31 - 1, 2**31, 2**31 - 777])
    width = 16
    x = torch.zeros(1, len(positions), 1, width)
    x[..., : width // 2] = 1.0
    y = rotary(x, positions, base=base, backend=backend)[0, :, 0]
    cos, sin = rotary_tables(positions, width, base)
    with mpmath.workdps(50):
        for row, position in enumerate(positions.tolist()):
            for i in range(width // 2):
                angle = position * mpmath.power(mpmath.mpf(base), mpmath.mpf(-2 * i) / width)
                exact = (float(mpmath.cos(angle)), float(mpmath.sin(angle)))
                assert abs(float(cos[row, i]) - exact[0]) <= ANGLE_BOUND
                assert abs(float(sin[row, i]) - exact[1]) <= ANGLE_BOUND
                assert abs(float(y[row, i]) - exact[0]) <= ANGLE_BOUND + ROUNDING
                assert abs(float(y[row, i + width // 2]) - exact[1]) <= ANGLE_BOUND + ROUNDING


def test_reference_gradients() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: rotary_reference(v, torch.tensor([[0, 5, 9], [1, 2, 3]]), 100.0), (x,))


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    scores = [
        (rotary(q, torch.tensor([s + 7]), backend="cpu") * rotary(k, torch.tensor([s]), backend="cpu")).sum()
        for s in (0, 1000, 2**30)
    ]
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=2e-5, atol=2e-5)


def test_queries_and_keys_in_one_call_and_any_split() -> None:
    fused = torch.randn(2, 100, 8 * 16)
    x = fused[..., : 6 * 16].unflatten(-1, (6, 16))
    positions = torch.stack([torch.arange(100), torch.arange(1000, 1100)])
    whole = rotary(x, positions, backend="cpu")
    assert whole.is_contiguous()
    assert torch.equal(whole[:, :, :4], rotary(x[:, :, :4].contiguous(), positions, backend="cpu"))
    pieces = [rotary(x[:, a:b], positions[:, a:b], backend="cpu") for a, b in ((0, 13), (13, 14), (14, 14), (14, 100))]
    assert torch.equal(whole, torch.cat(pieces, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 2, 8).to(dtype).requires_grad_()
    y = rotary(x, torch.arange(5))
    assert y.dtype == dtype and torch.autograd.grad(y.sum(), x)[0].dtype == dtype
    assert relative_rms(y.detach(), rotary_reference(x.double(), torch.arange(5), 10000.0).detach()) < 5e-3


def test_nan_comes_out() -> None:
    x = torch.randn(2, 5, 2, 8)
    x[1, 3, 0, 2] = float("nan")
    y = rotary(x, torch.arange(5), backend="cpu")
    assert y[1, 3, 0, [2, 6]].isnan().all() and int(y.isnan().sum()) == 2


def test_thread_count_does_not_matter() -> None:
    x, positions = torch.randn(2, 2000, 4, 32), torch.arange(4000).view(2, 2000)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(rotary(x, positions, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_one_signature() -> None:
    x = torch.randn(2, 5, 2, 8, requires_grad=True)
    rotary(x, torch.arange(5)).sum().backward()
    rotary(x.bfloat16()[:, :, :1], torch.arange(10).view(2, 5), base=7).sum().backward()
    from milonga.ops.rotary import cpu

    cpu.compile_kernels()
    assert len(cpu._rotate.signatures) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    def loss(x, positions):
        return rotary(x, positions, backend="cpu").square().cos().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for time in (5, 9):
        x, positions = torch.randn(2, time, 3, 8, requires_grad=True), torch.arange(time)
        (expected,) = torch.autograd.grad(loss(x, positions), x)
        assert torch.equal(torch.autograd.grad(compiled(x, positions), x)[0], expected)


@pytest.mark.parametrize(
    ("x", "positions", "options", "message"),
    [
        (torch.randn(2, 5, 2, 7), torch.arange(5), {}, "K must be even, got 7"),
        (torch.randn(5, 2, 8), torch.arange(5), {}, r"x must be \[B, T, H, K\], got \[5, 2, 8\]"),
        (torch.randn(2, 5, 2, 8), torch.arange(4), {}, r"expected \[2, 5\] or \[5\], got torch.int64 \[4\]"),
        (torch.randn(2, 5, 2, 8), torch.arange(5.0), {}, "positions must be int64"),
        (torch.randn(2, 5, 2, 8), torch.arange(5, device="meta"), {}, "positions must be on cpu as x is, got meta"),
        (torch.randn(2, 5, 2, 8, device="meta"), torch.arange(5), {}, "positions must be on meta as x is, got cpu"),
        (torch.ones(2, 5, 2, 8).int(), torch.arange(5), {}, "x must be float32, .* or float64, got int32"),
        (torch.ones(2, 5, 2, 8).bool(), torch.arange(5), {}, "x must be float32, .* or float64, got bool"),
        (torch.ones(2, 5, 2, 8).cfloat(), torch.arange(5), {}, "x must be float32, .* or float64, got complex64"),
        (torch.ones(2, 5, 2, 8).int(), torch.arange(5), {"backend": "reference"}, "x must be float32, .* got int32"),
        (torch.ones(2, 5, 2, 8).int(), torch.arange(5), {"backend": "cpu"}, "cannot run here"),
        (torch.randn(2, 5, 2, 8), torch.arange(5), {"base": 0.0}, "base must be positive, got 0.0"),
        (torch.randn(2, 5, 2, 8), torch.arange(5), {"backend": "triton"}, "cannot run here"),
    ],
)
def test_bad_input_is_named(x, positions, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"rotary: .*{message}"):
        rotary(x, positions, **options)
