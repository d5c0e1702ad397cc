"""The definition of a Mamba layer over a short piece in plain PyTorch: its steps, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from milonga.ops.decode_step.reference import MambaWeights, Norm, ReplayInputs, normalised


def mamba_piece_reference(
    x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor
) -> tuple[Tensor, ReplayInputs]:
    """As `milonga.ops.mamba_piece.mamba_piece`."""
    wide, time = ssm.dtype, x.shape[1]
    columns, z = F.linear(normalised(x, norm), weights.in_proj).chunk(2, -1)
    taps = weights.conv_weight.shape[1]
    both = torch.cat([conv, columns.to(conv.dtype)], 1).to(wide)
    u = sum(
        (both[:, j : j + time] * weights.conv_weight[:, j].to(wide) for j in range(taps)), weights.conv_bias.to(wide)
    )
    assert isinstance(u, Tensor)
    u = F.silu(u).to(x.dtype)
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    low, into, outof = F.linear(u, weights.x_proj).split([rank, states, states], -1)
    dt = F.linear(low, weights.dt_proj)
    delta, A, h = F.softplus(dt.to(wide) + weights.dt_bias.to(wide)), -torch.exp(weights.A_log.to(wide)), ssm
    steps = []
    for t in range(time):
        h = (
            torch.exp(A * delta[:, t, :, None]) * h
            + (delta[:, t] * u[:, t].to(wide))[..., None] * into[:, t].to(wide)[:, None]
        )
        steps.append((h * outof[:, t].to(wide)[:, None]).sum(-1) + weights.D.to(wide) * u[:, t].to(wide))
    y = (torch.stack(steps, 1) * F.silu(z.to(wide))).to(x.dtype)
    return x + F.linear(y, weights.out_proj), ReplayInputs(columns, u, dt, into)
