"""Layer normalisation over the last dimension."""

import torch
from torch import Tensor
from torch.nn import functional as F

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import expect, expect_rows, wide
from milonga.ops.layer_norm.reference import layer_norm_reference
from milonga.ops.rms_norm import check_residual
from milonga.ops.rms_norm.library import norm_op

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension D; with `residual`, of the sum of both.

    As `rms_norm` in everything else. On a GPU it is the same Triton kernel, elsewhere PyTorch's `layer_norm`.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64.
        weight, bias: `[D]`, float32 (float64 where x is).
        eps: added to the variance.
        residual: shape of x, and its dtype, or one of the two float32; none if absent.
        dtype: of y; by default that of x.

    Returns:
        y `[..., D]` in `dtype`; with `residual` (y, `x + residual`), the sum in the wider dtype.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    y, total, _ = layer_norm_and_rows(x, weight, bias, eps=eps, residual=residual, dtype=dtype)
    return y if residual is None else (y, total)


def layer_norm_and_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`layer_norm` with a choice of what its backward pass reads.

    Without `keep_sum`, on a GPU and where y is bfloat16, it reads the rows `(total - mean) / std`, rounded as y is, in
    place of `total`; `from_rows` makes y of them again.

    Returns:
        (y, `x + residual` or x, the rows or None).
    """
    expect_rows("layer_norm", x)
    for name, value in (("weight", weight), ("bias", bias)):
        expect("layer_norm", name, value, "[D]", x.shape[-1:], (wide(x.dtype),), x.device)
    if residual is not None:
        check_residual("layer_norm", x, residual)
    dtype = dtype or x.dtype
    chosen = choice("rms_norm", "auto", x.device.type, x.dtype)  # the kernel is shared with it
    if chosen == "triton":
        run = kernels("rms_norm", "triton").forward_norm if direct(x, chosen) else norm_op
        keep_sum = keep_sum or residual is None or dtype != torch.bfloat16
        y, total, rows = run(x, residual, weight, bias, eps, dtype, True, keep_sum)[:3]
        return y, x if residual is None else total, None if keep_sum else rows
    total = x if residual is None else x + residual
    y = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(dtype)
    return y, total, None


def from_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`rows * weight + bias` `[..., D]`, as `layer_norm_and_rows` gives them, in their dtype; not differentiable."""
    return kernels("rms_norm", "triton").affine(rows, weight, bias)


__all__ = ["ERROR_BOUND", "from_rows", "layer_norm", "layer_norm_and_rows", "layer_norm_reference"]
