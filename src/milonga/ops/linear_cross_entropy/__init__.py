"""The loss of a linear classifier, without holding the logits of every row at once."""

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_dtype
from milonga.ops.backend import choice
from milonga.ops.checks import FLOATS, expect, expect_rows
from milonga.ops.linear_cross_entropy.library import linear_cross_entropy_op
from milonga.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

# Bound of the relative RMS error of the losses and of each gradient against the float64 reference, fp32 inputs.
ERROR_BOUND = 2e-6
# Bytes of fp32 logits that a chunk of rows may have: on a CPU about what its caches hold, on a GPU enough that the
# matrix products fill it and the gradient of the weight is added up in few turns.
CHUNK_BYTES = 1 << 24
CHUNK_BYTES_GPU = 1 << 29


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`-log softmax(x weight^T + bias)[target]` of each row, in nats.

    Logits are computed for `chunk` rows at a time, and again in the backward pass. On a GPU the gradients of the sum of
    all losses are computed with them, and only scaled afterwards where the gradient that comes back is one number for
    all rows, as that of a sum or a mean is: a quarter of the products is saved.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64.
        weight: `[V, D]`, of any of those dtypes; it is brought to fp32, as x is, or to float64 where x is that. On a
            GPU the products of bf16 and of fp16 are taken as they are and summed in fp32; under autocast there both are
            rounded first, as for any linear layer.
        targets: int64 `[...]`, each in 0 .. V - 1 or `ignore_index`.
        bias: `[V]`, of any of those dtypes, or None.
        ignore_index: the target of rows that count for nothing: loss 0, no gradient.
        chunk: rows at a time (>= 1); None for as many as have 16 MiB of fp32 logits, on a GPU 512 MiB.
        backend: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        losses `[...]`, float32 (float64 where x is). Relative RMS error against float64 with fp32 inputs: at most
        `ERROR_BOUND`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, a target is out of range (not checked on a GPU, whose
            kernel gives NaN for it, or under a compiler), `chunk` is below 1, or the backend cannot run here.
    """
    _check(x, weight, targets, bias)
    vocabulary = weight.shape[0]
    if chunk is None:
        chunk = _rows(vocabulary, x.device.type)
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, got {chunk}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_targets(targets, vocabulary, ignore_index)
    chosen = choice("linear_cross_entropy", backend, x.device.type, x.dtype)
    if chosen == "reference":
        return linear_cross_entropy_reference(x, weight, targets, bias, ignore_index, chunk)
    half = autocast_dtype("cuda")
    if chosen == "triton" and half is not None:
        x, weight = x.to(half), weight.to(half)
    # fp16 would overflow before it is scaled; a compiler joins passes as it likes and hands over a whole gradient
    sloped = chosen == "triton" and x.dtype != torch.float16 and not torch.compiler.is_compiling()
    sloped = sloped and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return linear_cross_entropy_op(x, weight, targets, bias, ignore_index, chunk, sloped)[0]


def _check(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    op = "linear_cross_entropy"
    expect_rows(op, x)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: weight must be [V, D], expected [V, {x.shape[-1]}], got {list(weight.shape)}")
    expect(op, "weight", weight, "[V, D]", weight.shape, FLOATS, x.device)
    expect(op, "targets", targets, "int64 [...]", x.shape[:-1], (torch.int64,), x.device)
    if bias is not None:
        expect(op, "bias", bias, "[V]", weight.shape[:1], FLOATS, x.device)


def _rows(vocabulary: int, device: str) -> int:
    """Rows of a chunk; on a GPU a multiple of 256 where there are that many, for the sake of the products' tiles."""
    if device == "cpu":
        return max(1, CHUNK_BYTES // (4 * max(vocabulary, 1)))
    rows = max(1, CHUNK_BYTES_GPU // (4 * max(vocabulary, 1)))
    return rows if rows < 256 else rows // 256 * 256


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise `ValueError` unless every target is below `vocabulary` and not negative, or `ignore_index`."""
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"linear_cross_entropy: targets must lie in 0 .. {vocabulary - 1} or be {ignore_index}, "
            f"got {int(targets[wrong][0])}"
        )


__all__ = ["ERROR_BOUND", "linear_cross_entropy", "linear_cross_entropy_reference"]
