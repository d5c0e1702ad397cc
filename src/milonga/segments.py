"""Where sequences start in a packed batch."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch


class Segments:
    """The boundaries of S sequences laid end to end in one packed row.

    A packed batch is `[1, T, ...]`; sequence s holds the steps `offsets[s] .. offsets[s + 1] - 1`. A sequence may be
    empty. States beside a packed batch have one row per *sequence*, and an initial state continues its sequence.

    Args:
        offsets: S + 1 integers, the first 0, never decreasing, the last T. Kept as an int64 tensor on the CPU;
            `on(device)` gives a copy elsewhere.

    Raises:
        ValueError: if `offsets` is empty, does not start at 0, or decreases.
    """

    def __init__(self, offsets: torch.Tensor | Iterable[int]):
        values = torch.as_tensor(offsets if isinstance(offsets, torch.Tensor) else list(offsets))
        if values.ndim != 1 or values.numel() < 1 or values.is_floating_point():
            raise ValueError(f"segments: offsets must be a list of integers [S + 1], got shape {list(values.shape)}")
        self.offsets = values.detach().to("cpu", torch.int64).contiguous()
        if int(self.offsets[0]) != 0:
            raise ValueError(f"segments: offsets must start at 0, got {int(self.offsets[0])}")
        if bool((self.offsets.diff() < 0).any()):
            raise ValueError(f"segments: offsets must never decrease, got {self.offsets.tolist()[:16]}")
        self._total = int(self.offsets[-1])
        self._copies: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> "Segments":
        """Segments of sequences with the given lengths (each >= 0), in order."""
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + int(length))
        return cls(offsets)

    @property
    def count(self) -> int:
        """S, the number of sequences."""
        return self.offsets.numel() - 1

    @property
    def total(self) -> int:
        """T, the number of steps in the packed row."""
        return self._total

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [S] on the CPU."""
        return self.offsets.diff()

    def on(self, device: torch.device) -> torch.Tensor:
        """The offsets, int64 [S + 1], on `device` (copied once per device)."""
        if device.type == "cpu":
            return self.offsets
        if device not in self._copies:
            self._copies[device] = self.offsets.to(device, non_blocking=True)
        return self._copies[device]

    def check(self, batch: int, time: int, op: str = "segments") -> None:
        """Raise `ValueError` unless these segments cover a packed batch of `[batch, time]`."""
        if batch != 1:
            raise ValueError(f"{op}: with segments the batch must be packed as [1, T], got {batch} rows")
        if self.total != time:
            raise ValueError(f"{op}: segments must cover T, expected offsets to end at {time}, got {self.total}")

    def __repr__(self) -> str:
        return f"Segments({self.offsets.tolist() if self.count <= 8 else f'S={self.count}, T={self.total}'})"


@lru_cache(maxsize=256)
def _rectangular(batch: int, time: int) -> np.ndarray:
    # An array, not a tensor: one made under a fake mode or a default device would be remembered for calls outside it.
    return np.arange(batch + 1, dtype=np.int64) * time


def sequence_bounds(batch: int, time: int, segments: Segments | None) -> torch.Tensor:
    """Offsets of all sequences in the batch laid flat as `[batch * time, ...]`: int64 [S + 1] on the CPU.

    Without segments each row of the batch is one sequence. Kernels that read these bounds serve both forms.
    The result is shared: it must not be written to.
    """
    return torch.from_numpy(_rectangular(batch, time)) if segments is None else segments.offsets


def sequence_count(batch: int, segments: Segments | None) -> int:
    """S, the number of rows a state beside this batch has."""
    return batch if segments is None else segments.count
