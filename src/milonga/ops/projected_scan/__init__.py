"""The selective scan with the projections around it: what a Mamba layer does after its convolution."""

from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_dtype
from milonga.ops.backend import choice
from milonga.ops.checks import expect, expect_x, wide
from milonga.ops.linear import linear
from milonga.ops.projected_scan.function import ProjectedScan
from milonga.ops.selective_scan import selective_scan
from milonga.segments import Segments, sequence_count

# Bound of the relative RMS error of every output and gradient against the float64 reference, fp32 inputs of width up to
# 1024: that of the scan and of three products. Measured: 1.2e-6 at most.
ERROR_BOUND = 5e-6


class Projected(NamedTuple):
    """What `projected_scan` gives. dt and B are what a replay of some of the steps needs beside u."""

    out: Tensor  # [B T D], dtype of u
    final: Tensor  # [S E N], float32 (float64 where u is)
    dt: Tensor  # [B T E], before bias and softplus
    B: Tensor  # [B T N]


def projected_scan(
    u: Tensor,
    z: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> Projected:
    """Projections of u to dt, B and C, the selective scan of u, and the projection of its output::

        low, B, C = split(u @ x_weight^T)
        dt = low @ dt_weight^T
        y, final = selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial=initial)
        out = y @ out_weight^T

    The values are to the last bit those of `linear` and `selective_scan` called one by one with gradients on. Where
    there are gradients to compute, it is one node of the graph that keeps neither y nor dt: y is a by-product of the
    scan's own backward pass, and dt one product of R numbers a step. The gradient of u is one sum, into which the
    product with x_weight is added in place. Without gradients, and in code that is being compiled, the ops are called
    one by one.

    B batch rows, T steps, E channels, N states a channel, R numbers that dt comes from, D features, S sequences: the
    batch rows, or with `segments` the sequences of the one packed row.

    Args:
        u: `[B T E]`; u, z and the three weights share one of float32, bfloat16, float16, float64. Where autocast is on
            they are cast to its dtype, unless u is float64.
        z: `[B T E]`, the gate.
        x_weight: `[R+2N E]`.
        dt_weight: `[E R]`.
        A: `[E N]`, negative; A, D, dt_bias and initial are float32 (float64 where u is).
        out_weight: `[D E]`.
        D: `[E]`, weight of u itself in the scan's output; none if absent.
        dt_bias: `[E]`; zero if absent.
        initial: `[S E N]`, the state before the first step of each sequence; zero if absent.
        segments: where sequences start in a packed `[1, T]` batch. A sequence may be empty.
        backend: of the scan: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        `Projected`. Gradients, of first order only, flow through every tensor, and through all four that are returned.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes, devices or segments do not fit, or the backend cannot run here.
        RuntimeError: in the backward pass, if its gradients are to be differentiated again (`create_graph`).

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), figure 3 and
    section 3.3.2, where what is not worth keeping is made again in the backward pass.
    """
    device = u.device.type
    dtype = autocast_dtype(device)
    if dtype is not None and u.dtype != torch.float64:
        u, z, x_weight, dt_weight, out_weight = (t.to(dtype) for t in (u, z, x_weight, dt_weight, out_weight))
    _check(u, z, x_weight, dt_weight, A, out_weight, D, dt_bias, initial, segments)
    backend = choice("selective_scan", backend, device, u.dtype)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = (u, z, x_weight, dt_weight, A, out_weight, D, dt_bias, initial)
        return Projected(*ProjectedScan.apply(*inputs, segments, backend))
    rank, states = dt_weight.shape[1], A.shape[1]
    low, B, C = linear(u, x_weight).split((rank, states, states), -1)
    dt = linear(low, dt_weight)
    y, final = selective_scan(
        u, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, initial=initial, segments=segments, backend=backend
    )
    return Projected(linear(y, out_weight), final, dt, B)


def _check(
    u: Tensor,
    z: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    out_weight: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    segments: Segments | None,
) -> None:
    op = "projected_scan"
    batch, time, width = expect_x(op, u, "u")
    same, parameter, device = (u.dtype,), (wide(u.dtype),), u.device
    for name, value, letters in (("A", A, "[E N]"), ("dt_weight", dt_weight, "[E R]")):
        if value.ndim != 2 or value.shape[1] < 1:
            raise ValueError(f"{op}: {name} must be {letters}, expected [{width}, 1 or more], got {list(value.shape)}")
    if out_weight.ndim != 2:
        raise ValueError(f"{op}: out_weight must be [D E], got {list(out_weight.shape)}")
    rank, states = dt_weight.shape[1], A.shape[1]
    expect(op, "z", z, "[B T E]", (batch, time, width), same, device, "u")
    expect(op, "x_weight", x_weight, "[R+2N E]", (rank + 2 * states, width), same, device, "u")
    expect(op, "dt_weight", dt_weight, "[E R]", (width, rank), same, device, "u")
    expect(op, "A", A, "[E N]", (width, states), parameter, device, "u")
    expect(op, "out_weight", out_weight, "[D E]", (out_weight.shape[0], width), same, device, "u")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            expect(op, name, vector, "[E]", (width,), parameter, device, "u")
    if segments is not None:
        segments.check(batch, time, op)
    if initial is not None:
        rows = sequence_count(batch, segments)
        expect(op, "initial", initial, "[S E N]", (rows, width, states), parameter, device, "u")


__all__ = ["ERROR_BOUND", "Projected", "projected_scan"]
