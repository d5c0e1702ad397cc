"""Rotary position embedding."""

import torch
from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import expect_floating
from milonga.ops.rotary.library import rotary_op
from milonga.ops.rotary.reference import rotary_reference, rotary_tables

# Bound of the relative RMS error of the output and of the gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6
# Bound of the error of an angle, in radians, for positions below 2^31.
ANGLE_BOUND = 1e-6


def rotary(x: Tensor, positions: Tensor, *, base: float = 10000.0, backend: str = "auto") -> Tensor:
    """Turn each pair of lanes (i, i + K / 2) of every head by the angle `position * base^(-2i / K)`.

    The heads of queries and keys may lie side by side in x (the slice `[B, T, H + G, K]` of a fused projection), so
    that both are turned in one call and share their sines.

    Args:
        x: `[B, T, H, K]`, K even; float32, bfloat16, float16 or float64. May be a slice of a wider projection.
        positions: int64 `[B, T]`, or `[T]` shared by all rows, on the device of x: positions from the start of the
            sequence.
        base: of the geometric series of frequencies.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        `[B, T, H, K]`, contiguous, dtype of x. Angles are computed in float64, at most `ANGLE_BOUND` rad wrong at
        position 2^31. Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if K is odd, shapes, dtypes or devices do not fit, base is not positive, or the backend cannot run
            here.

    Source: Su et al., "RoFormer" (2021), with the lanes paired as halves (as in GPT-NeoX and Llama weights).
    """
    if x.ndim != 4:
        raise ValueError(f"rotary: x must be [B, T, H, K], got {list(x.shape)}")
    if x.shape[-1] % 2:
        raise ValueError(f"rotary: the head width K must be even, got {x.shape[-1]}")
    if positions.dtype != torch.int64 or positions.shape not in (x.shape[:2], x.shape[1:2]):
        raise ValueError(
            f"rotary: positions must be int64 [B, T] or [T], expected {list(x.shape[:2])} or {list(x.shape[1:2])}, "
            f"got {positions.dtype} {list(positions.shape)}"
        )
    if positions.device != x.device:
        raise ValueError(f"rotary: positions must be on {x.device} as x is, got {positions.device}")
    if not base > 0:
        raise ValueError(f"rotary: base must be positive, got {base}")
    chosen = choice("rotary", backend, x.device.type, x.dtype)
    if chosen == "reference":  # kernels run for dtypes of theirs alone
        expect_floating("rotary", x)
        return rotary_reference(x, positions, base)
    run = kernels("rotary", chosen).rotate if direct(x, chosen) else rotary_op
    return run(x, positions, base, 1.0)


__all__ = ["ANGLE_BOUND", "ERROR_BOUND", "rotary", "rotary_reference", "rotary_tables"]
