"""Places in a text to come back to: one by one, or kept automatically while a session goes on."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from milonga.data.text import TextCodec, Utf8Stream
from milonga.errors import UserError
from milonga.inference import text_digest
from milonga.inference.sampling import LONGEST_WINDOW
from milonga.models.network import Network, NetworkState
from milonga.state import nbytes as state_nbytes


@dataclass(frozen=True, eq=False, slots=True)
class Mark:
    """A place in a text to come back to: all that a session knows there. Sessions never write into one."""

    network: Network
    state: NetworkState
    logits: Float[Tensor, " V"]  # fp32 at least, of the next token
    position: int  # tokens
    pending: bytes  # the last bytes, where they do not yet make a whole character
    bytes_read: int
    recent: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # ids of the last tokens, at most 1024
    chain: bytes | None = b""  # of `milonga.inference.text_digest`; None where it is not known what was read

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors hold."""
        return state_nbytes((self.state, self.logits))

    @property
    def digest(self) -> bytes | None:
        """A hash of all tokens that were read; None where they are not known."""
        if self.chain is None:
            return None
        return text_digest.digest(self.chain, self._rest())

    def _rest(self) -> np.ndarray:
        """The tokens behind the last whole block of the hash."""
        return self.recent[len(self.recent) - self.position % text_digest.BLOCK :]

    def advanced(self, ids: np.ndarray, state: NetworkState, logits: Float[Tensor, " V"], codec: TextCodec) -> "Mark":
        """The place behind the tokens `ids [T]`, not empty, where the network has come to `state` and `logits`."""
        data = codec.token_bytes[int(ids[0])] if len(ids) == 1 else codec.decode(ids)
        stream = Utf8Stream(self.pending)
        stream.feed(data)
        recent = np.concatenate((self.recent, ids[-LONGEST_WINDOW:].astype(np.int32)))[-LONGEST_WINDOW:]
        position, bytes_read = self.position + len(ids), self.bytes_read + len(data)
        chain = self.chain
        if chain is not None and position // text_digest.BLOCK > self.position // text_digest.BLOCK:
            unhashed = np.concatenate((self._rest(), ids))
            chain = text_digest.chain(chain, unhashed[: len(unhashed) - position % text_digest.BLOCK])
        return Mark(self.network, state, logits, position, stream.pending, bytes_read, recent, chain)


class KeptMarks:
    """A bounded number of marks of one text, close together near its end and ever wider apart before.

    Args:
        first: the oldest; kept as long as there is room for two.
        limit: marks at most, 1 or more.
        spacing: tokens between two, at least.

    Raises:
        UserError: if the limit is below 1.
    """

    def __init__(self, first: Mark, limit: int, spacing: int):
        if limit < 1:
            raise UserError(f"keep_marks: the number of marks must be at least 1, got {limit}")
        self._marks, self._limit, self._spacing = [first], limit, spacing

    def __contains__(self, mark: Mark) -> bool:
        return any(mark is kept for kept in self._marks)

    @property
    def positions(self) -> list[int]:
        """Where the marks stand, the oldest first."""
        return [mark.position for mark in self._marks]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the marks hold."""
        return sum(mark.nbytes for mark in self._marks)

    def restarted(self, mark: Mark) -> "KeptMarks":
        """None of these, but this one, and as many from there on."""
        return KeptMarks(mark, self._limit, self._spacing)

    def offer(self, mark: Mark) -> None:
        """The session stands here now: keep it if it is far enough from the last one, and thin out what is old."""
        if mark.position - self._marks[-1].position < self._spacing:
            return
        self._marks.append(mark)
        if len(self._marks) > self._limit:
            del self._marks[self._least_missed()]

    def _least_missed(self) -> int:
        """The mark without which distances from the end still grow most evenly: by the smallest factor over the gap."""
        if len(self._marks) == 2:
            return 0
        end = self._marks[-1].position + self._spacing
        away = [end - mark.position for mark in self._marks]
        return min(range(1, len(away) - 1), key=lambda index: away[index - 1] / away[index + 1])

    def latest(self, position: int) -> Mark:
        """The last mark at or before a position; those behind it are forgotten.

        Raises:
            UserError: if the oldest mark is behind it.
        """
        oldest = self._marks[0].position
        if position < oldest:
            raise UserError(
                f"rewind_to: position {position} lies before the oldest mark kept, at {oldest}; "
                "keep marks from the beginning on, or go there with a mark or a state file of your own"
            )
        self._marks = [mark for mark in self._marks if mark.position <= position]
        return self._marks[-1]
