"""causal_conv1d: the CUDA convolution of Mamba's authors, on [B E T] with either dimension innermost."""

from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from milonga.bench.cases import Case, Contender


def _offer(case: Case) -> list[Contender]:
    x, weight, bias = case.ours.leaves
    if x.device.type != "cuda":
        return []

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x, weight, bias, activation="silu").transpose(1, 2)

    first = x.detach().transpose(1, 2).contiguous().requires_grad_()
    made = [Contender("causal_conv1d [B E T]", (first, weight, bias), run)]
    if weight.shape[0] % 8 == 0:
        last = x.detach().contiguous().transpose(1, 2).detach().requires_grad_()
        made.append(Contender("causal_conv1d [B T E]", (last, weight, bias), run))
    return made


OFFERS = {"conv": _offer}
