"""One decoded step of a Mamba layer on a CPU: everything between its two norms in one kernel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milonga.ops.backend import INSTALLED, choice, direct, kernels
from milonga.ops.checks import expect
from milonga.ops.linear import MIN_ROWS
from milonga.ops.mamba_step.reference import StepResult, StepWeights, StoredWeight, mamba_step_reference

if TYPE_CHECKING:
    from milonga.ops.mamba_step.cpu import PreparedWeights

# Bound of the relative RMS error of output, state and every other result against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6
STORED = (torch.float32, torch.bfloat16, torch.int8)


def has_step(x: Tensor, *states: Tensor) -> bool:
    """Whether a step of rows `x [B ...]` may run on the kernel: few, on a CPU, all fp32, nothing differentiated."""
    return (
        direct(x)
        and INSTALLED["numba"]
        and 0 < x.shape[0] < MIN_ROWS
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (x, *states))
    )


def prepare_step(weights: StepWeights) -> "PreparedWeights | None":
    """The weights as the kernel reads them, for many steps; None if it does not read weights stored like these.

    What is prepared holds copies of `conv_weight` and of `A` and reads the others where they lie, now and later: make
    it again when one has moved, or one of these two has changed.
    """
    products = (weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj)
    read = (weights.conv_bias, weights.D, weights.dt_bias, *(product.weight for product in products))
    still = all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_contiguous() for tensor in read)
    if not INSTALLED["numba"] or not still or _refusal(weights) is not None:
        return None
    return kernels("mamba_step", "cpu").prepare(weights)


def _refusal(weights: StepWeights) -> str | None:
    """What of these weights the kernel does not take."""
    products = (weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj)
    rest = (weights.conv_weight, weights.conv_bias, weights.A, weights.D, weights.dt_bias)
    kinds = {product.weight.dtype for product in products}
    if len(kinds) > 1 or not kinds <= set(STORED):
        return "takes products stored in one way: float32, bfloat16 or int8"
    if any((product.scale is None) != (product.weight.dtype != torch.int8) for product in products):
        return "takes factors for int8, and for nothing else"
    if any(tensor.dtype != torch.float32 for tensor in rest):
        return "takes convolution, A, D and dt's bias in float32"
    if any(tensor.device.type != "cpu" for tensor in (*rest, *(product.weight for product in products))):
        return "takes weights on the CPU"
    return None


def mamba_step(
    x: Tensor, weights: "StepWeights | PreparedWeights", conv: Tensor, ssm: Tensor, *, backend: str = "auto"
) -> StepResult:
    """One step of a Mamba layer: input projection, convolution, recurrence, gate and output projection.

    It gives what `milonga.layers.Mamba` gives for one token of each row after a state, which is read and not written.
    A row's results do not depend on the other rows, nor on the number of threads. Nothing is differentiated.

    Args:
        x: `[B D]`, float32 (any floating dtype in the reference).
        weights: the layer's; for the kernel those of the four products are all float32, all bfloat16, or all int8.
            Prepared ones (`prepare_step`) go to the kernel.
        conv: `[B W-1 E]`, dtype of x: the columns before this step.
        ssm: `[B E N]`, dtype of x: the recurrent state before it.
        backend: `auto`, `reference` or `cpu`.

    Returns:
        The output, the state after the step, and what a replay of it needs; all but B contiguous. Relative RMS error of
        each against the reference in float64, with the same stored weights: at most `ERROR_BOUND`.

    Raises:
        ValueError: if the shapes do not fit, or the backend cannot run here.

    Source: Gu and Dao, "Mamba" (2023), section 3.
    """
    if isinstance(weights, StepWeights):
        width, (inner, states), taps = weights.in_proj.weight.shape[1], weights.A.shape, weights.conv_weight.shape[1]
    else:
        width, inner, states, _, taps = weights.sizes
    if x.ndim != 2 or x.shape[1] != width or x.shape[0] < 1:
        raise ValueError(f"mamba_step: x must be [B, {width}] with B at least 1, got {list(x.shape)}")
    rows = x.shape[0]
    expect("mamba_step", "conv", conv, "[B W-1 E]", (rows, taps - 1, inner), (x.dtype,), x.device)
    expect("mamba_step", "ssm", ssm, "[B E N]", (rows, inner, states), (x.dtype,), x.device)
    if not isinstance(weights, StepWeights):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"mamba_step: prepared weights take float32 on the CPU, got {x.dtype} on {x.device}")
        return kernels("mamba_step", "cpu").forward(weights, x, conv, ssm)
    refused = _refusal(weights) if x.dtype == torch.float32 else f"takes x in float32, not {x.dtype}"
    if backend == "cpu" and refused is not None:
        raise ValueError(f"mamba_step: backend 'cpu' cannot run here: it {refused}")
    if choice("mamba_step", backend, x.device.type, x.dtype) != "cpu" or refused is not None:
        return mamba_step_reference(x, weights, conv, ssm)
    cpu = kernels("mamba_step", "cpu")
    return cpu.forward(cpu.prepare(weights), x, conv, ssm)


def join_steps(layers: "Sequence[PreparedWeights]", norms: Sequence[tuple[Tensor, float]]) -> "PreparedWeights | None":
    """Prepared layers one behind the other, an RMS norm (weight `[D]`, eps) before each, for `mamba_steps`.

    None if their sizes or their storage differ, or a norm is not fp32, contiguous and on the CPU.
    """
    alike = all(layer.sizes == layers[0].sizes and layer.like.dtype == layers[0].like.dtype for layer in layers)
    plain = all(
        weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous() for weight, _ in norms
    )
    return kernels("mamba_step", "cpu").join(layers, norms) if alike and plain else None


def mamba_steps(
    x: Tensor, branch: Tensor | None, layers: "PreparedWeights", convs: Sequence[Tensor], ssms: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """A step of several Mamba layers: `x = x + branch; branch = layer(norm(x))`, one after the other, in one kernel.

    Args:
        x: `[B D]` fp32 on the CPU: the residual stream.
        branch: `[B D]`, what the sub-layer before gave; None if there is none.
        layers: from `join_steps`.
        convs, ssms: the states before the step, as for `mamba_step`, one per layer; read, not written.

    Returns:
        The residual stream before the last layer, what that layer adds to it, and the states behind the step.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    width, inner, states, _, taps = layers.sizes
    rows, fp32 = x.shape[0], (torch.float32,)
    if len(convs) != len(layers.table) or len(ssms) != len(layers.table):
        raise ValueError(f"mamba_steps: {len(layers.table)} layers, but states of {len(convs)} and {len(ssms)}")
    for name, tensor in (("x", x), ("branch", branch)):
        if tensor is not None:
            expect("mamba_steps", name, tensor, "[B D]", (rows, width), fp32, torch.device("cpu"))
    conv_shape, ssm_shape = torch.Size((rows, taps - 1, inner)), torch.Size((rows, inner, states))
    for conv, ssm in zip(convs, ssms, strict=True):
        if conv.shape != conv_shape or ssm.shape != ssm_shape or not conv.dtype == ssm.dtype == torch.float32:
            raise ValueError(
                f"mamba_steps: states must be float32 {list(conv_shape)} and {list(ssm_shape)}, got {conv.dtype} "
                f"{list(conv.shape)} and {ssm.dtype} {list(ssm.shape)}"
            )
    return kernels("mamba_step", "cpu").forward_run(layers, x, branch, convs, ssms)


__all__ = [
    "ERROR_BOUND",
    "StepResult",
    "StepWeights",
    "StoredWeight",
    "has_step",
    "join_steps",
    "mamba_step",
    "mamba_step_reference",
    "mamba_steps",
    "prepare_step",
]
