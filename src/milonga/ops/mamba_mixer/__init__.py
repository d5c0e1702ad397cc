"""All of a Mamba layer's training step as one node of the graph: projections, convolution, scan."""

from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_dtype
from milonga.ops.backend import KERNEL_DTYPES, choice
from milonga.ops.checks import FLOATS, expect, expect_x
from milonga.ops.mamba_mixer.function import MambaMixer
from milonga.segments import Segments, sequence_count

# Bound of the relative RMS error of every output and gradient against the float64 reference, fp32 inputs of width up to
# 1024: that of the scan, of the convolution and of four products.
ERROR_BOUND = 5e-6


class Mixed(NamedTuple):
    """What `mamba_mixer` gives. All but `out` is what a layer's state and its trace are made of."""

    out: Tensor  # [B T D], like all but `final` in the dtype of x
    columns: Tensor  # [B T E], the inputs of the convolution
    conv_final: Tensor  # [S W-1 E]
    u: Tensor  # [B T E], the output of the convolution
    final: Tensor  # [S E N], float32
    dt: Tensor  # [B T E], before bias and softplus
    B: Tensor  # [B T N]


def takes(x: Tensor) -> bool:
    """Whether `mamba_mixer` is for x: with gradients, neither compiled nor traced, in a dtype of the kernels."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or product_dtype(x) not in KERNEL_DTYPES:
        return False
    # a subclass, a fake tensor for one, has no memory for kernels that are called past PyTorch's operators
    return type(x) is Tensor and choice("selective_scan", "auto", x.device.type, product_dtype(x)) != "reference"


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products with x: that of autocast where it is on, but for float64."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype


def mamba_mixer(
    x: Tensor,
    in_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    conv_initial: Tensor | None = None,
    initial: Tensor | None = None,
    segments: Segments | None = None,
    recast: bool = False,
    keep_u: bool = False,
) -> Mixed:
    """The Mamba layer, from the norm's output to what is added to the residual stream::

        columns, z = split(x @ in_weight^T)
        u, conv_final = causal_conv(columns, conv_weight, conv_bias, initial=conv_initial)
        low, B, C = split(u @ x_weight^T)
        dt = low @ dt_weight^T
        y, final = selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial=initial)
        out = y @ out_weight^T

    The values are to the last bit those of the ops one by one, with gradients on. For the backward pass x, the product
    with in_weight, the narrow product with x_weight and the scan's checkpoints are kept; dt, y and, unless it is to be
    kept, u are made again.
    The gradients of columns and z lie side by side, so that each gradient of the first projection is one product, and
    the gradients of fp32 weights are never rounded to the dtype of the products.

    B batch rows, T steps, D features, E channels, N states a channel, R numbers that dt comes from, W taps, S
    sequences: the batch rows, or with `segments` the sequences of the one packed row.

    Args:
        x: `[B T D]`, float32, bfloat16 or float16, on a device with a kernel for it; `takes(x)` holds.
        in_weight, x_weight, dt_weight, out_weight: `[2E D]`, `[R+2N E]`, `[E R]`, `[D E]`, of any floating dtype; the
            products are in that of autocast where it is on, else in that of x.
        conv_weight, conv_bias: `[E W]`, `[E]`, as in `causal_conv`.
        A, D, dt_bias: `[E N]`, `[E]`, `[E]`, float32.
        conv_initial: `[S W-1 E]`, the columns before each sequence; zero if absent.
        initial: `[S E N]` float32, the state before each sequence; zero if absent.
        segments: where sequences start in a packed `[1, T]` batch. A sequence may be empty.
        recast: weights that are cast for the products are cast again in the backward pass, rather than kept.
        keep_u: u is kept for the backward pass, rather than made again.

    Returns:
        `Mixed`. Gradients, of first order only, flow through every tensor, and through all that are returned.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes, devices or segments do not fit, without gradients, or while compiling.
        RuntimeError: in the backward pass, if its gradients are to be differentiated again (`create_graph`).

    Source: as `projected_scan`.
    """
    if not takes(x):
        gradients = "on" if torch.is_grad_enabled() else "off"
        how = "compiled" if torch.compiler.is_compiling() else "not compiled"
        raise ValueError(
            "mamba_mixer: x must be float32, bfloat16 or float16, a plain tensor on a device with a kernel for it, "
            f"gradients on and not compiled, got {str(x.dtype).removeprefix('torch.')}, a {type(x).__name__} on "
            f"{x.device}, gradients {gradients} and {how}"
        )
    dtype = product_dtype(x)
    before = None if conv_initial is None else conv_initial.to(dtype)
    weights = (in_weight, conv_weight, conv_bias, x_weight, dt_weight, A, out_weight, D, dt_bias)
    _check(x, *weights, before, initial, segments)
    return Mixed(*MambaMixer.apply(x.to(dtype), *weights, before, initial, segments, recast, keep_u))


def _check(
    x: Tensor,
    in_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_initial: Tensor | None,
    initial: Tensor | None,
    segments: Segments | None,
) -> None:
    op = "mamba_mixer"
    (batch, time, features), device = expect_x(op, x), x.device
    for name, value, letters in (
        ("A", A, "[E N]"),
        ("dt_weight", dt_weight, "[E R]"),
        ("conv_weight", conv_weight, "[E W]"),
    ):
        if value.ndim != 2 or value.shape[1] < 1:
            raise ValueError(f"{op}: {name} must be {letters}, the second 1 or more, got {list(value.shape)}")
    (width, states), rank, taps = A.shape, dt_weight.shape[1], conv_weight.shape[1]
    narrow, single = (product_dtype(x), torch.float32), (torch.float32,)
    expect(op, "in_weight", in_weight, "[2E D]", (2 * width, features), FLOATS, device)
    expect(op, "conv_weight", conv_weight, "[E W]", (width, taps), narrow, device)
    expect(op, "conv_bias", conv_bias, "[E]", (width,), narrow, device)
    expect(op, "x_weight", x_weight, "[R+2N E]", (rank + 2 * states, width), FLOATS, device)
    expect(op, "dt_weight", dt_weight, "[E R]", (width, rank), FLOATS, device)
    expect(op, "A", A, "[E N]", (width, states), single, device)
    expect(op, "out_weight", out_weight, "[D E]", (features, width), FLOATS, device)
    expect(op, "D", D, "[E]", (width,), single, device)
    expect(op, "dt_bias", dt_bias, "[E]", (width,), single, device)
    if segments is not None:
        segments.check(batch, time, op)
    rows = sequence_count(batch, segments)
    if conv_initial is not None:
        expect(op, "conv_initial", conv_initial, "[S W-1 E]", (rows, taps - 1, width), FLOATS, device)
    if initial is not None:
        expect(op, "initial", initial, "[S E N]", (rows, width, states), single, device)


__all__ = ["ERROR_BOUND", "Mixed", "mamba_mixer", "product_dtype", "takes"]
