"""mamba_ssm: the CUDA scan of Mamba's authors, on [B E T]."""

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from milonga.bench.cases import Case, Contender


def _offer(case: Case) -> list[Contender]:
    x, dt, A, B, C, D, z, bias = case.ours.leaves
    if x.device.type != "cuda":
        return []

    def first(value: Tensor) -> Tensor:
        return value.detach().transpose(1, 2).contiguous().requires_grad_()

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)

    leaves = (first(x), first(dt), A, first(B), first(C), D, first(z), bias)
    return [Contender("mamba_ssm [B E T]", leaves, run)]


OFFERS = {"scan": _offer}
