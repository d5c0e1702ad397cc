"""`mamba_mixer` on a GPU: values of the ops one by one to the last bit, gradients within rounding, its own kernel."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.ops.causal_conv import causal_conv
from milonga.ops.mamba_mixer import ERROR_BOUND, Mixed, mamba_mixer
from milonga.ops.mamba_mixer import triton as own
from milonga.segments import Segments
from tests.ops.helpers import relative_rms
from tests.ops.test_mamba_mixer import NAMES, PRODUCTS, make, one_by_one

pytestmark = [
    pytest.mark.gpu,
    # the reference's matrix products warn where new memory is filled with NaN
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
    # where the first that PyTorch's thread of backward passes ever does is a product
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
SAME = ("x", "conv_initial")  # of the dtype of the products


def run(op, inputs: dict[str, Tensor], upstream: list[Tensor] | None, **options) -> tuple[Mixed, list, list]:
    """-> (outputs, upstream gradients of the output and of the final state, gradients of every input)."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    found = op(**leaves, **options)
    used = [found.out, found.final]
    upstream = [torch.randn_like(out) for out in used] if upstream is None else upstream
    gradients = torch.autograd.grad(
        used, list(leaves.values()), [g.to(o.dtype) for o, g in zip(used, upstream, strict=True)]
    )
    return Mixed(*(out.detach() for out in found)), upstream, list(gradients)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 300, 48, 256, 16, 32), (1, 65, 9, 33, 5, 4), (3, 1, 16, 128, 16, 8), "packed"])
@pytest.mark.parametrize("whole", [True, False])
def test_it_is_the_ops_one_by_one(dtype, shape, whole: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are as near to float64 as those of the ops one by one, with and without states before."""
    if not fused:
        monkeypatch.setattr(own, "suits", lambda *_: False)
    segments = Segments.from_lengths([70, 0, 129, 1]) if shape == "packed" else None
    names = NAMES if whole else NAMES[:10]
    # roundings of few numbers scatter by more than what is asked: of several draws
    draws = 2 if isinstance(shape, str) or shape[1] > 100 else 12
    mine, usual = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for seed in range(draws):
        torch.manual_seed(seed)
        made = make(1, 200, 40, 128, 16, 16, 4) if isinstance(shape, str) else make(*shape)
        inputs = {name: made[name].cuda().to(dtype if name in (*SAME, *PRODUCTS) else torch.float32) for name in names}
        outputs, upstream, gradients = run(mamba_mixer, inputs, None, segments=segments, keep_u=whole)
        usual_outputs, _, others = run(one_by_one, inputs, upstream, segments=segments)
        assert all(torch.equal(a, b) for a, b in zip(outputs, usual_outputs, strict=True))
        wide = {name: value.double() for name, value in inputs.items()}
        _, _, exact = run(one_by_one, wide, upstream, segments=segments, backend="reference")
        for name, got, other, expected in zip(names, gradients, others, exact, strict=True):
            mine[name] += relative_rms(got, expected) ** 2 / draws
            usual[name] += relative_rms(other, expected) ** 2 / draws
    for name in names:
        error, bound = mine[name] ** 0.5, 1.05 * usual[name] ** 0.5 + 2 * ERROR_BOUND
        assert error <= bound, f"{name}: {error:.2e} > {bound:.1e}"


@pytest.mark.parametrize("fused", [False, True])
def test_the_same_bits_on_every_run(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(own, "suits", lambda *_: False)
    inputs = {name: value.cuda() for name, value in make(4, 1000, 128, 256, 16, 16).items()}
    upstream = [torch.randn(4, 1000, 128).cuda(), torch.randn(4, 256, 16).cuda()]
    with torch.autocast("cuda", torch.bfloat16):
        runs = [run(mamba_mixer, inputs, upstream) for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[2]), (*second[0], *second[2]), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "time", "width", "columns"), [(2, 1000, 256, 96), (1, 5, 128, 40), (3, 700, 384, 128), (1, 8192, 128, 8)]
)
def test_the_convolution_with_the_product(dtype: torch.dtype, batch: int, time: int, width: int, columns: int) -> None:
    torch.manual_seed(0)
    pair, wide, out = (torch.randn(batch, time, 2 * width).cuda().to(dtype) for _ in range(3))
    narrow = torch.randn(batch * time, columns).cuda().to(dtype)
    into = (torch.randn(columns, width) / columns**0.5).cuda().to(dtype)
    weight, bias = (torch.randn(width, 4) / 2).cuda(), torch.randn(width).cuda()
    grad_u, x, rest = pair[..., :width], wide[..., width:], out[..., width:].clone()
    assert own.suits(grad_u, narrow, 4)
    found = own.conv_backward(grad_u, narrow, into, x, weight, bias, out[..., :width])
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    y, _ = causal_conv(*leaves, backend="reference")
    upstream = grad_u.double() + (narrow.double() @ into.double()).view(batch, time, width)
    expected = torch.autograd.grad(y, leaves, upstream)
    assert relative_rms(out[..., :width], expected[0]) <= relative_rms(expected[0].to(dtype), expected[0]) + 1e-5
    assert all(relative_rms(a, b) <= 1e-5 for a, b in zip(found, expected[1:], strict=True))
    assert torch.equal(out[..., width:], rest)
