"""The gated product inside a SwiGLU layer."""

from torch import Tensor

from milonga.ops.backend import choice, direct, kernels
from milonga.ops.checks import expect_floating
from milonga.ops.swiglu.library import swiglu_fused_op, swiglu_op
from milonga.ops.swiglu.reference import swiglu_reference

# Bound of the relative RMS error of the output and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 1e-6


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`, elementwise, where `silu(g) = g / (1 + exp(-g))`.

    Args:
        gate: `[..., F]`, float32, bfloat16, float16 or float64. May be one half of a fused projection.
        up: shape, dtype and device of gate; may be the other half. None: `gate` is the whole projection `[..., 2F]`,
            the gate first. On a GPU its gradient is then written once; halves would be joined by another pass over
            memory.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        `[..., F]`, contiguous, dtype of gate, computed in at least fp32. Relative RMS error against float64 with fp32
        inputs: at most `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes or devices differ, gate has another dtype, 2F is odd, or the backend cannot run
            here.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    chosen = choice("swiglu", backend, gate.device.type, gate.dtype)
    if up is None:
        if gate.ndim < 1 or gate.shape[-1] % 2:
            raise ValueError(f"swiglu: without up, gate must be [..., 2F], got {list(gate.shape)}")
        if chosen == "triton":
            return (kernels("swiglu", chosen).forward_fused if direct(gate, chosen) else swiglu_fused_op)(gate)
        gate, up = gate.chunk(2, -1) if gate.shape[-1] else (gate, gate)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu: up must be like gate, expected {gate.dtype} {list(gate.shape)}, got {up.dtype} {list(up.shape)}"
        )
    if up.device != gate.device:
        raise ValueError(f"swiglu: up must be on {gate.device} as gate is, got {up.device}")
    if chosen == "reference":  # kernels run for dtypes of theirs alone
        expect_floating("swiglu", gate, "gate")
        return swiglu_reference(gate, up)
    run = kernels("swiglu", chosen).forward if direct(gate, chosen) else swiglu_op
    return run(gate, up)


__all__ = ["ERROR_BOUND", "swiglu", "swiglu_reference"]
