"""One decoded step: few rows, one token each, states advanced in place, nothing differentiated.

A step reads every weight once, so its floor is the time to read them; what it costs beyond that are the waits between
kernels. These functions are the layers' steps in as few kernels as depend on each other, each with what comes before
and after it: the norm, the residual, the convolution, the gate. Captured decoding runs on them.
"""

import torch
from torch import Tensor

from milonga.ops.backend import choice, kernels, refusal
from milonga.ops.checks import FLOATS, expect, wide
from milonga.ops.decode_step.reference import (
    MambaWeights,
    Norm,
    ReplayInputs,
    linear_step_reference,
    mamba_replay_reference,
    mamba_step_reference,
    ring_write_reference,
    swiglu_step_reference,
)

# Bound of the relative RMS error of outputs and states against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6


def has_step_kernels(x: Tensor) -> bool:
    """Whether steps of rows like `x` have kernels of their own: on a GPU, when nothing is differentiated."""
    return not torch.is_grad_enabled() and refusal("decode_step", "triton", x.device.type, x.dtype) is None


def _triton(x: Tensor, backend: str) -> bool:
    if backend == "auto":
        return refusal("decode_step", "triton", x.device.type, x.dtype) is None
    return choice("decode_step", backend, x.device.type, x.dtype) == "triton"


