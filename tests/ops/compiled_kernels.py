"""The kernels of a GPU, compiled for one that is not there: what a launch would run is compiled, and nothing runs.

Run by `test_triton_compiled.py` in processes of their own, since what asks for the GPU is replaced: `MILONGA_TARGET` is
its compute capability, as 90. Kernels get tensors of the CPU; what they would have filled holds anything.
"""

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from milonga.ops.adamw import Table
from milonga.ops.adamw import triton as adamw
from milonga.ops.causal_conv import triton as causal_conv
from milonga.ops.decode_step import MambaWeights, Norm, ReplayInputs
from milonga.ops.decode_step import triton as decode_step
from milonga.ops.gpu.triton_parts import GLUON
from milonga.ops.linear_cross_entropy import triton as linear_cross_entropy
from milonga.ops.mamba_mixer import triton as mamba_mixer
from milonga.ops.mamba_piece import triton as mamba_piece
from milonga.ops.rms_norm import triton as rms_norm
from milonga.ops.rotary import triton as rotary
from milonga.ops.selective_scan import gluon
from milonga.ops.selective_scan import triton as selective_scan
from milonga.ops.swiglu import triton as swiglu
from milonga.ops.window_attention import triton as window_attention

TARGET = int(os.environ["MILONGA_TARGET"])
# Triton 3.9 announces what 3.10 will do where nothing is said.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
DTYPES = [torch.float32, torch.bfloat16]

compiled: set[str] = set()


class Driver:
    """Stands in for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", TARGET, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def launch(kernel: JITFunction, grid: Any) -> Any:
    """Compile in place of a launch."""

    def compile_(*arguments: Any, **options: Any) -> None:
        kernel.run(*arguments, grid=grid, warmup=True, **options)
        compiled.add(kernel.fn.__name__)

    return compile_


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver.set_active(Driver())
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    dependent = {"PDL": True, "launch_pdl": True} if TARGET >= 90 else {"PDL": False}
    monkeypatch.setattr(decode_step, "_pdl", lambda x: dependent)
    monkeypatch.setattr(mamba_piece, "_pdl", lambda x: dependent)
    if TARGET < 90:  # no tensor descriptors
        monkeypatch.setattr(window_attention, "_described", lambda *_: None)


def like(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "time", "states", "packed"),
    [(torch.float32, 4096, 16, True), (torch.bfloat16, 300, 16, False), (torch.bfloat16, 300, 4, True)],
)
def test_scan(dtype: torch.dtype, time: int, states: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in parts of time, as both kinds of kernels."""
    x, dt, g = (like(1, time, 256, dtype=dtype) for _ in range(3))
    z = like(1, time, 512, dtype=dtype)[..., 256:]
    b, c = (like(1, time, states, dtype=dtype) for _ in range(2))
    A, D, bias, initial = -like(256, states).exp(), like(256), like(256), like(3 if packed else 1, 256, states)
    offsets = torch.tensor([0, 7, 7, time]) if packed else None
    for own in {GLUON and states == 16, False}:
        monkeypatch.setattr(gluon, "suits", lambda x, A, own=own: own)
        kept = selective_scan.forward(x, dt, A, b, c, D, z, bias, initial, offsets, True)[-1]
        selective_scan.forward(x, dt, A, b, c, None, None, None, None, offsets, False)
        selective_scan.backward(g, initial, x, dt, A, b, c, D, z, bias, True, offsets, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [4, 8])
def test_convolution(dtype: torch.dtype, taps: int) -> None:
    x, g = (like(2, 300, 512, dtype=dtype)[..., :256] for _ in range(2))
    weight, bias, state = like(256, taps), like(256), like(2, taps - 1, 256, dtype=dtype)
    causal_conv.forward(x, weight, bias, state, None, True)
    causal_conv.backward(g, state, x, weight, bias, state, None, True)
    causal_conv.backward(g, None, x, weight, None, None, None, False)


@pytest.mark.skipif(not GLUON, reason="this Triton has not what it needs")
@pytest.mark.parametrize("narrow", [40, 96])
def test_convolution_with_the_narrow_product(narrow: int) -> None:
    x, g, out = (like(2, 300, 256, dtype=torch.bfloat16) for _ in range(3))
    rest = like(600, narrow, dtype=torch.bfloat16), like(narrow, 256, dtype=torch.bfloat16)
    mamba_mixer.conv_backward(g, *rest, x, like(256, 4), like(256), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [128, None])
