"""mambapy: a parallel scan over time in plain PyTorch."""

import torch
import torch.nn.functional as F
from mambapy.pscan import pscan
from torch import Tensor

from milonga.bench.cases import Case, Contender


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """The scan with what mambapy's own block computes around it."""
    step = F.softplus(dt.float() + dt_bias)
    decay = torch.exp(step.unsqueeze(-1) * A)
    h = pscan(decay, step.unsqueeze(-1) * B.float().unsqueeze(2) * x.float().unsqueeze(-1))
    return (((h @ C.float().unsqueeze(-1)).squeeze(3) + D * x) * F.silu(z)).to(x.dtype)


def _offer(case: Case) -> list[Contender]:
    s = case.letters
    needs = 12.0 * s["B"] * s["T"] * s["E"] * s["N"] * 4
    return [Contender("mambapy", case.ours.leaves, scan, needs=needs)]


OFFERS = {"scan": _offer}
