"""Root-mean-square normalisation over the last dimension."""

from typing import overload

from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import expect
from milonga.ops.rms_norm.library import rms_norm_add_op, rms_norm_op
from milonga.ops.rms_norm.reference import rms_norm_reference

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: None = None, backend: str = "auto"
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension D; with `residual`, of the sum of both.

    Sums are taken in fp32 (in float64 where x is float64); the result has the dtype of x. With `residual`, the sum
    `h = x + residual` is taken in fp32 and rounded to the dtype of x, and the norm is that of the rounded sum: to the
    last bit what `rms_norm(x + residual, weight)` gives, without a pass over memory for the sum.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64.
        weight: `[D]`, float32 (float64 where x is).
        eps: added to the mean square.
        residual: shape and dtype of x; none if absent.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y `[..., D]`, dtype of x; with `residual` (y, h), both so. Gradients flow through every tensor and through h.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes or dtypes do not fit, or the backend cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [D], expected [{x.shape[-1]}], got {list(weight.shape)}")
    if residual is not None:
        expect("rms_norm", "residual", residual, "[..., D] as x is", x.shape, (x.dtype,), x.device)
    chosen = choice("rms_norm", backend, x.device.type, x.dtype)
    if residual is not None:
        if chosen == "triton":
            run = kernels("rms_norm", "triton").forward_add if direct(x, chosen) else rms_norm_add_op
            return run(x, residual, weight.float(), eps)[:2]
        total = x + residual
        return rms_norm(total, weight, eps=eps, backend=backend), total
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps)
    run = kernels("rms_norm", chosen).forward if direct(x, chosen) else rms_norm_op
    return run(x, weight.float(), eps)[0]


__all__ = ["ERROR_BOUND", "rms_norm", "rms_norm_reference"]
