"""The definition of `selective_scan` in plain PyTorch."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from milonga.segments import Segments, sequence_bounds


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """As `milonga.ops.selective_scan`, one step at a time; any device, in float64 throughout where x is float64."""
    dtype = x.dtype
    batch, time, width = x.shape
    wide = torch.promote_types(dtype, torch.float32)
    x, dt, B, C = x.to(wide), dt.to(wide), B.to(wide), C.to(wide)
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias)

    if segments is None:
        h = x.new_zeros(batch, width, A.shape[1]) if initial is None else initial.clone()
        y, final = _recurrence(x, delta, A, B, C, h)
    else:
        h = x.new_zeros(segments.count, width, A.shape[1]) if initial is None else initial.clone()
        bounds = sequence_bounds(batch, time, segments).tolist()
        pieces = [
            _recurrence(x[:, i:j], delta[:, i:j], A, B[:, i:j], C[:, i:j], h[s : s + 1])
            for s, (i, j) in enumerate(pairwise(bounds))
        ]
        y = torch.cat([piece[0] for piece in pieces], 1) if pieces else torch.zeros_like(x)
        final = torch.cat([piece[1] for piece in pieces], 0) if pieces else h

    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype), final


def _recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = C_t h_t, for rows `[B T E]` from states `[B E N]`."""
    y = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(y, 1) if y else torch.zeros_like(x)), h
