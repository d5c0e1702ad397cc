"""The decoded step on a GPU: the choice of tiles by shape alone, and launches."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.decode_step import triton_kernels
from milonga.ops.decode_step.reference import MambaWeights, Norm, ReplayInputs
from milonga.ops.gpu.triton_parts import rows

# Programs that share the sum of the narrow product to dt, B and C, at most.
_SPLITS = 8
# Channels and rows of a program that steps the recurrence.
_CHANNELS = 32
_ROWS = 4


class Tile(NamedTuple):
    """How a program walks its share of a weight.

    Features a program; groups of warps that share the sum, and the width each takes at a turn; turns whose weights are
    read before the input is there; warps; turns whose loads are in flight together after that; turns of those before
    whose inputs are read together.
    """

    features: int
    groups: int
    width: int
    held: int
    warps: int
    stages: int
    ahead: int = 1


_NARROW = Tile(16, 4, 64, 2, 4, 2)  # of that narrow product


@cache
def dependent_launch(index: int) -> bool:
    """Whether that GPU can start a kernel before the one before it is complete (compute capability 9.0 on)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index)[0] >= 9


def _pdl(x: Tensor) -> dict[str, bool]:
    """The launch options of programmatic dependent launch, where there is such a thing."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and dependent_launch(x.device.index or 0) else {"PDL": False}


def tile(features: int, width: int, element: int, *, gated: bool = False) -> Tile:
    """The tile of a product with a weight `[features, width]`. It depends neither on the batch nor on a measurement.

    On an H100 all programs are resident at once for the widths of large models, and as much of a weight as its shared
    memory takes is on its way before the input is there.
    """
    if element > 2:  # no tensor cores: correct, not tuned
        return Tile(16, 2, 32, 0, 4, 2)
    if gated:
        return Tile(16, 4, 64, 2, 4, 3)
    if features >= 4096:
        return Tile(16, 4, 64, 6, 4, 2)
    return Tile(16, 8, 64, 7, 8, 2, 2) if width % 512 == 0 else Tile(16, 4, 64, 6, 4, 2, 2)


def _power(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def _share(turns: int) -> int:
    """Turns of each of at most `_SPLITS` programs, the same for all of them where that can be."""
    least = -(-turns // _SPLITS)
    return next((share for share in range(least, 2 * least + 1) if turns % share == 0), least)


def _product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    features: int,
    shape: Tile,
    *,
    span: int | None = None,
    residual: Tensor | None = None,
    conv: tuple[Tensor, Tensor, Tensor] | None = None,
    gated: bool = False,
    early: bool = True,
) -> None:
    """Launch `skinny`."""
    batch, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    span = width if span is None else span
    splits = -(-width // span)
    rows = min(32, max(16, _power(batch)))  # more rows would not fit in registers beside the weights
    conv_weight, conv_bias, conv_state = conv or (weight, weight, weight)
    grid = (-(-features // shape.features), splits, -(-batch // rows))
    turn = shape.groups * shape.width
    pieces = -(-span // turn)
    triton_kernels.skinny[grid](
        x, weight, x if residual is None else residual, out, conv_weight, conv_bias, conv_state,
        batch, features, width, span, x.stride(0), FB=shape.features, KB=shape.width, G=shape.groups, BB=rows,
        HELD=min(shape.held, pieces), AHEAD=max(1, min(shape.ahead, shape.held, pieces)), PIECES=pieces,
        W=conv_weight.shape[1] if conv else 1, GATED=gated, CONV=conv is not None, RESIDUAL=residual is not None,
        SPLIT=splits > 1,
        EVEN=span % turn == 0 and width % span == 0, EARLY=early, num_warps=shape.warps, num_stages=shape.stages,
        **_pdl(x),
    )  # fmt: skip


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """`x [B D]` under the norm."""
    out = torch.empty_like(x)
    bias = norm.weight if norm.bias is None else norm.bias
    triton_kernels.normalise[(x.shape[0],)](
        x, norm.weight, bias, out, x.shape[1], norm.eps,
        CENTRED=norm.bias is not None, BLOCK=_power(x.shape[1]), num_warps=4, **_pdl(x),
    )  # fmt: skip
    return out


def linear_step(x: Tensor, weight: Tensor, norm: Norm | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `milonga.ops.decode_step.linear_step`."""
    x = x if norm is None else normalised(x, norm)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    _product(x, weight, out, weight.shape[0], tile(*weight.shape, weight.element_size()), residual=residual)
    return out


