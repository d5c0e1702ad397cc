"""fla (flash-linear-attention): Triton kernels."""

import torch
from fla.modules.activations import swiglu
from fla.modules.causal_conv1d import causal_conv1d
from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss
from fla.modules.norm.layernorm import rms_norm
from fla.modules.rotary import rotary_embedding
from torch import Tensor

from milonga.bench.cases import Case, Contender, targets_of


def _on_gpu(case: Case, made: Contender) -> list[Contender]:
    return [made] if case.ours.leaves[0].device.type == "cuda" else []


def _conv(case: Case) -> list[Contender]:
    x, weight, bias = case.ours.leaves

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")[0]

    return _on_gpu(case, Contender("fla", (x.detach().contiguous().requires_grad_(), weight, bias), run))


def _norm(case: Case) -> list[Contender]:
    return _on_gpu(case, Contender("fla", case.ours.leaves, lambda x, weight: rms_norm(x, weight, None, eps=1e-5)))


def _swiglu(case: Case) -> list[Contender]:
    gate, up = (one.detach().contiguous().requires_grad_() for one in case.ours.leaves)
    return _on_gpu(case, Contender("fla", (gate, up), swiglu))


def _rotary(case: Case) -> list[Contender]:
    (x,) = case.ours.leaves
    T, K = case.letters["T"], case.letters["K"]
    frequencies = 10000.0 ** (-torch.arange(0, K, 2, device=x.device, dtype=torch.float64) / K)
    angles = torch.arange(T, device=x.device, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    leaf = x.detach().contiguous().requires_grad_()
    return _on_gpu(case, Contender("fla", (leaf,), lambda x: rotary_embedding(x, cos, sin)))


def _loss(case: Case) -> list[Contender]:
    """It makes the gradient in the forward pass, of the mean."""
    targets = targets_of(case.letters, case.ours.leaves[0].device).flatten()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_cross_entropy_loss(x.flatten(0, 1), targets, weight)

    return _on_gpu(case, Contender("fla (mean)", case.ours.leaves, run))


OFFERS = {"conv": _conv, "norm": _norm, "swiglu": _swiglu, "rotary": _rotary, "loss": _loss}
