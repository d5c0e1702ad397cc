"""Bits per byte on held-out windows, while training."""

import math

import torch

from milonga.data.corpus import Corpus
from milonga.data.windows import Batch, Ring, WindowSampler
from milonga.training.step import Forward


class HeldOut:
    """A fixed set of windows over held-out documents, the same at every evaluation of every run.

    Args:
        corpus: the held-out documents.
        window, batch: as in training; smaller where there is less text.
        tokens: how many to score at most (one batch at least).
        isolate: whether documents are kept apart, as in training.
    """

    def __init__(self, corpus: Corpus, *, window: int, batch: int, tokens: int, isolate: bool):
        window = min(window, max(1, Ring(corpus).length))
        rows = min(batch, Ring(corpus).length // window)
        self.sampler = WindowSampler(corpus, window=window, batch=rows, seed=0, isolate=isolate)
        self.count = max(1, min(tokens // (window * rows), int(self.sampler.steps_per_epoch)))

    def batch(self, index: int) -> Batch:
        """One of the `count` batches."""
        return self.sampler.batch(index)

    def bits_per_byte(self, network: Forward, *, device: torch.device, bf16: bool = False) -> float:
        """Bits of all targets over the bytes that they stand for, each window read from the empty state."""
        nats, count = 0.0, 0
        with torch.no_grad():
            for index in range(self.count):
                batch = self.batch(index)
                nats += batch_nats(network, batch, device=device, bf16=bf16)
                count += batch.target_bytes
        return nats / max(1, count) / math.log(2)


def batch_nats(network: Forward, batch: Batch, *, device: torch.device, bf16: bool) -> float:
    """The sum of a batch's losses, in nats."""
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = network(batch.tokens.to(device), None, segments=batch.segments, targets=batch.targets.to(device))
    assert output.losses is not None
    return float(output.losses.sum(dtype=torch.float64))