def _expect_rows(x: Tensor, width: int, what: str) -> None:
    if x.ndim != 2 or x.shape[1] != width or x.shape[0] < 1:
        raise ValueError(f"decode_step: x must be [B, {width}] with B at least 1 for {what}, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"decode_step: x must be float32, bfloat16, float16 or float64, got {got}")
    if not x.is_contiguous():
        raise ValueError(f"decode_step: x must be contiguous, got strides {list(x.stride())}")


def _expect(x: Tensor, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise `ValueError` unless a tensor has this shape, one of these dtypes, the device of x, and is contiguous."""
    expect("decode_step", name, tensor, letters, shape, dtypes, x.device)
    if not tensor.is_contiguous():
        raise ValueError(f"decode_step: {name} must be contiguous, got strides {list(tensor.stride())}")


def _expect_norm(x: Tensor, norm: Norm) -> None:
    _expect(x, "norm.weight", norm.weight, "[D]", (x.shape[1],), wide(x.dtype))
    if norm.bias is not None:
        _expect(x, "norm.bias", norm.bias, "[D]", (x.shape[1],), wide(x.dtype))


def expect_mamba(x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor) -> None:
    """Raise `ValueError` unless everything beside x `[B D]` is as `mamba_step_` takes it."""
    batch, width = x.shape
    _expect_norm(x, norm)
    (inner, states), rank, columns = weights.A_log.shape, weights.dt_proj.shape[1], weights.conv_weight.shape[1]
    same, parameter = x.dtype, wide(x.dtype)
    _expect(x, "in_proj", weights.in_proj, "[2E D]", (2 * inner, width), same)
    _expect(x, "conv_weight", weights.conv_weight, "[E W]", (inner, columns), *FLOATS)
    _expect(x, "conv_bias", weights.conv_bias, "[E]", (inner,), *FLOATS)
    _expect(x, "x_proj", weights.x_proj, "[R+2N E]", (rank + 2 * states, inner), same)
    _expect(x, "dt_proj", weights.dt_proj, "[E R]", (inner, rank), same)
    _expect(x, "A_log", weights.A_log, "[E N]", (inner, states), parameter)
    _expect(x, "D", weights.D, "[E]", (inner,), parameter)
    _expect(x, "dt_bias", weights.dt_bias, "[E]", (inner,), parameter)
    _expect(x, "out_proj", weights.out_proj, "[D E]", (width, inner), same)
    _expect(x, "conv", conv, "[B W-1 E]", (batch, columns - 1, inner), same)
    _expect(x, "ssm", ssm, "[B E N]", (batch, inner, states), parameter)


def linear_step(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """`norm(x) @ weight^T + residual` of a few rows.

    On a GPU a row's result does not depend on the other rows, nor, up to 16 rows, on how many there are.

    Args:
        x: `[B D]`, float32, bfloat16, float16 (float64 in the reference), contiguous.
        weight: `[F D]`, dtype of x, contiguous.
        norm: over D; none if absent.
        residual: `[B F]`, dtype of x, contiguous.
        dtype: of the result; that of x if absent.
        backend: `auto`, `reference` or `triton`.

    Returns:
        `[B F]`. Sums at least fp32; relative RMS error against float64 with fp32 inputs at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes, devices or layouts do not fit, or the backend cannot run here.
    """
    _expect_rows(x, weight.shape[-1], "this weight")
    _expect(x, "weight", weight, "[F D]", (weight.shape[0], x.shape[1]), x.dtype)
    if norm is not None:
        _expect_norm(x, norm)
    if residual is not None:
        _expect(x, "residual", residual, "[B F]", (x.shape[0], weight.shape[0]), x.dtype)
    run = kernels("decode_step", "triton").linear_step if _triton(x, backend) else linear_step_reference
    return run(x, weight, norm, residual, dtype or x.dtype)


def swiglu_step(x: Tensor, norm: Norm, gate_up: Tensor, down: Tensor, *, backend: str = "auto") -> Tensor:
    """`x + down(silu(gate) * up)` with gate and up from `norm(x)`: x `[B D]`, gate_up `[2H D]`, down `[D H]`.

    All three are contiguous and of one dtype.

    Raises:
        ValueError: if shapes, dtypes, devices or layouts do not fit, or the backend cannot run here.
    """
    _expect_rows(x, gate_up.shape[-1], "gate_up")
    hidden = down.shape[-1]
    _expect(x, "gate_up", gate_up, "[2H D]", (2 * hidden, x.shape[1]), x.dtype)
    _expect(x, "down", down, "[D H]", (x.shape[1], hidden), x.dtype)
    _expect_norm(x, norm)
    run = kernels("decode_step", "triton").swiglu_step if _triton(x, backend) else swiglu_step_reference
    return run(x, norm, gate_up, down)


def mamba_step_(
    x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor, *, backend: str = "auto"
) -> Tensor:
    """One step of a Mamba layer behind its norm, with the residual: -> `x + mamba(norm(x))`, states in place.

    Args:
        x: `[B D]`, contiguous.
        norm: over D.
        weights: the layer's, contiguous, matrices of products in the dtype of x; E a multiple of 16 on a GPU.
        conv: `[B W-1 E]`, dtype of x, contiguous: the columns before this step, then after it. On a GPU they are read
            ahead of time: whatever else writes them between two steps, a copy for one, must not be the kernel launched
            directly before this; behind an embedding it never is.
        ssm: `[B E N]`, fp32 (float64 where x is), contiguous: likewise.
        backend: `auto`, `reference` or `triton`.

    Raises:
        ValueError: if shapes, dtypes, devices or layouts do not fit, or the backend cannot run here.
    """
    _expect_rows(x, weights.in_proj.shape[-1], "in_proj")
    expect_mamba(x, norm, weights, conv, ssm)
    inner = weights.A_log.shape[0]
    triton = _triton(x, backend)
    if triton and inner % 16:
        raise ValueError(f"decode_step: the inner width must be a multiple of 16 on a GPU, got {inner}")
    run = kernels("decode_step", "triton").mamba_step_ if triton else mamba_step_reference
    return run(x, norm, weights, conv, ssm)


def mamba_replay_(
    inputs: ReplayInputs,
    A_log: Tensor,
    dt_bias: Tensor,
    keep: Tensor,
    conv: Tensor,
    ssm: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Move the state of a Mamba layer on by the first `keep[b]` of T traced steps of each row, in place.

    Args:
        inputs: what the steps added, `[B T ...]`.
        A_log, dt_bias: the layer's, fp32.
        keep: int64 `[B]`, from 0 to T; on a GPU not checked.
        conv, ssm: as in `mamba_step_`.
        backend: `auto`, `reference` or `triton`.

    Raises:
        ValueError: if the backend cannot run here.
    """
    if _triton(inputs.x, backend):
        kernels("decode_step", "triton").mamba_replay_(inputs, A_log, dt_bias, keep, conv, ssm)
    else:
        mamba_replay_reference(inputs, A_log, dt_bias, keep.tolist(), conv, ssm)


def ring_write_(
    k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, position: Tensor, *, backend: str = "auto"
) -> None:
    """Write one step's keys and values `[B G K]` into slot `position mod P` of the rings `[B P G K]`; position + 1.

    Raises:
        ValueError: if the backend cannot run here.
    """
    run = kernels("decode_step", "triton").ring_write_ if _triton(k, backend) else ring_write_reference
    run(k, v, ring_k, ring_v, position)


__all__ = [
    "ERROR_BOUND",
    "MambaWeights",
    "Norm",
    "ReplayInputs",
    "expect_mamba",
    "has_step_kernels",
    "linear_step",
    "mamba_replay_",
    "mamba_step_",
    "ring_write_",
    "swiglu_step",
]
