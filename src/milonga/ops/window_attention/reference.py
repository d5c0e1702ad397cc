"""The definition of `window_attention` in plain PyTorch: a masked softmax over the keys of the ring and the piece."""

import math

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_to
from milonga.segments import Segments


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    position: Tensor | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `milonga.ops.window_attention`; any device, any floating dtype, float64 throughout where q is float64.

    Time and memory grow with the square of T.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, time, _, width = q.shape
    groups = k.shape[2]
    query_sequence, query_position = _steps(batch, time, position, segments, q.device)
    key_sequence, key_position = query_sequence, query_position
    # Autocast would take the products in half precision; the definition does not change with it.
    with autocast_to(q.device.type, None):
        keys, values = k.to(wide), v.to(wide)
        if past_k is not None and past_v is not None and position is not None:
            ring_sequence, ring_position = _ring(position, past_k.shape[1], packed=segments is not None)
            # Slots not yet written may hold anything, NaN included.
            unwritten = (ring_position < 0)[..., None, None]
            ring_shape = (*ring_position.shape, groups)
            ring_k = past_k.to(wide).reshape(*ring_shape, width).masked_fill(unwritten, 0.0)
            ring_v = past_v.to(wide).reshape(*ring_shape, v.shape[-1]).masked_fill(unwritten, 0.0)
            keys, values = torch.cat([ring_k, keys], 1), torch.cat([ring_v, values], 1)
            key_sequence = torch.cat([ring_sequence, key_sequence], 1)
            key_position = torch.cat([ring_position, key_position], 1)
        distance = query_position[:, :, None] - key_position[:, None, :]
        visible = (query_sequence[:, :, None] == key_sequence[:, None, :]) & (distance >= 0)
        visible = visible & (key_position >= 0)[:, None, :]
        if window is not None:
            visible = visible & (distance < window)
        return _attend(q.to(wide), keys, values, visible, width**-0.5 if scale is None else scale).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of q `[B T H K]` over k `[B M G K]`, v `[B M G V]` where `visible` `[B T M]` allows it."""
    batch, time, heads, width = q.shape
    groups = k.shape[2]
    # A weight of zero times NaN is NaN: a NaN is taken out here and put back only where its key is seen.
    k, k_spoiled = k.masked_fill(k.isnan(), 0.0), k.isnan().any(-1)
    v, v_spoiled = v.masked_fill(v.isnan(), 0.0), v.isnan()
    grouped = q.reshape(batch, time, groups, heads // groups, width)
    scores = torch.einsum("btgrk,bmgk->bgrtm", grouped, k) * scale
    scores = scores.masked_fill(k_spoiled.permute(0, 2, 1)[:, :, None, None, :], math.nan)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    weights = torch.softmax(scores, -1)
    y = torch.einsum("bgrtm,bmgv->btgrv", weights, v)
    sees_spoiled = torch.einsum("btm,bmgv->btgv", visible.to(y.dtype), v_spoiled.to(y.dtype)) > 0
    y = y + torch.where(sees_spoiled, math.nan, 0.0)[:, :, :, None, :]
    return y.reshape(batch, time, heads, v.shape[-1])


def _steps(
    batch: int, time: int, position: Tensor | None, segments: Segments | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each step of the piece: its sequence within its row of the batch, and its absolute position; int64 `[B T]`."""
    steps = torch.arange(time, device=device)
    if segments is None:
        absolute = steps[None, :].expand(batch, time)
        if position is not None:
            absolute = absolute + position[:, None]
        return torch.zeros_like(absolute), absolute
    offsets = segments.on(device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), steps, right=True)
    start = -offsets[:-1] if position is None else position - offsets[:-1]
    return sequence[None], (steps + start[sequence])[None]


def _ring(position: Tensor, slots: int, *, packed: bool) -> tuple[Tensor, Tensor]:
    """Of each slot: its sequence within its row of the batch, and the absolute position of its key (negative: none)."""
    last = position[:, None] - 1
    absolute = last - (last - torch.arange(slots, device=position.device)) % max(slots, 1)
    if not packed:
        return torch.zeros_like(absolute), absolute
    sequence = torch.arange(position.numel(), device=position.device).repeat_interleave(slots)
    return sequence[None], absolute.reshape(1, -1)
