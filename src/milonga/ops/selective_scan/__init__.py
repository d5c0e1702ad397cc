"""The selective scan: the recurrence of Mamba, with everything around it that touches its inputs once."""

import torch
from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import expect, expect_x, wide
from milonga.ops.selective_scan.library import selective_scan_op
from milonga.ops.selective_scan.reference import selective_scan_reference
from milonga.segments import Segments, sequence_count

# Bound of the relative RMS error of both outputs and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6
# The same of the gradients that come out in fp32 (A, D, dt_bias, initial) where x is bfloat16 or float16, on a GPU.
# Half inputs: the hardware's exponential, 2^-22 per step, accumulates over a channel's memory. Measured on an H100 it
# is off by at most 1.4e-7, but too small by 2.7e-8 on average, and an error of one sign adds up over steps. That bias,
# put into every decay of the float64 reference, moves the gradient of A by 1e-6 after 67 steps and 3e-6 after 300, and
# that of the initial state by up to 8e-6 after 1000. Rounding x itself to half is 20 to 200 times the bound.
HALF_GRADIENT_BOUND = 1e-5


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial: Tensor | None = None,
    segments: Segments | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A diagonal linear recurrence whose step, input and output maps depend on the input.

    With d = softplus(dt + dt_bias), for each step t, channel e and state n::

        h[t, e, n] = exp(d[t, e] * A[e, n]) * h[t - 1, e, n] + d[t, e] * B[t, n] * x[t, e]
        y[t, e]    = (sum over n of C[t, n] * h[t, e, n] + D[e] * x[t, e]) * silu(z[t, e])

    The state h is kept in fp32 (float64 where x is float64) in every mode. B batch rows, T steps, E channels, N states
    a channel, S sequences: the batch rows, or with `segments` the sequences of the one packed row.

    Args:
        x: `[B T E]`; x, dt, B, C and z share one of float32, bfloat16, float16, float64.
        dt: `[B T E]`, the step before bias and softplus.
        A: `[E N]`, negative; A, D, dt_bias and initial are float32 (float64 where x is).
        B: `[B T N]`, how the input enters the states.
        C: `[B T N]`, how the states are read.
        D: `[E]`, weight of x itself in the output; none if absent.
        z: `[B T E]`, the gate; none if absent.
        dt_bias: `[E]`; zero if absent.
        initial: `[S E N]`, the state before the first step of each sequence; zero if absent.
        segments: where sequences start in a packed `[1, T]` batch. A sequence may be empty.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        y `[B T E]` in the dtype of x, and the final state `[S E N]`, float32 (float64 where x is); it never shares
        memory with `initial`. Gradients flow through every tensor, `initial` and the final state included.
        Relative RMS error against float64 with fp32 inputs: at most `ERROR_BOUND`. With half inputs on a GPU that of
        fp32 gradients is at most `HALF_GRADIENT_BOUND`.

    Raises:
        ValueError: if shapes, dtypes, devices or segments do not fit, or the backend cannot run here.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2 and
    equation 2, with the simplified discretisation of B used there and in all models since.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial, segments)
    chosen = choice("selective_scan", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, initial, segments)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
    offsets = None if segments is None else segments.on(x.device)
    if direct(x, chosen):
        return kernels("selective_scan", chosen).forward(*inputs, offsets, False)[:2]
    save = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    return selective_scan_op(*inputs, offsets, save)[:2]


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    segments: Segments | None,
) -> None:
    op = "selective_scan"
    batch, time, width = expect_x(op, x)
    same, parameter, device = (x.dtype,), (wide(x.dtype),), x.device
    if A.ndim != 2 or A.shape[1] < 1:
        raise ValueError(f"{op}: A must be [E N] with N at least 1, expected [{width}, N], got {list(A.shape)}")
    states = A.shape[1]
    expect(op, "dt", dt, "[B T E]", (batch, time, width), same, device)
    expect(op, "A", A, "[E N]", (width, states), parameter, device)
    expect(op, "B", B, "[B T N]", (batch, time, states), same, device)
    expect(op, "C", C, "[B T N]", (batch, time, states), same, device)
    if D is not None:
        expect(op, "D", D, "[E]", (width,), parameter, device)
    if z is not None:
        expect(op, "z", z, "[B T E]", (batch, time, width), same, device)
    if dt_bias is not None:
        expect(op, "dt_bias", dt_bias, "[E]", (width,), parameter, device)
    if segments is not None:
        segments.check(batch, time, op)
    if initial is not None:
        rows = sequence_count(batch, segments)
        expect(op, "initial", initial, "[S E N]", (rows, width, states), parameter, device)


__all__ = ["ERROR_BOUND", "HALF_GRADIENT_BOUND", "selective_scan", "selective_scan_reference"]
