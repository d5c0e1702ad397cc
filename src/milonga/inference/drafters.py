"""Where drafts come from: what a drafter is, and the one that looks the text up in itself."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from milonga.errors import UserError
from milonga.inference.acceptance import RowDraft


class Dice(Protocol):
    """Uniform numbers in [0, 1) for one row."""

    def __call__(self, ahead: int, lane: int) -> float:
        """The number for the byte that lies `ahead` bytes behind the next, in one lane. Each may decide one thing."""
        ...


class DraftStream(Protocol):
    """A drafter at work on B texts."""

    @property
    def token_bytes(self) -> Sequence[float]:
        """Bytes of what the drafter draws at once, on average, for each text."""
        ...

    def draft(self, limit: int, temperature: float, dice: Sequence[Dice]) -> Sequence[RowDraft]:
        """At most `limit` bytes for each row.

        Args:
            limit: 1 or more.
            temperature: of the drafter's own draws; 0 for the likeliest. The exact rule is exact whatever it is.
            dice: one for each row, so that a row's text does not depend on who is beside it.
        """
        ...

    def extend(self, written: Sequence[bytes]) -> None:
        """Each row's text went on so: what stood of the draft, and the verifier's byte."""
        ...


class Drafter(Protocol):
    """Proposes the next bytes of texts."""

    def start(self, texts: Sequence[bytes]) -> DraftStream:
        """Begin behind texts, one a row. They may be empty; what a drafter does not know costs acceptance only."""
        ...


class SureDraft:
    """Bytes without any dice: q is 1 for each. The `RowDraft` of deterministic drafters, and the empty draft."""

    def __init__(self, text: bytes = b""):
        self.text = text

    def probability(self, index: int) -> float:
        """As `RowDraft.probability`."""
        return 1.0

    def distribution(self, index: int) -> Float64[np.ndarray, "256"]:
        """As `RowDraft.distribution`."""
        q = np.zeros(256)
        q[self.text[index]] = 1.0
        return q


class NgramDrafter:
    """Looks up where the text's last bytes stood before, and proposes what followed there the last time.

    Costs no model. Good for code, tables, quotations: texts that repeat themselves.

    Args:
        longest, shortest: of the endings looked for, in bytes; halved from the one to the other, first found taken.
        window: bytes of the text that are remembered, the last ones. A look-up reads each of them at most once for each
            length: about 30 microseconds for 65536.

    Raises:
        UserError: if the lengths are not in order, or the window is not longer.
    """

    def __init__(self, longest: int = 32, shortest: int = 4, window: int = 1 << 16):
        if not 1 <= shortest <= longest < window:
            raise UserError(
                f"n-gram drafter: needs 1 <= shortest <= longest < window, got {shortest}, {longest}, {window}"
            )
        self.window = window
        self.lengths = [longest]
        while self.lengths[-1] > shortest:
            self.lengths.append(max(shortest, self.lengths[-1] // 2))

    def start(self, texts: Sequence[bytes]) -> "NgramStream":
        """As `Drafter.start`."""
        return NgramStream(self, texts)


class NgramStream:
    """The `DraftStream` of `NgramDrafter`."""

    def __init__(self, drafter: NgramDrafter, texts: Sequence[bytes]):
        self._drafter = drafter
        self._texts = [bytearray(text[-drafter.window :]) for text in texts]

    @property
    def token_bytes(self) -> list[float]:
        """As `DraftStream.token_bytes`."""
        return [1.0] * len(self._texts)

    def draft(self, limit: int, temperature: float, dice: Sequence[Dice]) -> list[SureDraft]:
        """As `DraftStream.draft`. Nothing is drawn."""
        return [SureDraft(self._following(text, limit)) for text in self._texts]

    def extend(self, written: Sequence[bytes]) -> None:
        """As `DraftStream.extend`."""
        for text, more in zip(self._texts, written, strict=True):
            text += more
            if len(text) > 2 * self._drafter.window:
                del text[: -self._drafter.window]

    def _following(self, text: bytearray, limit: int) -> bytes:
        """What followed the last earlier place of the longest ending that has one. It may run into the ending itself:
        then the text repeats with a period, and the draft goes on repeating it."""
        for length in self._drafter.lengths:
            if length >= len(text):
                continue
            ending = bytes(text[-length:])
            found = text.rfind(ending, 0, len(text) - 1)
            if found >= 0:
                after = bytes(text[found + length :])
                return (after * (limit // len(after) + 1))[:limit]
        return b""
