"""Drawing tokens where the logits are, so that a step need not wait for the host."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from milonga.inference.sampling import Sampling
from milonga.ops.speculation import pick

Mode = Literal["greedy", "plain", "sorted"]


def device_mode(settings: Sequence[Sampling]) -> Mode | None:
    """The cheapest way that serves all of these settings; None where one of them needs the host.

    Repetition penalty, min_p, and bytes that are banned, forced or to be valid UTF-8 are left to the host.
    """
    if any(s.penalises or s.constrains or s.min_p is not None for s in settings):
        return None
    if all(s.temperature == 0 for s in settings):
        return "greedy"
    return "sorted" if any(s.top_k is not None or s.top_p is not None for s in settings) else "plain"


def draw_on_device(
    logits: Float[Tensor, "B V"],
    temperature: Float64[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float64[Tensor, " B"],
    uniform: Float64[Tensor, " B"],
    mode: Mode,
) -> Int[Tensor, " B"]:
    """One id for each row of logits: what `Sampler.draw` draws with the same uniform numbers, in float64 like it.

    The two differ where rounding of a cumulative sum decides, about once in 1e13 draws. Nothing is read back.

    Args:
        logits: `[B V]`, fp32 or more.
        temperature: `[B]`; 0 takes the likeliest id, the lowest of equals.
        top_k: `[B]`, V for all. `plain` and `greedy` do not look at it, nor at top_p.
        top_p: `[B]`, 1 for all.
        uniform: `[B]`, from 0 to below 1.
        mode: see `device_mode`.
    """
    if mode == "greedy":
        return logits.argmax(-1)
    drawn = pick(weights_on_device(logits, temperature, top_k, top_p, mode), uniform)
    return torch.where(temperature == 0, logits.argmax(-1), drawn)


def weights_on_device(
    logits: Float[Tensor, "B V"],
    temperature: Float64[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float64[Tensor, " B"],
    mode: Mode,
) -> Float64[Tensor, "B V"]:
    """What `draw_on_device` draws from, not normalised: the likeliest id has 1. Arguments as there, not `greedy`; where
    the temperature is 0 it is taken to be 1."""
    scores = logits.double()
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / torch.where(temperature == 0, 1.0, temperature)[:, None]
    if mode == "plain":
        return scores.exp()
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    weights = ordered.exp()
    ranks = torch.arange(weights.shape[1], device=logits.device)
    weights = torch.where(ranks < top_k[:, None], weights, 0.0)
    cumulative = weights.cumsum(-1)
    before = cumulative - weights
    kept = (before < (top_p * cumulative[:, -1])[:, None]) | (top_p >= 1)[:, None]
    weights = torch.where(kept, weights, 0.0)
    # back in the order of ids, in which the host sums
    return torch.zeros_like(weights).scatter(1, ids, weights)
