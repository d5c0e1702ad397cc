"""The decoded step on a GPU: the choice of tiles by shape alone, and launches."""

import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.decode_step import triton_kernels
from milonga.ops.decode_step.reference import MambaWeights, Norm, ReplayInputs

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


class _Options(NamedTuple):
    """How a Mamba layer's kernels share the GPU; nothing but time depends on it."""

    narrow: Tile | None = None
    channels: int = _CHANNELS  # and rows and warps of a program of the recurrence, and the registers of a thread
    rows: int = _ROWS
    warps: int = 4
    registers: int = 128
    # which kernel asks for the weights of the projection out, for the L2 cache: "in" at its end, "narrow" before its
    # wait or "narrow-late" at its end, "scan" before its wait or "scan-first" before all
    fetch: str = ""
    tail: bool = False  # the projection in asks for what it does not hold (widths of whole tiles only)
    own: int = 0  # programs of the projection in that ask for the weights of those so many, twice so many, ... on
    # kernels that let their successor start before their own loads: "in", "out", "scan"
    first: frozenset[str] = frozenset()
    matrix: bool = False  # dt's projection on the matrix units
    ready: bool = False  # what a product adds at its end is read before it: residuals, columns and taps
    # by the address of a projection out, the weights that it asks for
    following: Mapping[int, Tensor] = MappingProxyType({})


_options = _Options()
_LARGEST_FETCH = 40 << 20  # of the 50 MiB of an H100's L2 cache


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
    return Tile(16, 8, 64, 7, 8, 2, 2) if width % 512 == 0 else Tile(16, 4, 64, 4, 4, 3)


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
    fetch: tuple[Tensor, int] | None = None,
    own: int = 0,
    tail: bool = False,
    first: bool = False,
) -> None:
    """Launch `skinny`. `fetch`: a weight that it asks for, before its wait (1) or at its end (2)."""
    batch, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous()
    span = width if span is None else span
    splits = -(-width // span)
    rows = min(32, max(16, _power(batch)))  # more rows would not fit in registers beside the weights
    conv_weight, conv_bias, conv_state = conv or (weight, weight, weight)
    grid = (-(-features // shape.features), splits, -(-batch // rows))
    turn = shape.groups * shape.width
    pieces = -(-span // turn)
    following, when = fetch or (weight, 0)
    size, share = _fetched(following, grid, 32 * shape.warps)
    if not size or not _pdl(x)["PDL"]:
        when = own = 0
        tail = False
    if width * weight.element_size() % 16:  # where a row begins
        own, tail = 0, False
    triton_kernels.skinny[grid](
        x, weight, x if residual is None else residual, out, conv_weight, conv_bias, conv_state,
        following, batch, features, width, span, x.stride(0), size, share, FB=shape.features,
        KB=shape.width, G=shape.groups, BB=rows,
        HELD=min(shape.held, pieces), AHEAD=max(1, min(shape.ahead, shape.held, pieces)), PIECES=pieces,
        W=conv_weight.shape[1] if conv else 1, GATED=gated, CONV=conv is not None, RESIDUAL=residual is not None,
        SPLIT=splits > 1,
        EVEN=span % turn == 0 and width % span == 0, EARLY=early, FETCH=when, OWN=own,
        FIRST=first, READY=_options.ready, TAIL=tail, num_warps=shape.warps, num_stages=shape.stages,
        **_pdl(x),
    )  # fmt: skip


def _fetched(weight: Tensor, grid: tuple[int, ...], threads: int) -> tuple[int, int]:
    """Bytes of a weight that programs ask for, and of one program; 0 where it cannot be."""
    size, piece = weight.numel() * weight.element_size(), triton_kernels.PIECE.value
    share = piece * -(-size // (piece * math.prod(grid)))
    possible = size <= _LARGEST_FETCH and share <= piece * threads and weight.data_ptr() % 16 == 0
    return (size, share) if possible else (0, 0)


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
    options, batch, device = _options, x.shape[0], x.device
    inner, states = weights.A_log.shape
    wide, rank = weights.x_proj.shape[0], weights.dt_proj.shape[1]
    xz = torch.empty(batch, 2 * inner, dtype=x.dtype, device=device)
    shape = tile(2 * inner, x.shape[1], x.element_size())
    while inner % shape.features:  # a tile is convolved whole or not at all
        shape = shape._replace(features=shape.features // 2)
    _product(
        normalised(x, norm), weights.in_proj, xz, 2 * inner, shape, conv=(weights.conv_weight, weights.conv_bias, conv),
        fetch=(weights.out_proj, 2) if options.fetch == "in" else None, own=options.own, tail=options.tail,
        first="in" in options.first,
    )  # fmt: skip
    shape = shape if x.element_size() > 2 else options.narrow or _NARROW
    turn = shape.groups * shape.width
    span = turn * _share(-(-inner // turn))
    splits = -(-inner // span)
    low = torch.empty(splits, batch, wide, dtype=torch.float32, device=device)
    when = {"narrow": 1, "narrow-late": 2}.get(options.fetch)
    fetch = (weights.out_proj, when) if when else None
    _product(xz[:, :inner], weights.x_proj, low, wide, shape, span=span, early=False, fetch=fetch)
    y = torch.empty(batch, inner, dtype=x.dtype, device=device)
    padded = _power(states)
    # a sum over the splits takes the same order only in the same tile
    rows = 1 if batch < options.rows and not options.matrix else max(1, min(options.rows, 64 // padded))
    # of a large batch all programs are resident at once with so many registers
    crowded = {"maxnreg": options.registers} if x.is_cuda and padded <= 16 else {}
    grid = (-(-inner // options.channels), -(-batch // rows))
    size, share = _fetched(weights.out_proj, grid, 32 * options.warps) if options.fetch[:4] == "scan" else (0, 0)
    when = 1 if options.fetch == "scan-first" else 2
    triton_kernels.ssm_step[grid](
        xz, low, weights.dt_proj, weights.dt_bias, weights.A_log, weights.D, ssm, y, weights.out_proj,
        batch, inner, rank, size, share,
        SPLITS=splits, STATES=states, N=padded, RB=max(16, _power(rank)), CH=options.channels, BB=rows,
        SB=_power(splits), FETCH=when if size and _pdl(x)["PDL"] else 0,
        FIRST="scan" in options.first, MATRIX=options.matrix, num_warps=options.warps, **crowded, **_pdl(x),
    )  # fmt: skip
    out, shape = torch.empty_like(x), tile(*weights.out_proj.shape, x.element_size())
    following = options.following.get(weights.out_proj.data_ptr())
    fetch = None if following is None else (following, 1)
    _product(y, weights.out_proj, out, x.shape[1], shape, residual=x, fetch=fetch, first="out" in options.first)
    return out


def mamba_replay_(
    inputs: ReplayInputs, A_log: Tensor, dt_bias: Tensor, keep: Tensor, conv: Tensor, ssm: Tensor
) -> None:
    """As `milonga.ops.decode_step.mamba_replay_`."""
    columns, x, dt, into = (value if value.stride(-1) == 1 else value.contiguous() for value in inputs)
    assert all(value.stride(0) == x.shape[1] * value.stride(1) for value in (x, dt, into))
    batch, time, inner = x.shape
    states = A_log.shape[1]
    triton_kernels.replay[(-(-inner // _CHANNELS), batch)](
        columns, x, dt, into, A_log, dt_bias, keep, conv, ssm, time, inner, columns.stride(0), columns.stride(1),
        x.stride(1), dt.stride(1), into.stride(1),
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
