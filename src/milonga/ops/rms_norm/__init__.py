"""Root-mean-square normalisation over the last dimension."""

from typing import overload

import torch
from torch import Tensor

from milonga.ops.backend import INSTALLED, choice, direct, kernels
from milonga.ops.checks import expect, expect_rows, wide
from milonga.ops.rms_norm.library import norm_op, rms_norm_op
from milonga.ops.rms_norm.reference import rms_norm_reference

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6
# Up to this many numbers what surrounds the CPU's kernel takes longer than it: they have a shorter way.
FEW = 1 << 14


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor,
    dtype: torch.dtype | None = None,
    keep_sum: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep_sum: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension D; with `residual`, of the sum of both.

    Sums are taken in fp32 (in float64 where x is float64). With `residual`, the sum `h = x + residual` is taken in fp32
    and rounded to the wider of their dtypes, and the norm is that of the rounded sum: to the last bit what
    `rms_norm(x + residual, weight)` gives, without a pass over memory for the sum. A residual stream in float32 beside
    layers in bfloat16 is `rms_norm(y, weight, residual=stream, dtype=torch.bfloat16)`.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64.
        weight: `[D]`, float32; where x is float64, float64 or float32.
        eps: added to the mean square.
        residual: shape of x, and its dtype, or one of the two float32; none if absent.
        dtype: of y; by default that of x.
        keep_sum: what the backward pass reads of a sum. If false, on a GPU and where y is bfloat16, it reads y instead,
            which whoever takes y keeps as well, so that the sum need not be kept. Its gradients then carry y's rounding
            of the normalised row. A weight nearer to 0 than 2^-60 counts as that.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y `[..., D]` in `dtype`; with `residual` (y, h), h in the wider dtype. Gradients flow through every tensor and
        through h. Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the backend cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    if x.numel() <= FEW and _plain(x, weight, residual, dtype, backend):
        y, total = kernels("rms_norm", "cpu").few(x, residual, weight, eps)
        return y if residual is None else (y, total)
    expect_rows("rms_norm", x)
    expect("rms_norm", "weight", weight, "[D]", x.shape[-1:], (torch.float32, wide(x.dtype)), x.device)
    if residual is not None:
        check_residual("rms_norm", x, residual)
    dtype = dtype or x.dtype
    chosen = choice("rms_norm", backend, x.device.type, x.dtype)
    if chosen == "triton" and (residual is not None or dtype != x.dtype):
        run = kernels("rms_norm", "triton").forward_norm if direct(x, chosen) else norm_op
        keep_sum = keep_sum or residual is None or dtype != torch.bfloat16
        y, total = run(x, residual, weight, None, eps, dtype, False, keep_sum)[:2]
        return y if residual is None else (y, total)
    if residual is not None:
        total = x + residual
        return rms_norm(total, weight, eps=eps, dtype=dtype, backend=backend), total
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps).to(dtype)
    run = kernels("rms_norm", chosen).forward if direct(x, chosen) else rms_norm_op
    return run(x, weight, eps)[0].to(dtype)


def _plain(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype | None, backend: str) -> bool:
    """Whether all is fp32, contiguous and on the CPU, with nothing to differentiate: a decoded step."""
    if not (direct(x) and INSTALLED["numba"] and backend in ("auto", "cpu") and dtype in (None, torch.float32)):
        return False
    if x.ndim < 1 or weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        return False
    return all(
        tensor is None or (tensor.dtype == torch.float32 and tensor.device == x.device and tensor.is_contiguous())
        for tensor in (x, weight, residual)
    )


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    """Raise `ValueError` unless `residual` can be added to x."""
    allowed = {x.dtype, torch.float32} if x.dtype != torch.float32 else {torch.float32, torch.bfloat16, torch.float16}
    expect(op, "residual", residual, "[..., D] as x is", x.shape, sorted(allowed, key=str), x.device)


__all__ = ["ERROR_BOUND", "rms_norm", "rms_norm_reference"]
