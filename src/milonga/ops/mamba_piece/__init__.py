"""A Mamba layer over a short piece of few rows, its state left where it is: what checks a draft.

Like a decoded step a short piece reads every weight once, and so takes little longer than one step if it takes as few
kernels. It moves nothing: what it adds is returned, for `milonga.ops.decode_step.mamba_replay_`.
"""

import torch
from torch import Tensor

from milonga.ops.backend import choice, kernels, refusal
from milonga.ops.decode_step import MambaWeights, Norm, ReplayInputs, expect_mamba
from milonga.ops.mamba_piece.reference import mamba_piece_reference

# Bound of the relative RMS error of the output and of what the piece adds against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6
LONGEST = 32  # steps of a piece for the kernels
MOST_ROWS = 64  # rows times steps


def has_piece_kernels(x: Tensor) -> bool:
    """Whether pieces like `x [B T D]` have kernels of their own: short, on a GPU, nothing differentiated."""
    few = 0 < x.shape[1] <= LONGEST and 0 < x.shape[0] * x.shape[1] <= MOST_ROWS
    return few and not torch.is_grad_enabled() and refusal("mamba_piece", "triton", x.device.type, x.dtype) is None


def mamba_piece(
    x: Tensor, norm: Norm, weights: MambaWeights, conv: Tensor, ssm: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, ReplayInputs]:
    """A Mamba layer behind its norm, with the residual: -> (`x + mamba(norm(x))`, what its steps add to the state).

    Args:
        x: `[B T D]`, contiguous, T from 1.
        norm, weights, conv, ssm: as in `milonga.ops.decode_step.mamba_step_`; the state before the piece, only read.
        backend: `auto`, `reference` or `triton`.

    Returns:
        `[B T D]`, dtype of x, and `ReplayInputs`. Relative RMS error against float64 with fp32 inputs at most
        `ERROR_BOUND`.

    Raises:
        ValueError: if x is not `[B T D]`, empty, longer than `LONGEST` steps where the kernels are to run, or they
            cannot; or if a weight or the state does not fit, as in `mamba_step_`.
    """
    width = weights.in_proj.shape[1]
    if x.ndim != 3 or x.shape[2] != width or x.shape[0] < 1 or x.shape[1] < 1 or not x.is_contiguous():
        raise ValueError(f"mamba_piece: x must be [B T {width}], contiguous, B and T from 1, got {list(x.shape)}")
    expect_mamba(x[:, 0], norm, weights, conv, ssm)
    if backend != "auto":
        choice("mamba_piece", backend, x.device.type, x.dtype)
    if backend == "triton" or (backend == "auto" and has_piece_kernels(x)):
        if x.shape[1] > LONGEST:
            raise ValueError(f"mamba_piece: the kernels take {LONGEST} steps at most, got {x.shape[1]}")
        return kernels("mamba_piece", "triton").mamba_piece(x, norm, weights, conv, ssm)
    return mamba_piece_reference(x, norm, weights, conv, ssm)


__all__ = ["ERROR_BOUND", "LONGEST", "MOST_ROWS", "has_piece_kernels", "mamba_piece"]
