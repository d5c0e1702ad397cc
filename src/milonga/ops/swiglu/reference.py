"""The definition of `swiglu` in plain PyTorch."""

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """As `milonga.ops.swiglu`; any device, any floating dtype, float64 throughout where gate is float64."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
