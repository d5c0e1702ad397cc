"""PyTorch's own functions."""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from milonga.bench.cases import Case, Contender, targets_of

# Beyond this many steps a mask of [T T] is not held.
_MASK_MOST = 16384


def _conv(case: Case) -> list[Contender]:
    """A grouped `conv1d` on [B E T]."""
    x, weight, bias = case.ours.leaves
    taps = weight.shape[1]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(x, weight, bias, padding=taps - 1, groups=x.shape[1])[..., : x.shape[-1]])

    channels_first = x.detach().transpose(1, 2).contiguous().requires_grad_()
    leaves = (channels_first, weight.detach()[:, None].requires_grad_(), bias)
    return [Contender("PyTorch conv1d [B E T]", leaves, run)]


def _attention(case: Case) -> list[Contender]:
    """What PyTorch has: SDPA as it chooses, FlexAttention, and FlashAttention with a window where it is built in."""
    s = case.letters
    T, H, G, w = s["T"], s["H"], s["G"], s["w"]
    q, k, v = case.ours.leaves
    heads_first = tuple(one.detach().transpose(1, 2).contiguous().requires_grad_() for one in (q, k, v))
    windowed = bool(w) and w < T
    made = []
    if not windowed or T <= _MASK_MOST:
        mask = _window_mask(T, w, q.device) if windowed else None

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=H != G)
            return made.transpose(1, 2)

        made.append(Contender("PyTorch SDPA" + (", mask" if windowed else ""), heads_first, sdpa))
    if q.device.type == "cuda":
        if case.dtype in (torch.bfloat16, torch.float16):
            made += _varlen(case)
        made.append(_flex(case, heads_first))  # on a CPU it has no backward pass
    return made


def _window_mask(T: int, w: int, device: torch.device) -> Tensor:
    ahead = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (ahead >= 0) & (ahead < w)


def _flex(case: Case, leaves: tuple[Tensor, ...]) -> Contender:
    s = case.letters
    T, w = s["T"], s["w"] or s["T"]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < w)

    long = T > _MASK_MOST  # compiled, so that no mask of [T T] is ever held
    blocks = flex.create_block_mask(sees, None, None, T, T, device=leaves[0].device, _compile=long)
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = compiled(q, k, v, block_mask=blocks, enable_gqa=s["H"] != s["G"])
        assert isinstance(made, Tensor)
        return made.transpose(1, 2)

    return Contender("PyTorch FlexAttention", leaves, run)


def _varlen(case: Case) -> list[Contender]:
    """FlashAttention through `varlen_attn`, rows laid end to end; older versions know no window."""
    s = case.letters
    known = inspect.signature(varlen.varlen_attn).parameters
    if "window_size" not in known or (s["H"] != s["G"] and "enable_gqa" not in known):
        return []
    B, T, w = s["B"], s["T"], s["w"]
    leaves = tuple(one.detach().flatten(0, 1).requires_grad_() for one in case.ours.leaves)
    offsets = torch.arange(0, B * T + 1, T, device=leaves[0].device, dtype=torch.int32)
    window = (w - 1 if w else -1, 0)
    attend = partial(varlen.varlen_attn, window_size=window)
    if s["H"] != s["G"]:
        attend = partial(varlen.varlen_attn, window_size=window, enable_gqa=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = attend(q, k, v, offsets, offsets, T, T)
        assert isinstance(made, Tensor)
        return made.unflatten(0, (B, T))

    return [Contender("PyTorch varlen_attn", leaves, run)]


def _norm(case: Case) -> list[Contender]:
    x, weight = case.ours.leaves

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    return [Contender("PyTorch rms_norm", (x, weight.detach().to(x.dtype).requires_grad_()), run)]


def _swiglu(case: Case) -> list[Contender]:
    return [Contender("PyTorch silu * up", case.ours.leaves, lambda gate, up: F.silu(gate) * up)]


def _loss(case: Case) -> list[Contender]:
    """The logits of every row at once."""
    targets = targets_of(case.letters, case.ours.leaves[0].device)
    rows, V = targets.numel(), case.letters["V"]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)

    return [Contender("PyTorch cross_entropy", case.ours.leaves, run, needs=3.0 * rows * V * 4)]


def _linear(case: Case) -> list[Contender]:
    return [Contender("PyTorch linear", case.ours.leaves, F.linear)]


OFFERS = {
    "conv": _conv,
    "attention": _attention,
    "norm": _norm,
    "swiglu": _swiglu,
    "loss": _loss,
    "linear": _linear,
}
