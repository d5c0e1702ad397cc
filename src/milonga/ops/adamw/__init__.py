"""A step of AdamW over many tensors at once, on a GPU. Anywhere else PyTorch's own step is what there is."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from milonga.ops.adamw.table import Table
from milonga.ops.backend import INSTALLED, kernels

# Bound of the relative RMS error of what one step adds to parameters and makes of moments, against float64.
ERROR_BOUND = 1e-6
_PLAIN = {Tensor, nn.Parameter}


Columns = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def takes(tensors: Columns) -> bool:
    """Whether `adamw_` moves these parameters, gradients, exp_avgs, exp_avg_sqs and step counts.

    They must be plain tensors in fp32, in one piece of memory each, all on one GPU, four of one shape and a count for
    each parameter. Triton must be installed.
    """
    parameters, *others, steps = tensors
    if not parameters or not parameters[0].is_cuda or not INSTALLED["triton"]:
        return False
    if any(len(column) != len(parameters) for column in tensors):
        return False
    shapes, device = [parameter.shape for parameter in parameters], parameters[0].get_device()
    return (
        all([tensor.shape for tensor in column] == shapes for column in others)
        and all(_plain(tensor, device) for column in tensors for tensor in column)
        and all(step.ndim == 0 for step in steps)
    )


def _plain(tensor: Tensor, device: int) -> bool:
    return (
        tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and tensor.get_device() == device
        and tensor.is_contiguous()
        and type(tensor) in _PLAIN
    )


def adamw_(
    tensors: Columns,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    table: Table | None = None,
) -> None:
    """Moves parameters, moments and step counts in place, for each tensor::

        g = gradient / scale
        t += 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr * weight_decay * p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The state is that of `torch.optim.AdamW(fused=True)`. Unlike there, gradients are only read: with a scale, PyTorch
    writes them back divided, 4 bytes a parameter beside the 28 that a step has to move. Deterministic. Two launches
    for all tensors (four where some do not start at multiples of 16 bytes); nothing is waited for. Gradients do not
    flow through it; versions of what it moves are counted.

    Args:
        tensors: parameters p, gradients, exp_avgs m, exp_avg_sqs v and steps t (fp32 `[]` each: steps that were made).
        lr, betas, eps, weight_decay: of all these tensors; betas in [0, 1).
        scale: fp32 `[]`: what gradients are divided by; 1 if absent.
        skip: fp32 `[]`: where it is 1 nothing moves and no step is counted.
        table: the one of the last step of the same tensors saves the host some work; any other is as good.

    Raises:
        ValueError: if `takes` does not take the tensors, or while a CUDA graph is captured: a replay would follow the
            addresses of the step that was captured.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
    """
    if not takes(tensors):
        raise ValueError(
            "adamw_: tensors must be five columns of plain fp32 tensors, each contiguous and all on one GPU, with a "
            "gradient, two moments of its shape and a step count [] for each parameter; for others take "
            "torch.optim.AdamW"
        )
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("adamw_: it cannot be captured in a CUDA graph; take its step behind the graph")
    move_(tensors, lr, betas, eps, weight_decay, scale, skip, Table() if table is None else table)


def move_(
    tensors: Columns,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
    skip: Tensor | None,
    table: Table,
) -> None:
    """`adamw_` of what `takes` has taken: kernels follow the addresses, and nothing is checked again."""
    device = tensors[0][0].device
    scale, skip = (None if number is None else number.to(device, torch.float32) for number in (scale, skip))
    kernels("adamw", "triton").step(table, tensors, lr, betas, eps, weight_decay, scale, skip)
    parameters, _, *state = tensors
    torch.autograd.graph.increment_version([*parameters, *chain.from_iterable(state)])


__all__ = ["ERROR_BOUND", "Columns", "Table", "adamw_", "move_", "takes"]
