"""transformers (Hugging Face): what it runs where no other kernel is installed."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mamba import modeling_mamba

from milonga.bench.cases import Case, Contender

# The scan of the slow path keeps every step's decays and inputs, and walks over time in Python; its backward pass adds
# whole gradients for every step, so that its time grows with the square of the length.
_STEPS_MOST, _BACKWARD_STEPS_MOST = 4096, 128


def _scan(case: Case) -> list[Contender]:
    """The function of its own that newer versions have."""
    slow = vars(modeling_mamba).get("mamba_selective_scan")
    s = case.letters
    if slow is None or s["T"] > _STEPS_MOST:
        return []
    x, dt, A, B, C, D, z, bias = case.ours.leaves

    def first(value: Tensor) -> Tensor:
        return value.detach().transpose(1, 2).contiguous().requires_grad_()

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        made = slow(x, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
        return made.transpose(1, 2).to(x.dtype)

    leaves = (first(x), first(dt), A, first(B), first(C), D, first(z), bias)
    needs, long = 6.0 * s["B"] * s["T"] * s["E"] * s["N"] * 4, s["T"] > _BACKWARD_STEPS_MOST
    return [Contender("transformers [B E T]", leaves, run, needs=needs, slow_backward=long)]


def _norm(case: Case) -> list[Contender]:
    x, weight = case.ours.leaves
    module = LlamaRMSNorm(x.shape[-1], eps=1e-5).to(x.device)
    module.weight.data.copy_(weight.detach())
    module.to(x.dtype)
    return [Contender("transformers", (x, module.weight), lambda x, weight: module(x))]


def _rotary(case: Case) -> list[Contender]:
    """Its tables, made outside the timing; half of the heads are called queries, the others keys."""
    (x,) = case.ours.leaves
    T, K, heads = case.letters["T"], case.letters["K"], case.letters["H"]
    if heads < 2:
        return []
    frequencies = 10000.0 ** (-torch.arange(0, K, 2, device=x.device, dtype=torch.float64) / K)
    angles = (torch.arange(T, device=x.device, dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)[None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    leaf = x.detach().transpose(1, 2).contiguous().requires_grad_()

    def run(x: Tensor) -> Tensor:
        queries, keys = apply_rotary_pos_emb(x[:, : heads // 2], x[:, heads // 2 :], cos, sin)
        return torch.cat((queries, keys), 1).transpose(1, 2)

    return [Contender("transformers", (leaf,), run)]


OFFERS = {"scan": _scan, "norm": _norm, "rotary": _rotary}
