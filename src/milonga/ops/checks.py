"""Checks of an op's arguments: each failure is one line that names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and sums beside values of `dtype`: float64 beside float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(
    op: str,
    name: str,
    tensor: Tensor,
    letters: str,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    like: str = "x",
) -> None:
    """Raise `ValueError` unless `tensor` has this shape (called `letters`, e.g. `[B T E]`), a dtype of `dtypes`, and is
    on `device`, where the argument `like` is."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} must be {letters}, expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} as {like} is, got {tensor.device}")


def expect_x(op: str, x: Tensor, name: str = "x") -> tuple[int, int, int]:
    """B, T, E of `x`, once it is known to be `[B T E]` of a dtype that ops take."""
    if x.ndim != 3:
        raise ValueError(f"{op}: {name} must be [B T E], expected 3 dimensions, got shape {list(x.shape)}")
    expect_floating(op, x, name)
    return x.shape[0], x.shape[1], x.shape[2]


def expect_rows(op: str, x: Tensor, name: str = "x") -> None:
    """Raise `ValueError` unless `x` is `[..., D]` of a dtype that ops take."""
    if x.ndim < 1:
        raise ValueError(f"{op}: {name} must be [..., D], expected 1 dimension or more, got none")
    expect_floating(op, x, name)


def expect_floating(op: str, x: Tensor, name: str = "x") -> None:
    """Raise `ValueError` unless `x` has a dtype that ops take."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {str(x.dtype).removeprefix('torch.')}"
        )
