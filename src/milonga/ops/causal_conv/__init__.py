"""A short depthwise convolution over time that sees only the past, with SiLU."""

import torch
from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.causal_conv.library import causal_conv_op
from milonga.ops.causal_conv.reference import causal_conv_reference
from milonga.ops.checks import expect, expect_x
from milonga.segments import Segments, sequence_count

# Bound of the relative RMS error of y and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6
MAX_WIDTH = 8
ACTIVATIONS = ("silu", None)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`y[t, e] = silu(bias[e] + sum over k of weight[e, k] * x[t - (W - 1) + k, e])`, each channel by itself.

    `weight[:, W - 1]` multiplies the current step, as in `torch.nn.Conv1d`. Columns before the first step of a sequence
    come from `initial`. Sums are taken in fp32 (float64 where x is float64). B batch rows, T steps, E channels, W taps,
    S sequences: the batch rows, or with `segments` the sequences of the one packed row.

    Args:
        x: `[B T E]`, float32, bfloat16, float16 or float64.
        weight: `[E W]`, W from 1 to 8, in the dtype of x or float32.
        bias: `[E]`, in the dtype of x or float32; none if absent.
        activation: `silu`, or None for the sums themselves.
        initial: `[S W-1 E]` in the dtype of x, the columns before each sequence, oldest first; zero if absent.
        segments: where sequences start in a packed `[1, T]` batch. A sequence may be empty.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y `[B T E]` and the last W-1 columns of each sequence `[S W-1 E]` (the newest of `initial` where it is shorter),
        both in the dtype of x; the columns never share memory with an input. Gradients flow through every tensor,
        `initial` and the returned columns included.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`; the returned columns are exact.

    Raises:
        ValueError: if shapes, dtypes, devices, the activation or segments do not fit, or the backend cannot run here.

    Source: the convolution of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023).
    """
    _check(x, weight, bias, activation, initial, segments)
    chosen = choice("causal_conv", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return causal_conv_reference(x, weight, bias, activation, initial, segments)
    offsets = None if segments is None else segments.on(x.device)
    run = kernels("causal_conv", chosen).forward if direct(x, chosen) else causal_conv_op
    return run(x, weight, bias, initial, offsets, activation == "silu")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial: Tensor | None,
    segments: Segments | None,
) -> None:
    op = "causal_conv"
    batch, _, width = expect_x(op, x)
    parameter, device = (x.dtype, torch.float32), x.device
    if weight.ndim != 2 or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: weight must be [E W] with W from 1 to {MAX_WIDTH}, expected [{width}, W], got {list(weight.shape)}"
        )
    taps = weight.shape[1]
    expect(op, "weight", weight, "[E W]", (width, taps), parameter, device)
    if bias is not None:
        expect(op, "bias", bias, "[E]", (width,), parameter, device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be 'silu' or None, got {activation!r}")
    if segments is not None:
        segments.check(batch, x.shape[1], op)
    if initial is not None:
        rows = sequence_count(batch, segments)
        expect(op, "initial", initial, "[S W-1 E]", (rows, taps - 1, width), (x.dtype,), device)


__all__ = ["ACTIVATIONS", "ERROR_BOUND", "MAX_WIDTH", "causal_conv", "causal_conv_reference"]
