"""The self-test of `milonga doctor`: every op, as it runs here, against its definition in float64."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milonga.ops.backend import choice
from milonga.ops.causal_conv import ERROR_BOUND as CONV_BOUND
from milonga.ops.causal_conv import causal_conv
from milonga.ops.linear_cross_entropy import ERROR_BOUND as LOSS_BOUND
from milonga.ops.linear_cross_entropy import linear_cross_entropy
from milonga.ops.rms_norm import ERROR_BOUND as NORM_BOUND
from milonga.ops.rms_norm import rms_norm
from milonga.ops.rotary import ERROR_BOUND as ROTARY_BOUND
from milonga.ops.rotary import rotary
from milonga.ops.selective_scan import ERROR_BOUND as SCAN_BOUND
from milonga.ops.selective_scan import selective_scan
from milonga.ops.swiglu import ERROR_BOUND as SWIGLU_BOUND
from milonga.ops.swiglu import swiglu
from milonga.ops.window_attention import ERROR_BOUND as ATTENTION_BOUND
from milonga.ops.window_attention import window_attention

# Batch, time, width, states, convolution width, heads, key heads, head width, window: no multiple of a block.
B, T, E, N, W, H, G, K, WINDOW = 2, 131, 72, 16, 4, 4, 2, 20, 33


@dataclass(frozen=True)
class Case:
    """One op on fixed inputs: `run(inputs, backend)` gives its outputs; every input gets a gradient."""

    op: str
    bound: float
    inputs: tuple[Tensor, ...]
    run: Callable[[Sequence[Tensor], str], Sequence[Tensor]]


@dataclass(frozen=True)
class Result:
    """Relative RMS errors of the worst output and of the worst gradient; seconds of one forward and backward pass."""

    op: str
    device: str
    backend: str
    forward_error: float
    gradient_error: float
    bound: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Both errors within the op's bound; NaN is not."""
        return self.forward_error <= self.bound and self.gradient_error <= self.bound


def _scan(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    x, dt, log_a, b, c, d, z, bias, initial = t
    return selective_scan(x, dt, -log_a.exp(), b, c, D=d, z=z, dt_bias=bias, initial=initial, backend=backend)


def _conv(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return causal_conv(t[0], t[1], t[2], initial=t[3], backend=backend)


def _attention(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    q, k, v, past_k, past_v = t
    position = torch.tensor([7, 1000], device=q.device)
    return [window_attention(q, k, v, window=WINDOW, past_k=past_k, past_v=past_v, position=position, backend=backend)]


def _norm(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return [rms_norm(t[0], t[1], backend=backend)]


def _swiglu(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return [swiglu(t[0], t[1], backend=backend)]


def _rotary(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return [rotary(t[0], torch.arange(T, device=t[0].device) + 2**20, backend=backend)]


def _loss(t: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    targets = torch.arange(B * T, device=t[0].device).view(B, T) % 256
    return [linear_cross_entropy(t[0], t[1], targets, backend=backend)]


def cases() -> list[Case]:
    """Every op once; inputs in float64 on the CPU, the same in every process, exact in fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    wide, states = (B, T, E), (B, T, N)
    scan = (normal(*wide), normal(*wide), normal(E, N), normal(*states), normal(*states), normal(E), normal(*wide))
    ring = (B, WINDOW - 1, G, K)
    attention = (normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K), normal(*ring), normal(*ring))
    return [
        Case("selective_scan", SCAN_BOUND, (*scan, normal(E) - 3, normal(B, E, N)), _scan),
        Case("causal_conv", CONV_BOUND, (normal(*wide), normal(E, W), normal(E), normal(B, W - 1, E)), _conv),
        Case("window_attention", ATTENTION_BOUND, attention, _attention),
        Case("rms_norm", NORM_BOUND, (normal(*wide), normal(E)), _norm),
        Case("swiglu", SWIGLU_BOUND, (normal(*wide), normal(*wide)), _swiglu),
        Case("rotary", ROTARY_BOUND, (normal(B, T, H + G, K),), _rotary),
        Case("linear_cross_entropy", LOSS_BOUND, (normal(*wide), normal(256, E)), _loss),
    ]


def _pass(case: Case, backend: str, device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], float]:
    """-> (outputs, gradient of every input, seconds), the outputs weighed with fixed numbers."""
    leaves = [value.to(device, dtype).requires_grad_() for value in case.inputs]
    generator = torch.Generator().manual_seed(1)
    began = time.perf_counter()
    outputs = list(case.run(leaves, backend))
    weights = [torch.randn(out.shape, generator=generator).to(device, out.dtype) for out in outputs]
    gradients = list(torch.autograd.grad(outputs, leaves, weights))
    if device != "cpu":
        torch.accelerator.synchronize()
    return [out.detach() for out in outputs], gradients, time.perf_counter() - began


def worst_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative RMS difference of a pair; infinite where a number is missing."""
    worst = 0.0
    for mine, reference in zip(got, expected, strict=True):
        difference = mine.double().cpu() - reference
        relative = float(difference.norm() / reference.norm().clamp_min(1e-300))
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def check(case: Case, device: str) -> Result:
    """Run `case` in fp32 on `device` with the backend that `auto` takes there, and compare."""
    outputs, gradients, _ = _pass(case, "reference", "cpu", torch.float64)
    _pass(case, "auto", device, torch.float32)  # compiles what is not compiled
    got, got_gradients, seconds = _pass(case, "auto", device, torch.float32)
    return Result(
        op=case.op,
        device=device,
        backend=choice(case.op, "auto", device, torch.float32),
        forward_error=worst_error(got, outputs),
        gradient_error=worst_error(got_gradients, gradients),
        bound=case.bound,
        seconds=seconds,
    )
