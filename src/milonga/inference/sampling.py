"""Choosing the next byte from the model's prediction."""

import math

import numpy as np

from milonga.errors import UserError


class Sampler:
    """Draws ids from logits by the inverse of the cumulative distribution, one uniform number a draw.

    All arithmetic is in float64 and ids are kept in a stable order, so the same seed and the same logits give the same
    ids on every machine.

    Args:
        temperature: the logits are divided by it; 0 always takes the likeliest id (the lowest of equals).
        top_k: draw among the k likeliest ids only; None for all.
        top_p: draw among the fewest likeliest ids that together have this probability; None for all. With both, top_p
            counts within the top_k.
        seed: of the generator (PCG64); None takes one from the operating system.

    Raises:
        UserError: if a setting is out of range.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int | None = 0
    ):
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"generate: temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise UserError(f"generate: top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"generate: top_p must be above 0 and at most 1, got {top_p}")
        if seed is not None and seed < 0:
            raise UserError(f"generate: seed must be 0 or more, got {seed}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def draw(self, logits: np.ndarray) -> int:
        """The next id, for logits `[V]` of any floating dtype.

        Raises:
            UserError: if the logits hold NaN or nothing but -inf: the model is broken, or was trained to NaN.
        """
        best = int(logits.argmax())  # the first NaN, where there is one
        if not math.isfinite(top := float(logits[best])):
            raise UserError(f"generate: the model predicts {top} for the next byte; its weights are damaged")
        if self.temperature == 0:
            return best
        scores = logits.astype(np.float64)
        scores -= top
        scores /= self.temperature
        if self.top_k is None and self.top_p is None:
            return self._inverse(np.exp(scores).cumsum())
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        cumulative = np.exp(scores[order]).cumsum()
        if self.top_p is not None:
            enough = int(cumulative.searchsorted(self.top_p * cumulative[-1])) + 1
            cumulative = cumulative[:enough]
        return int(order[self._inverse(cumulative)])

    def _inverse(self, cumulative: np.ndarray) -> int:
        """The index at which a rising cumulative sum passes a uniform number; never one of probability 0."""
        total = cumulative[-1]
        index = int(cumulative.searchsorted(self._random.random() * total, side="right"))
        return index if index < len(cumulative) else int(cumulative.searchsorted(total))
