"""Ragged texts in one packed row, and back."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from milonga.segments import Segments


def pack(documents: Sequence[bytes | np.ndarray | torch.Tensor]) -> tuple[torch.Tensor, Segments]:
    """Lay documents end to end: tokens, int64 [1, T], and where each starts. A document may be empty.

    Raises:
        ValueError: if a document is not a one-dimensional sequence of integers.
    """
    rows = []
    for number, document in enumerate(documents):
        if isinstance(document, bytes):
            row = torch.from_numpy(np.frombuffer(document, np.uint8).astype(np.int64))
        else:
            row = torch.as_tensor(np.array(document) if isinstance(document, np.ndarray) else document).cpu()
        if row.ndim != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise ValueError(f"pack: document {number} must be integers [T], got {row.dtype} {list(row.shape)}")
        rows.append(row.to(torch.int64))
    tokens = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return tokens[None], Segments.from_lengths(len(row) for row in rows)


def unpack(packed: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
    """Views of a packed `[1, T, ...]`, one `[T_s, ...]` for each sequence.

    Raises:
        ValueError: if the segments do not cover the row.
    """
    segments.check(packed.shape[0], packed.shape[1], "unpack")
    return [packed[0, start:stop] for start, stop in pairwise(segments.offsets.tolist())]


def next_byte_targets(tokens: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
    """What follows each token in its own sequence: int64, same shape `[B, T]` or packed `[1, T]`; -100 at the ends.

    Raises:
        ValueError: if the segments do not cover the row.
    """
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    if segments is not None:
        segments.check(tokens.shape[0], tokens.shape[1], "next_byte_targets")
        ends = segments.offsets[1:] - 1
        targets[0, ends[segments.lengths > 0]] = -100
    return targets