def swiglu_step(x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `milonga.ops.decode_step.swiglu_step`."""
    hidden = down.shape[1]
    between = torch.empty(x.shape[0], hidden, dtype=x.dtype, device=x.device)
    shape = tile(hidden, x.shape[1], x.element_size(), gated=True)
    _product(normalised(x, norm), gate_up, between, hidden, shape, gated=True)
    return linear_step(between, down, None, x, x.dtype)


def mamba_step_(x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor) -> Tensor:
    """As `milonga.ops.decode_step.mamba_step_`."""
    batch, device = x.shape[0], x.device
    inner, states = weights.A_log.shape
    wide, rank = weights.x_proj.shape[0], weights.dt_proj.shape[1]
    xz = torch.empty(batch, 2 * inner, dtype=x.dtype, device=device)
    shape = tile(2 * inner, x.shape[1], x.element_size())
    while inner % shape.features:  # a tile is convolved whole or not at all
        shape = shape._replace(features=shape.features // 2)
    _product(
        normalised(x, norm), weights.in_proj, xz, 2 * inner, shape, conv=(weights.conv_weight, weights.conv_bias, conv)
    )
    shape = shape if x.element_size() > 2 else _NARROW
    turn = shape.groups * shape.width
    span = turn * _share(-(-inner // turn))
    splits = -(-inner // span)
    low = torch.empty(splits, batch, wide, dtype=torch.float32, device=device)
    _product(xz[:, :inner], weights.x_proj, low, wide, shape, span=span, early=False)
    y = torch.empty(batch, inner, dtype=x.dtype, device=device)
    padded = _power(states)
    rows = 1 if batch < _ROWS else max(1, min(_ROWS, 64 // padded))
    # of a large batch all programs are resident at once with so many registers
    crowded = {"maxnreg": 128} if x.is_cuda and padded <= 16 else {}
    triton_kernels.ssm_step[(-(-inner // _CHANNELS), -(-batch // rows))](
        xz, low, weights.dt_proj, weights.dt_bias, weights.A_log, weights.D, ssm, y, batch, inner, rank,
        SPLITS=splits, STATES=states, N=padded, RB=_power(rank), CH=_CHANNELS, BB=rows, num_warps=4,
        **crowded, **_pdl(x),
    )  # fmt: skip
    return linear_step(y, weights.out_proj, None, x, x.dtype)


def mamba_replay_(
    inputs: ReplayInputs, A_log: Tensor, dt_bias: Tensor, keep: Tensor, conv: Tensor, ssm: Tensor
) -> None:
    """As `milonga.ops.decode_step.mamba_replay_`."""
    columns = inputs.columns if inputs.columns.stride(-1) == 1 else inputs.columns.contiguous()
    batch, time, inner = inputs.x.shape
    x, x_step = rows(inputs.x, inner)
    dt, dt_step = rows(inputs.dt, inner)
    into, into_step = rows(inputs.B, inputs.B.shape[-1])
    states = A_log.shape[1]
    triton_kernels.replay[(-(-inner // _CHANNELS), batch)](
        columns, x, dt, into, A_log, dt_bias, keep.contiguous(), conv, ssm, time, inner, columns.stride(0),
        columns.stride(1), x_step, dt_step, into_step,
        STATES=states, N=_power(states), CH=_CHANNELS, W=conv.shape[1] + 1, num_warps=4,
    )  # fmt: skip


def ring_write_(k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, position: Tensor) -> None:
    """As `milonga.ops.decode_step.ring_write_`."""
    k, v = (value if value[0].is_contiguous() else value.contiguous() for value in (k, v))
    key, value = k[0].numel(), v[0].numel()
    triton_kernels.ring_write[(k.shape[0],)](
        k, v, ring_k, ring_v, position, ring_k.shape[1], k.stride(0), v.stride(0),
        KW=key, VW=value, KB=_power(key), VB=_power(value), num_warps=4,
    )  # fmt: skip
