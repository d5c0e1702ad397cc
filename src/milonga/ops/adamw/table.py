"""Where the tensors of an optimizer's group are, as a kernel reads it."""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: the widest access of a thread


class Launch(NamedTuple):
    """Tensors that one launch moves."""

    rows: Tensor  # int64 [N 8]: five addresses, elements, the number of the first chunk, 0
    owner: Tensor  # int32 [C]: the row of each chunk
    aligned: bool  # the first four addresses are multiples of 16


class Table:
    """Addresses and sizes on the device, made once and kept while the tensors stay where they are.

    Gradients may be elsewhere at every step. Then eight numbers a tensor are copied anew, and not waited for; the map
    of chunks, which depends on sizes alone, stays. Steps of one table are meant for one stream.
    """

    def __init__(self) -> None:
        self._seen: tuple[list[int], int] | None = None
        self._launches: list[Launch] = []
        self._owners: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def launches(self, tensors: Sequence[Sequence[Tensor]], counts: Sequence[int], chunk: int) -> list[Launch]:
        """All (parameters, gradients, exp_avgs, exp_avg_sqs, step counts): the aligned ones, and then the others.

        `counts` are their elements, and `chunk` those that a program takes.
        """
        columns = [*([tensor.data_ptr() for tensor in column] for column in tensors), counts]
        seen = list(chain.from_iterable(columns)), chunk
        if seen != self._seen:
            parts: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
            for row in zip(*columns, strict=True):
                parts[(row[0] | row[1] | row[2] | row[3]) % _ALIGNED != 0].append(row)
            device = tensors[0][0].device
            made = [_launch(rows, part == 0, chunk, device, self._owners) for part, rows in enumerate(parts) if rows]
            self._launches = [launch for launch, _ in made]
            self._owners = {key: launch.owner for launch, key in made}
            self._seen = seen
        return self._launches


def _launch(
    rows: Sequence[tuple[int, ...]],
    aligned: bool,
    chunk: int,
    device: torch.device,
    owners: dict[tuple[torch.device, tuple[int, ...]], Tensor],
) -> tuple[Launch, tuple[torch.device, tuple[int, ...]]]:
    """-> (a launch, by what its map of chunks is known)."""
    chunks = tuple(-(-row[5] // chunk) for row in rows)
    numbers, first = array("q"), 0
    for row, count in zip(rows, chunks, strict=True):
        numbers.extend((*row, first, 0))
        first += count
    owner = owners.get((device, chunks))
    if owner is None:
        owner = _there(torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks)), device)
    return Launch(_there(torch.frombuffer(numbers, dtype=torch.int64), device), owner, aligned), (device, chunks)


def _there(table: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, not waited for: pinned memory is not given out again before the copies from it are made."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
