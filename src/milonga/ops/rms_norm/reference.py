"""The definition of `rms_norm` in plain PyTorch."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `milonga.ops.rms_norm`; any device, any floating dtype, float64 throughout where x is float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.to(wide)).to(x.dtype)
