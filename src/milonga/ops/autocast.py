"""What autocast says on a device. `meta` has none to ask, and PyTorch's own question whether a device has one cannot be
compiled everywhere.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_WITHOUT = "meta"


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of products under autocast on a kind of device; None where it is off."""
    on = device != _WITHOUT and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return autocast_dtype(x.device.type) is not None


def autocast_to(device: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to a dtype; switched off for None."""
    return nullcontext() if device == _WITHOUT else torch.autocast(device, dtype, enabled=dtype is not None)
