"""The definitions of the decoded step's products and recurrence in plain PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """A norm over the width: root-mean-square, or with a bias layer norm."""

    weight: Tensor  # [D], fp32
    bias: Tensor | None  # [D], fp32
    eps: float


class MambaWeights(NamedTuple):
    """The weights of a Mamba layer, under the names and shapes that it has them."""

    in_proj: Tensor  # [2E D]
    conv_weight: Tensor  # [E W]
    conv_bias: Tensor  # [E]
    x_proj: Tensor  # [R+2N E]
    dt_proj: Tensor  # [E R]
    A_log: Tensor  # [E N], fp32
    D: Tensor  # [E], fp32
    dt_bias: Tensor  # [E], fp32
    out_proj: Tensor  # [D E]


class ReplayInputs(NamedTuple):
    """What the steps of a piece added to a Mamba layer's state."""

    columns: Tensor  # [B T E], inputs of the convolution
    x: Tensor  # [B T E]
    dt: Tensor  # [B T E], before bias and softplus
    B: Tensor  # [B T N]


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """`x [B D]` under the norm, in its own dtype; sums in fp32 (float64 where x is)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    if norm.bias is not None:
        return F.layer_norm(v, v.shape[-1:], norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(x.dtype)
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.to(wide)).to(x.dtype)


def linear_step_reference(
    x: Tensor, weight: Tensor, norm: Norm | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `milonga.ops.decode_step.linear_step`."""
    x = x if norm is None else normalised(x, norm)
    y = F.linear(x, weight)
    return (y if residual is None else y + residual).to(dtype)


def swiglu_step_reference(x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `milonga.ops.decode_step.swiglu_step`."""
    gate, up = F.linear(normalised(x, norm), gate_up).chunk(2, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x + F.linear((F.silu(gate.to(wide)) * up.to(wide)).to(x.dtype), down)


def mamba_step_reference(x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor) -> Tensor:
    """As `milonga.ops.decode_step.mamba_step_`."""
    wide = ssm.dtype
    column, z = F.linear(normalised(x, norm), weights.in_proj).chunk(2, -1)
    columns = torch.cat([conv, column[:, None].to(conv.dtype)], 1)
    conv.copy_(columns[:, 1:])
    u = (columns.to(wide) * weights.conv_weight.to(wide).t()).sum(1) + weights.conv_bias.to(wide)
    u = F.silu(u).to(x.dtype)
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, into, outof = F.linear(u, weights.x_proj).split([rank, states, states], -1)
    delta = F.softplus(F.linear(low, weights.dt_proj).to(wide) + weights.dt_bias.to(wide))
    decay = torch.exp(-torch.exp(weights.A_log.to(wide)) * delta[..., None])
    ssm.copy_(decay * ssm + (delta * u.to(wide))[..., None] * into.to(wide)[:, None])
    y = (ssm * outof.to(wide)[:, None]).sum(-1) + weights.D.to(wide) * u.to(wide)
    return x + F.linear((y * F.silu(z.to(wide))).to(x.dtype), weights.out_proj)


def mamba_replay_reference(
    inputs: ReplayInputs, A_log: Tensor, dt_bias: Tensor, keep: Sequence[int], conv: Tensor, ssm: Tensor
) -> None:
    """As `milonga.ops.decode_step.mamba_replay_`."""
    wide = ssm.dtype
    A = -torch.exp(A_log.to(wide))
    for row, steps in enumerate(keep):
        h = ssm[row].clone()
        for t in range(steps):
            delta = F.softplus(inputs.dt[row, t].to(wide) + dt_bias.to(wide))
            h = torch.exp(delta[:, None] * A) * h + (delta * inputs.x[row, t].to(wide))[:, None] * inputs.B[row, t].to(
                wide
            )
        ssm[row] = h
        columns = torch.cat([conv[row], inputs.columns[row, :steps].to(conv.dtype)])
        conv[row] = columns[columns.shape[0] - conv.shape[1] :]


def ring_write_reference(k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, position: Tensor) -> None:
    """As `milonga.ops.decode_step.ring_write_`."""
    slots = ring_k.shape[1]
    if slots:
        rows, slot = torch.arange(k.shape[0], device=k.device), torch.remainder(position, slots)
        ring_k[rows, slot] = k.to(ring_k.dtype)
        ring_v[rows, slot] = v.to(ring_v.dtype)
    position.add_(1)
