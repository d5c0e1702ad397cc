"""The product with a weight matrix, by the fastest library at hand, and with weights stored in fewer bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from milonga.ops.autocast import under_autocast
from milonga.ops.backend import INSTALLED, direct, kernels
from milonga.ops.linear.library import AVAILABLE, linear_op, product
from milonga.ops.linear.split import split_product

# Bound of the relative RMS error of the output and of both gradients against float64, fp32 inputs of width up to 4096.
ERROR_BOUND = 1e-6
# Below this many rows the product waits for its weights: it goes through the kernels that read them once.
MIN_ROWS = 8
LARGEST_INT8 = 127
SPLIT_BOUND = 2.0


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x @ weight^T`.

    On a CPU, fp32 products of at least `MIN_ROWS` rows go through oneDNN, which PyTorch carries but asks only for bf16:
    on AMD processors it was 2.4 to 5 times as fast as the MKL product that PyTorch takes, in full fp32. Without
    gradients, products of fewer rows go through kernels of this library that read each weight once, and twice as fast
    as PyTorch's. Everything else, autocast and other devices included, is `torch.nn.functional.linear`.

    Weights may be stored in fewer bytes than x has: bfloat16 beside fp32, or int8 with one factor per feature
    (`quantize`). They are then widened exactly, in registers for a few rows and in memory for many, and the product is
    that of x's precision. They take no gradient.

    Args:
        x: `[..., D]`, any floating dtype.
        weight: `[F, D]`, dtype of x, or bfloat16, or int8.
        scale: `[F]` float32, by which int8 weights are multiplied; none otherwise.

    Returns:
        `[..., F]`, dtype of x. Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if widths, dtypes or devices do not fit, or int8 weights and factors do not come together. Where
            autocast is on, any two floating dtypes below float64 fit.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: weight must be [F, {x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    if (weight.dtype == torch.int8) != (scale is not None) or (scale is not None and scale.shape != weight.shape[:1]):
        got = "none" if scale is None else f"{list(scale.shape)}"
        raise ValueError(
            f"linear: int8 weights take a scale [{weight.shape[0]}], others none; got {weight.dtype}, {got}"
        )
    stored = scale is not None or (weight.dtype == torch.bfloat16 and x.dtype == torch.float32)
    alike = stored or x.dtype == weight.dtype if scale is None else x.is_floating_point() and scale.device == x.device
    if x.device != weight.device or not alike:  # looked at closer only then: this runs for every decoded token
        _check_mixed(x, weight, scale)
    if x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        count = x.numel() // max(1, x.shape[-1])
        if count < MIN_ROWS and count > 0 and direct(x) and INSTALLED["numba"]:
            if stored or weight.dtype == torch.float32:
                y = kernels("linear", "cpu").forward(x.reshape(count, -1), weight, scale)
                return y.view(*x.shape[:-1], weight.shape[0])
        elif count >= MIN_ROWS and AVAILABLE and (stored or weight.dtype == torch.float32):
            run = product if direct(x) else linear_op
            y = run(x.reshape(count, -1), widen(weight, scale, x.dtype) if stored else weight)
            return y.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, widen(weight, scale, x.dtype) if stored else weight)


def _check_mixed(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """Raise `ValueError` where x and weight lie apart, or differ in dtype and nothing makes them one."""
    for name, tensor in (("weight", weight), ("scale", scale)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear: {name} must be on {x.device} as x is, got {tensor.device}")
    dtypes = (x.dtype, weight.dtype)
    wanted, got = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    if scale is not None:
        if not x.is_floating_point():
            raise ValueError(f"linear: x must be of a floating dtype beside int8 weights, got {wanted}")
    elif torch.float64 in dtypes or not (x.is_floating_point() and weight.is_floating_point() and under_autocast(x)):
        raise ValueError(f"linear: weight must have the dtype of x, expected {wanted}, got {got}")


def linear_split(x: Tensor, weight: Tensor, sizes: Sequence[int], scale: Tensor | None = None) -> tuple[Tensor, ...]:
    """`linear`, its output in parts of `sizes` features: views of one product.

    On a GPU with gradients, those of the parts are never copied together: the gradient of x is summed over the parts,
    in bf16 and fp16 rounded after each, so that of up to three parts its relative RMS error is at most `SPLIT_BOUND`
    roundings. Arguments and errors as `linear`.

    Raises:
        ValueError: if the sizes do not add up to F.
    """
    if sum(sizes) != weight.shape[0]:
        raise ValueError(f"linear: sizes must add up to {weight.shape[0]}, got {list(sizes)}")
    alike = x.dtype == weight.dtype or under_autocast(x)
    fits = alike and x.shape[-1:] == weight.shape[1:] and x.device == weight.device
    if x.device.type == "cuda" and scale is None and torch.is_grad_enabled() and fits:
        return split_product(x, weight, sizes)
    return linear(x, weight, scale).split(list(sizes), -1)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[F, D]` -> (int8 `[F, D]`, factors fp32 `[F]`): the largest weight of a feature becomes 127."""
    scale = weight.detach().float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_INT8
    return (weight.detach().float() / scale[:, None]).round_().to(torch.int8), scale


def widen(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored weights as numbers of `dtype`."""
    wide = weight.to(dtype)
    return wide if scale is None else wide * scale[:, None].to(dtype)


__all__ = ["ERROR_BOUND", "LARGEST_INT8", "MIN_ROWS", "SPLIT_BOUND", "linear", "linear_split", "quantize", "widen"]
