"""Root-mean-square normalisation over the last dimension."""

from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.rms_norm.library import rms_norm_op
from milonga.ops.rms_norm.reference import rms_norm_reference

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension D.

    Sums are taken in fp32 (in float64 where x is float64); the result has the dtype of x.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64.
        weight: `[D]`, float32 (float64 where x is).
        eps: added to the mean square.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        `[..., D]`, dtype of x. Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if the shapes do not fit, or the backend cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [D], expected [{x.shape[-1]}], got {list(weight.shape)}")
    if choice("rms_norm", backend, x.device.type, x.dtype) == "reference":
        return rms_norm_reference(x, weight, eps)
    run = kernels("rms_norm", "cpu").forward if direct(x) else rms_norm_op
    return run(x, weight.float(), eps)[0]


__all__ = ["ERROR_BOUND", "rms_norm", "rms_norm_reference"]
