"""The definition of `causal_conv` in plain PyTorch."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from milonga.segments import Segments, sequence_bounds


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """As `milonga.ops.causal_conv`; any device, any floating dtype, in float64 throughout where x is float64."""
    batch, time, width = x.shape
    kept = weight.shape[1] - 1
    sequences = batch if segments is None else segments.count
    before = x.new_zeros(sequences, kept, width) if initial is None else initial
    if segments is None:
        y, final = _convolve(torch.cat([before, x], 1), weight, bias)
    else:
        bounds = sequence_bounds(batch, time, segments).tolist()
        pieces = [
            _convolve(torch.cat([before[s : s + 1], x[:, i:j]], 1), weight, bias)
            for s, (i, j) in enumerate(pairwise(bounds))
        ]
        y = torch.cat([piece[0] for piece in pieces], 1) if pieces else torch.zeros_like(x)
        final = torch.cat([piece[1] for piece in pieces], 0) if pieces else before.clone()
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), final


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[B W-1+T E]`, the columns before the piece first -> (sums `[B T E]`, a copy of the last W-1 columns)."""
    width = weight.shape[1]
    time = padded.shape[1] - (width - 1)
    wide = torch.promote_types(padded.dtype, torch.float32)
    values = padded.to(wide)
    y = sum(
        (values[:, k : k + time] * weight[:, k].to(wide) for k in range(1, width)),
        values[:, :time] * weight[:, 0].to(wide),
    )
    if bias is not None:
        y = y + bias.to(wide)
    return y, padded[:, time:].clone()