def test_attention(dtype: torch.dtype, window: int | None) -> None:
    width = 128
    q, k, v = (like(1, 512, heads, width, dtype=dtype) for heads in (4, 2, 2))
    y, stats = window_attention.forward(q, k, v, None, None, None, None, window, 0.1)
    for exact in (True, False):
        window_attention.backward(y, q, k, v, None, None, None, None, window, 0.1, y, stats, exact)
    past = like(1, 128, 2, width, dtype=dtype)
    window_attention.forward(q[:, :1], k[:, :1], v[:, :1], past, past, torch.tensor([700]), None, 128, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(dtype: torch.dtype) -> None:
    x, weight = like(2, 30, 384, dtype=dtype), like(384)
    rms_norm.backward(x, x, weight, rms_norm.forward(x, weight, 1e-5)[1])
    for centre in (False, True):
        bias = weight if centre else None
        normed = rms_norm.forward_norm(x, x.float(), weight, bias, 1e-5, dtype, centre)
        rms_norm.backward_norm(
            x, x.float(), normed.normal, weight, centre, normed.mean, normed.scale, torch.float32, dtype, centre
        )
    swiglu.backward(x, *(swiglu.forward(x, x),) * 2)
    both = like(2, 30, 768, dtype=dtype)
    swiglu.backward_fused(swiglu.forward_fused(both), both)
    rotary.rotate(like(2, 30, 4, 64, dtype=dtype), torch.arange(30), 1e4, 1.0)


def test_loss() -> None:
    x, weight, targets, bias = like(40, 64), like(300, 64), torch.arange(40), like(300)
    losses, totals = linear_cross_entropy.forward(x, weight, targets, bias, -100, 16)
    linear_cross_entropy.backward(losses, x, weight, targets, bias, totals, -100, 16)
    slope = linear_cross_entropy.forward_sloped(x, weight, targets, bias, -100, 16)[2]
    linear_cross_entropy.scaled(slope, torch.ones(()), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(dtype: torch.dtype) -> None:
    """Where the GPU can, each kernel starts before the one before it is complete."""
    width, inner = 64, 128
    x, norm = like(3, width, dtype=dtype), Norm(like(width), None, 1e-5)
    matrix = [
        like(*shape, dtype=dtype) for shape in ((2 * inner, width), (inner, 4), (inner,), (36, inner), (inner, 4))
    ]
    weights = MambaWeights(*matrix, like(inner, 16), like(inner), like(inner), like(width, inner, dtype=dtype))
    conv, ssm = like(3, 3, inner, dtype=dtype), like(3, inner, 16)
    decode_step.linear_step(x, like(300, width, dtype=dtype), norm, None, torch.float32)
    decode_step.swiglu_step(x, norm, like(256, width, dtype=dtype), like(width, 128, dtype=dtype))
    decode_step.mamba_step_(x, norm, weights, conv, ssm)
    mamba_piece.mamba_piece(like(3, 5, width, dtype=dtype), norm, weights, conv, ssm)
    inputs = ReplayInputs(*(like(3, 5, size, dtype=dtype) for size in (inner, inner, inner, 16)))
    decode_step.mamba_replay_(inputs, weights.A_log, weights.dt_bias, torch.tensor([1, 2, 3]), conv, ssm)
    k, v, *rings = (like(3, *steps, 2, 64, dtype=dtype) for steps in ((1,), (1,), (8,), (8,)))
    decode_step.ring_write_(k[:, 0], v[:, 0], *rings, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.3, 0.4)])
def test_optimizer(betas: tuple[float, float]) -> None:
    columns = [[like(5000)] for _ in range(4)] + [[torch.zeros(())]]
    for number in (None, torch.ones(())):
        adamw.step(Table(), columns, 1e-3, betas, 1e-8, 0.1, number, number)


def test_every_kind_of_kernel_was_compiled() -> None:
    """Runs last: what a launch was to be is what was compiled."""
    kinds = {"scan_forward", "scan_backward", "scan_back_ends", "conv_forward", "conv_backward", "conv_sums", "skinny"}
    kinds |= {"attention_forward", "attention_backward_keys", "attention_backward_queries", "decode_splits", "ssm_step"}
    kinds |= {"loss_forward", "loss_backward", "ssm_piece", "conv_piece", "replay", "ring_write", "_rotate", "_step"}
    assert kinds <= compiled
