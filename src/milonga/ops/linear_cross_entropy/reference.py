"""The definition of `linear_cross_entropy` in plain PyTorch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from milonga.ops.autocast import autocast_to


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> Tensor:
    """As `milonga.ops.linear_cross_entropy`; any device, any floating dtype, float64 throughout where x is float64.

    Logits exist for `chunk` rows at a time; the backward pass computes them again.
    """
    rows, ids = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if rows.shape[0] <= chunk:
        return _losses(rows, weight, ids, bias, ignore_index).reshape(targets.shape)
    pieces = [
        checkpoint(_losses, part, weight, part_ids, bias, ignore_index, use_reentrant=False, preserve_rng_state=False)
        for part, part_ids in zip(rows.split(chunk), ids.split(chunk), strict=True)
    ]
    return torch.cat(pieces).reshape(targets.shape)


def _losses(x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    """`-log softmax(x weight^T + bias)[id]` of each row `[R]`, 0 where the id is `ignore_index`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Autocast would take the product in half precision; the definition does not change with it.
    with autocast_to(x.device.type, None):
        logits = x.to(wide) @ weight.to(wide).T
        if bias is not None:
            logits = logits + bias.to(wide)
        ignored = ids == ignore_index
        chosen = logits.gather(-1, ids.masked_fill(ignored, 0)[:, None])[:, 0]
        return torch.where(ignored, 0.0, logits.logsumexp(-1) - chosen)
