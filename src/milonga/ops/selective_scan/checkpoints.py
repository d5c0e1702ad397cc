"""Where the forward pass keeps the states from which the backward pass recomputes all others."""

import torch
from torch import Tensor

# Steps between two checkpoints.
CHUNK = 32
# Channels are padded to a multiple of this, whatever the width of a vector.
PAD = 16


def checkpoint_shape(rows: int, sequences: int, width: int, states: int, save: bool) -> tuple[int, int]:
    """Shape of all checkpoints of `rows` steps in `sequences` sequences; no rows if they are not to be saved."""
    return (rows // CHUNK + sequences if save else 0), (width + PAD - 1) // PAD * PAD * states


def first_checkpoints(kept: Tensor, batch: int, time: int, offsets: Tensor | None) -> Tensor:
    """The checkpoints of what every sequence started from, a row each; that of an empty sequence is anything."""
    if offsets is None:
        starts = torch.arange(batch, device=kept.device) * time
    else:
        starts = offsets[:-1]
    return kept[starts // CHUNK + torch.arange(starts.shape[0], device=kept.device)]
