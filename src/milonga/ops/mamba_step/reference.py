"""The definition of one step of a Mamba layer in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class StoredWeight(NamedTuple):
    """The weights of a product as `milonga.ops.linear.linear` takes them."""

    weight: Tensor  # [F D]; fp32 (float64 in the reference), bfloat16, or int8
    scale: Tensor | None  # [F] fp32 for int8, else none


class StepWeights(NamedTuple):
    """The weights of a Mamba layer."""

    in_proj: StoredWeight  # [2E D]
    conv_weight: Tensor  # [E W]
    conv_bias: Tensor  # [E]
    x_proj: StoredWeight  # [R+2N E]
    dt_proj: StoredWeight  # [E R]
    A: Tensor  # [E N], negative
    D: Tensor  # [E]
    dt_bias: Tensor  # [E]
    out_proj: StoredWeight  # [D E]


class StepResult(NamedTuple):
    """The output of a step, the state behind it, and what a replay of it needs."""

    y: Tensor  # [B D]
    conv: Tensor  # [B W-1 E]
    ssm: Tensor  # [B E N]
    column: Tensor  # [B E], input of the convolution
    x: Tensor  # [B E], its output
    dt: Tensor  # [B E], before bias and softplus
    B: Tensor  # [B N]


def _linear(x: Tensor, stored: StoredWeight) -> Tensor:
    weight = stored.weight.to(x.dtype)
    return F.linear(x, weight if stored.scale is None else weight * stored.scale[:, None].to(x.dtype))


def mamba_step_reference(x: Tensor, weights: StepWeights, conv: Tensor, ssm: Tensor) -> StepResult:
    """As `milonga.ops.mamba_step.mamba_step`."""
    dtype, states = x.dtype, ssm.shape[2]
    column, z = _linear(x, weights.in_proj).chunk(2, -1)
    columns = torch.cat([conv.to(dtype), column[:, None]], 1)
    u = F.silu((columns * weights.conv_weight.to(dtype).t()).sum(1) + weights.conv_bias.to(dtype))
    low, into, outof = _linear(u, weights.x_proj).split([weights.dt_proj.weight.shape[1], states, states], -1)
    dt = _linear(low, weights.dt_proj)
    delta = F.softplus(dt + weights.dt_bias.to(dtype), threshold=100)
    after = torch.exp(delta[..., None] * weights.A.to(dtype)) * ssm.to(dtype) + (delta * u)[..., None] * into[:, None]
    y = (after * outof[:, None]).sum(-1) + weights.D.to(dtype) * u
    return StepResult(_linear(y * F.silu(z), weights.out_proj), columns[:, 1:], after, column, u, dt, into)
