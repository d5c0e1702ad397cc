"""The product with a weight matrix, by the fastest library at hand."""

import torch
from torch import Tensor
from torch.nn import functional as F

from milonga.ops.linear.library import AVAILABLE, linear_op

# Bound of the relative RMS error of the output and of both gradients against float64, fp32 inputs of width up to 4096.
ERROR_BOUND = 1e-6
# Below this many rows the matrix-vector kernels behind `torch.nn.functional.linear` are as fast or faster.
MIN_ROWS = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T`.

    On a CPU, fp32 products of at least `MIN_ROWS` rows go through oneDNN, which PyTorch carries but asks only for bf16:
    on AMD processors it was 2.4 to 5 times as fast as the MKL product that PyTorch takes, in full fp32. Everything
    else, autocast and other devices included, is `torch.nn.functional.linear`.

    Args:
        x: `[..., D]`, any floating dtype.
        weight: `[F, D]`, dtype of x.

    Returns:
        `[..., F]`, dtype of x. Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if the widths differ.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: weight must be [F, {x.shape[-1]}] for x {list(x.shape)}, got {list(weight.shape)}")
    fp32 = x.dtype == torch.float32 and weight.dtype == torch.float32
    if fp32 and x.device.type == "cpu" and AVAILABLE and not torch.is_autocast_enabled("cpu"):
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] >= MIN_ROWS:
            return linear_op(rows, weight).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)
