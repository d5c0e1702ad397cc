"""A Mamba layer over a short piece on a GPU: six launches, four of them those of a decoded step."""

import torch
from torch import Tensor

from milonga.ops.decode_step.reference import MambaWeights, Norm, ReplayInputs
from milonga.ops.decode_step.triton import _NARROW, _pdl, _power, _product, _share, linear_step, normalised, tile
from milonga.ops.mamba_piece import triton_kernels

_CHANNELS = 16  # of a program of the recurrence: so many that its product fits the matrix units
_STEPS = 8  # whose inputs the recurrence loads together


def mamba_piece(x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor) -> tuple[Tensor, ReplayInputs]:
    """As `milonga.ops.mamba_piece.mamba_piece`."""
    batch, time, width = x.shape
    rows, device = batch * time, x.device
    inner, states = weights.A_log.shape
    wide, rank, taps = weights.x_proj.shape[0], weights.dt_proj.shape[1], weights.conv_weight.shape[1]
    flat = x.view(rows, width)
    xz = torch.empty(rows, 2 * inner, dtype=x.dtype, device=device)
    shape = tile(2 * inner, width, x.element_size())
    _product(normalised(flat, norm), weights.in_proj, xz, 2 * inner, shape)
    u = torch.empty(rows, inner, dtype=x.dtype, device=device)
    triton_kernels.conv_piece[(-(-inner // 256), rows)](
        xz, weights.conv_weight, weights.conv_bias, conv, u, time, inner, CH=256, W=taps, num_warps=2, **_pdl(x)
    )
    shape = shape if x.element_size() > 2 else _NARROW
    turn = shape.groups * shape.width
    span = turn * _share(-(-inner // turn))
    splits = -(-inner // span)
    low = torch.empty(splits, rows, wide, dtype=torch.float32, device=device)
    # late, as in a step: else kernels of layers to come crowd the multiprocessors (8 bytes through 28 layers: 770 us
    # and more in place of 638)
    _product(u, weights.x_proj, low, wide, shape, span=span, early=False)
    dt, y = torch.empty_like(u), torch.empty_like(u)
    into = torch.empty(rows, states, dtype=x.dtype, device=device)
    programs = -(-inner // _CHANNELS)
    both = torch.empty(batch, programs, time, 2, states, dtype=x.dtype, device=device)
    triton_kernels.ssm_piece[(programs, batch)](
        xz, u, low, weights.dt_proj, weights.dt_bias, weights.A_log, weights.D, ssm, dt, both, into, y, rows, time,
        inner, rank, SPLITS=splits, STATES=states, N=_power(states), RB=max(16, _power(rank)), CH=_CHANNELS,
        TB=max(16, _power(time)), STEPS=_STEPS, num_warps=2, **_pdl(x),
    )  # fmt: skip
    out = linear_step(y, weights.out_proj, None, flat, x.dtype)
    pieces = (part.view(batch, time, -1) for part in (xz, u, dt, into))
    columns, *rest = pieces
    return out.view(x.shape), ReplayInputs(columns[..., :inner], *rest)
