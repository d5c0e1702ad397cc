"""`projected_scan` on a GPU: values of the ops one by one to the last bit, gradients within rounding, less memory."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from milonga.layers import MambaConfig
from milonga.layers.recompute import CHEAP, forgetting
from milonga.models import ModelConfig
from milonga.ops.projected_scan import ERROR_BOUND, projected_scan
from milonga.segments import Segments
from tests.ops.helpers import relative_rms
from tests.ops.test_projected_scan import NAMES, WIDE, make, one_by_one

pytestmark = [
    pytest.mark.gpu,
    # the reference's matrix products warn where new memory is filled with NaN
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
    # where the first that PyTorch's thread of backward passes ever does is a product
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]


def run(op, inputs: dict[str, Tensor], upstream: list[Tensor] | None, segments: Segments | None, backend: str):
    """-> (the four outputs, upstream gradients of the first two, gradients of every input)."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = op(**leaves, segments=segments, backend=backend)
    upstream = [torch.randn_like(out) for out in outputs[:2]] if upstream is None else upstream
    # at T = 0 an output may depend on nothing
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs[:2], upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [out.detach() for out in outputs], upstream, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 300, 200, 16), (1, 65, 33, 5), (3, 1, 48, 16), (2, 0, 48, 16), "packed"])
@pytest.mark.parametrize("whole", [True, False])
def test_it_is_the_ops_one_by_one(dtype: torch.dtype, shape: tuple[int, int, int, int] | str, whole: bool) -> None:
    """Gradients are as near to float64 as those of the ops one by one, with and without D, a bias, initial states."""
    torch.manual_seed(0)
    segments = Segments.from_lengths([70, 0, 129, 1]) if shape == "packed" else None
    made = make(1, 200, 100, 16, 12, 40, 4) if isinstance(shape, str) else make(*shape, 12, 40)
    names = NAMES if whole else NAMES[:6]
    inputs = {name: made[name].cuda().to(torch.float32 if name in WIDE else dtype) for name in names}
    outputs, upstream, gradients = run(projected_scan, inputs, None, segments, "triton")
    usual_outputs, _, usual = run(one_by_one, inputs, upstream, segments, "triton")
    assert all(torch.equal(a, b) for a, b in zip(outputs, usual_outputs, strict=True))
    wide = {name: value.double() for name, value in inputs.items()}
    _, _, exact = run(one_by_one, wide, upstream, segments, "reference")
    for name, got, other, expected in zip(names, gradients, usual, exact, strict=True):
        bound = 1.05 * relative_rms(other, expected) + ERROR_BOUND
        assert relative_rms(got, expected) <= bound, f"{name}: {relative_rms(got, expected):.2e} > {bound:.1e}"


def test_the_same_bits_on_every_run() -> None:
    made = make(4, 1000, 256, 16, 16, 128)
    inputs = {name: value.cuda().to(torch.float32 if name in WIDE else torch.bfloat16) for name, value in made.items()}
    upstream = [torch.randn(4, 1000, 128).cuda(), torch.randn(4, 256, 16).cuda()]
    runs = [run(projected_scan, inputs, upstream, None, "triton") for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[2]), (*second[0], *second[2]), strict=True))


@pytest.mark.parametrize("names", [("conv", "scan"), ("scan",), ("sum",), ("sum", "scan"), CHEAP])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_network_trains_to_the_same(names: tuple[str, ...], norm: str) -> None:
    """bf16 by autocast: the loss to the last bit, gradients within rounding of those with everything kept."""
    config = ModelConfig(
        vocab_size=256, d_model=128, pattern="mamba", repeats=3, layers={"mamba": MambaConfig(d_state=16)}, norm=norm
    )
    network = config.build(device="cuda")
    tokens = torch.randint(0, 256, (2, 301), generator=torch.Generator().manual_seed(0)).cuda()
    found, losses = [], []
    for forgotten in ((), names):
        network.recompute = forgotten
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean()
        losses.append(loss.detach())
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    assert torch.equal(*losses)
    for (name, _), usual, other in zip(network.named_parameters(), *found, strict=True):
        assert relative_rms(other, usual) <= 2.0**-6, f"{name}: {relative_rms(other, usual):.2e}"


def test_what_is_kept() -> None:
    """Bytes that a layer holds between the passes: with `conv` and `scan` the projection in, and little else."""
    layer = MambaConfig().build(256).cuda()
    x = torch.randn(2, 2048, 256, device="cuda", requires_grad=True)
    held = {}
    for names in ((), ("dt", "conv", "cast"), ("conv", "scan", "cast")):
        for _ in range(2):  # the first compiles, and fills workspaces
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16), forgetting(names):
                out = layer.advance(x, None)[0]
            held[names] = torch.cuda.memory_allocated() - before
            out.sum().backward()
            del out
            x.grad = None
            layer.zero_grad(set_to_none=True)
    wide = 2 * 2048 * 512 * 2  # bytes of a tensor [B T E]
    kept, usual, other = held.values()
    assert kept - usual >= 1.9 * wide, "u and dt"
    assert usual - other >= 0.9 * wide, "the scan's output"


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_the_residual_stream_is_not_kept(norm: str) -> None:
    """With `sum` what a layer takes from the stream is freed once the next has added to it: 4 bytes a number."""
    config = ModelConfig(
        vocab_size=256, d_model=512, pattern="mamba", repeats=6, layers={"mamba": MambaConfig()}, norm=norm
    )
    network, tokens = config.build(device="cuda"), torch.randint(0, 256, (2, 2048), device="cuda")
    held = {}
    for names in ((), ("sum",), ("norm", "sum"), ("norm",)):
        network.recompute = names
        for _ in range(2):  # the first compiles, and fills workspaces
            network.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = network(tokens, targets=tokens).losses.mean()
            held[names] = torch.cuda.memory_allocated() - before
            loss.backward()
    stream = 4 * 2 * 2048 * 512 * 5  # bytes, before all layers but the first
    freed = stream if norm == "rms_norm" else stream // 2  # rows in bf16 are kept for it
    assert abs(held[()] - held["sum",] - freed) <= stream // 10
    freed = 0 if norm == "rms_norm" else stream // 2
    assert abs(held["norm",] - held["norm", "sum"] - freed) <= stream // 10


def test_a_second_derivative_is_refused() -> None:
    leaves = {name: value.cuda().requires_grad_() for name, value in make(1, 40, 32, 16, 2, 8).items()}
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(projected_scan(**leaves).out.sum(), leaves["u"], create_graph=True)


def test_backward_on_a_side_stream() -> None:
    """Its memory is of the stream of the forward pass: as for every node, the engine goes back to it."""
    inputs = {name: value.cuda() for name, value in make(2, 500, 128, 16, 8, 64).items()}
    upstream = [torch.randn(2, 500, 64).cuda(), torch.randn(2, 128, 16).cuda()]
    expected = run(projected_scan, inputs, upstream, None, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(projected_scan, inputs, upstream, None, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[2]), (*expected[0], *expected[2]), strict=True))
