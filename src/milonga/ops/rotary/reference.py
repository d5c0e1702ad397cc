"""The definition of `rotary` in plain PyTorch."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles `position * base^(-2i / K)`, i < K / 2: two float64 tensors `[..., K / 2]`.

    Args:
        positions: int64 `[...]`.
        width: K, even.
        base: of the geometric series of frequencies.
    """
    powers = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / -max(width, 1)
    angles = positions.to(torch.float64)[..., None] * torch.pow(float(base), powers)
    return angles.cos(), angles.sin()


def rotary_reference(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """As `milonga.ops.rotary`; any device, any floating dtype, float64 throughout where x is float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide)[..., None, :] for table in rotary_tables(positions, x.shape[-1], base))
    first, second = x.to(wide).chunk(2, -1) if x.shape[-1] else (x.to(wide), x.to(wide))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
