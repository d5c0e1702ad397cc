"""Random orders that need no memory: the i-th element is computed when it is asked for."""

import numpy as np

_WORD = (1 << 64) - 1
_ROUNDS = 8


def mix(values: np.ndarray, *keys: int) -> np.ndarray:
    """A well-mixed 64-bit number for each value and keys: uint64, of the shape of `values`.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), once per key of up to 128 bits. Written out rather than
    taken from a library's generator, because what a seed means must never change.
    """
    mixed = np.array(values, np.uint64, ndmin=1)
    for key in keys:
        for word in (key & _WORD, key >> 64 & _WORD):
            mixed = _finalise((mixed ^ np.uint64(word)) + np.uint64(0x9E3779B97F4A7C15))
    return mixed.reshape(np.shape(values))


def _finalise(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw(size: int, *keys: int) -> int:
    """An integer of 0..size-1 that depends on the keys only; uniform but for a bias of size / 2^64."""
    return int(mix(np.zeros(1, np.uint64), *keys)[0]) % size


def permute(indices: np.ndarray, size: int, *keys: int) -> np.ndarray:
    """Where a random permutation of 0..size-1 sends `indices`: int64, time and memory O(len(indices)).

    A Feistel network permutes the numbers of as many bits as `size` needs, and what falls outside is sent through it
    again until it falls inside (cycle walking; Black and Rogaway, 2002), less than twice on average.

    Args:
        indices: integers of 0..size-1.
        size: how many elements are permuted.
        keys: choose the permutation.
    """
    bits = max(2, (size - 1).bit_length())
    high, low = bits // 2, bits - bits // 2
    values = np.array(indices, np.uint64, ndmin=1)
    round_keys = mix(np.arange(_ROUNDS), *keys)
    todo = np.ones(values.shape, bool)
    while todo.any():
        values[todo] = _feistel(values[todo], high, low, round_keys)
        todo = values >= size
    return values.astype(np.int64).reshape(np.shape(indices))


def _feistel(values: np.ndarray, high: int, low: int, round_keys: np.ndarray) -> np.ndarray:
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for number, key in enumerate(round_keys):
        # the halves may differ by a bit and swap widths each round; the rounds are even, so they end as they began
        mask = np.uint64((1 << (high if number % 2 == 0 else low)) - 1)
        left, right = right, left ^ (_finalise(right + key) & mask)
    return (left << np.uint64(low)) | right
