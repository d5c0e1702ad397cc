"""A vocabulary sorted by bytes: which tokens begin with given bytes, and what they make of the byte that follows."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class ByteSortedVocabulary:
    """The ids of a vocabulary in the order of their bytes.

    Tokens that begin with the same bytes stand together, the token that is these bytes first. So with the running sum
    of the tokens' probabilities in this order, the probability of every next byte is the difference of two entries: a
    trie of which the nodes are ranges.

    Args:
        token_bytes: the bytes of every id, V of them.

    Attributes:
        order: int64 [V], the ids in the order of their bytes (of equal ones the smaller id first).
        longest: bytes of the longest token.
    """

    def __init__(self, token_bytes: Sequence[bytes]):
        ids = sorted(range(len(token_bytes)), key=token_bytes.__getitem__)  # stable
        self.order = np.array(ids, np.int64)
        self._sorted = [token_bytes[i] for i in ids]
        self.longest = max(map(len, self._sorted), default=0)
        # column d: the byte at d plus 1 of each token in order, 0 where it has ended; ascending inside a range of
        # tokens that share their first d bytes
        self._columns = np.zeros((self.longest + 1, len(ids)), np.int16)
        for row, token in enumerate(self._sorted):
            self._columns[: len(token), row] = np.frombuffer(token, np.uint8)
            self._columns[: len(token), row] += 1

    def __len__(self) -> int:
        return len(self.order)

    def range(self, prefix: bytes) -> tuple[int, int]:
        """`[lo, hi)`: the places in `order` of the tokens that begin with `prefix`; empty (lo = hi) if none does."""
        lo = bisect_left(self._sorted, prefix)
        after = prefix.rstrip(b"\xff")  # the least bytes that are greater than all that begin with the prefix
        if not after:
            return lo, len(self._sorted)
        return lo, bisect_left(self._sorted, after[:-1] + bytes([after[-1] + 1]), lo=lo)

    def bounds(self, lo: int, hi: int, depth: int) -> np.ndarray:
        """Where the tokens of a range part: int64 [258].

        Places `bounds[0]..bounds[1]` hold the tokens that are the prefix itself, `bounds[1 + b]..bounds[2 + b]` those
        that go on with byte b.

        Args:
            lo, hi: as `range` gave them for a prefix.
            depth: bytes of that prefix.
        """
        if depth > self.longest:
            return np.full(258, lo, np.int64)
        column = self._columns[depth, lo:hi]
        return lo + np.searchsorted(column, np.arange(258, dtype=np.int16))

    def child(self, lo: int, hi: int, depth: int, byte: int) -> tuple[int, int]:
        """The range of the prefix of which `lo, hi, depth` are the range and length, one byte longer."""
        if depth > self.longest:
            return lo, lo
        found = lo + np.searchsorted(self._columns[depth, lo:hi], np.array([byte + 1, byte + 2], np.int16))
        return int(found[0]), int(found[1])

    def cumulative(self, probabilities: np.ndarray) -> np.ndarray:
        """Running sums of the tokens' probabilities in this order: float64 [V + 1], from 0.

        Args:
            probabilities: [V], by id.
        """
        sums = np.zeros(len(self.order) + 1)
        np.cumsum(probabilities[self.order], dtype=np.float64, out=sums[1:])
        return sums

    def next_byte_masses(self, cumulative: np.ndarray, lo: int, hi: int, depth: int) -> tuple[float, np.ndarray]:
        """What the tokens of a range say about the byte behind their prefix, not normalized.

        Args:
            cumulative: float64 [V + 1], see `cumulative`.
            lo, hi, depth: see `bounds`.

        Returns:
            The mass of the token that is the prefix itself, after which another token follows; and float64 [256], the
            mass of the tokens that go on with each byte. All of them sum to `cumulative[hi] - cumulative[lo]`.
        """
        masses = np.diff(cumulative[self.bounds(lo, hi, depth)])
        return float(masses[0]), masses[1:]
