"""A hash of all the tokens that a session has read, kept as it reads in 32 bytes and the last few tokens."""

import hashlib

import numpy as np

# Tokens hashed at once. The hash of a text is a chain over its whole blocks, then the rest.
BLOCK = 256


def chain(before: bytes, ids: np.ndarray) -> bytes:
    """The chain behind whole blocks: `before` behind those before them (empty at the beginning), ids `[k BLOCK]`."""
    for start in range(0, len(ids), BLOCK):
        before = hashlib.sha256(before + _stored(ids[start : start + BLOCK])).digest()
    return before


def digest(behind: bytes, rest: np.ndarray) -> bytes:
    """The hash of a text: the chain behind its whole blocks, and the rest of its ids, fewer than `BLOCK`."""
    return hashlib.sha256(b"rest" + behind + _stored(rest)).digest()


def digests(ids: np.ndarray, positions: list[int]) -> list[bytes]:
    """The hashes of the first `p` tokens, for rising positions `p`."""
    found, behind, done = [], b"", 0
    for position in positions:
        whole = position // BLOCK * BLOCK
        behind, done = chain(behind, ids[done:whole]), whole
        found.append(digest(behind, ids[whole:position]))
    return found


def _stored(ids: np.ndarray) -> bytes:
    return ids.astype("<i4").tobytes()
