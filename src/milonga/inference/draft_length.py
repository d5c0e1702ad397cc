"""How much to draft for a round: always the same, or what gives the most bytes for the time.

A draft of m tokens, of c bytes each, of which each byte stands with the chance a if those before it do, gives

    E(m) = 1 + a + ... + a^(m c) = (1 - a^(m c + 1)) / (1 - a)

bytes for a verification, and a round takes `round + m token` plain steps. So m is best where E(m) over that price is
largest; m c counts as 15 bytes at most, so many are drafted. The prices are given once, so that how long a draft is
follows from the text and the seed alone. The chance a is what this text's rounds have shown so far, the latest counting
most, and c the mean over the text.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple

from milonga.errors import UserError

_MEMORY = 0.98  # of each round, what counts of all before it
_ACCEPTANCE, _EXAMINED = 0.8, 20.0  # what is believed before the first round, and how many bytes that weighs
_SLACK = 1.25  # bytes that are looked at, in those that are expected: long tokens are not cut
_MULTIPLE = 8  # a verification reads a multiple of so many bytes

# The word for `AdaptiveDraft()`.
ADAPTIVE: Literal["adaptive"] = "adaptive"

# Bytes of an adaptive draft. A GPU's products take 16 rows in the time of one; of 17 they take twice as long.
LONGEST = 15


class Plan(NamedTuple):
    """What is drafted for one row."""

    tokens: int  # the drafter's steps, at most (only where it is told beforehand, see `DeviceDrafter`)
    bytes: int  # at most


@dataclass(frozen=True)
class AdaptiveDraft:
    """Drafts that grow where bytes stand and shrink where they fall, by the formula above.

    Args:
        round: what a round takes beside the drafter's steps (reading the last tokens again, verification, commit, the
            host), in plain steps of the verifier.
        token: what each step of the drafter takes, in the same unit.
        longest: tokens at most, 1 or more.

    Raises:
        UserError: if a price is not a number above 0, or `longest` not a whole one, 1 or more.
    """

    round: float = 2.0
    token: float = 0.2
    longest: int = 8

    def __post_init__(self) -> None:
        if not (0 < self.round < math.inf and 0 < self.token < math.inf):
            raise UserError(f"adaptive draft: prices must be above 0 and finite, got {self.round} and {self.token}")
        if not is_count(self.longest):
            raise UserError(f"adaptive draft: longest must be a whole number, 1 or more, got {self.longest}")

    def tokens(self, acceptance: float, token_bytes: float) -> int:
        """The best number of tokens, where each byte stands with this chance and tokens have so many bytes."""
        rates = [
            expected_bytes(acceptance, min(count * token_bytes, LONGEST)) / (self.round + count * self.token)
            for count in range(1, self.longest + 1)
        ]
        return rates.index(max(rates)) + 1


DraftLength = int | AdaptiveDraft
"""Bytes for every round, or a rule."""


def is_count(value: object) -> bool:
    """Whether it is a whole number, 1 or more (NumPy's too; not a truth value)."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def draft_length(draft: DraftLength | Literal["adaptive"]) -> DraftLength:
    """What `draft` says: bytes for every round, 1 or more; a rule; or the word for the rule with its usual prices.

    Raises:
        UserError: if it is none of these.
    """
    if isinstance(draft, AdaptiveDraft):
        return draft
    if isinstance(draft, str) and draft == ADAPTIVE:
        return AdaptiveDraft()
    if not is_count(draft):
        raise UserError(
            f"speculative decoding: draft must be a whole number of bytes, at least 1, '{ADAPTIVE}' or an "
            f"AdaptiveDraft, got {draft!r}"
        )
    return int(draft)


def expected_bytes(acceptance: float, draft: float) -> float:
    """Bytes of a verification of `draft` bytes, each of which stands with the same chance if those before it do."""
    return draft + 1 if acceptance >= 1 else (1 - acceptance ** (draft + 1)) / (1 - acceptance)


class Pace:
    """How one text's rounds went, and the plan for its next."""

    def __init__(self) -> None:
        self._examined, self._accepted = _EXAMINED, _EXAMINED * _ACCEPTANCE

    @property
    def acceptance(self) -> float:
        """Share of the bytes looked at that stood."""
        return self._accepted / self._examined

    def plan(self, length: DraftLength, token_bytes: float) -> Plan:
        """For the next round, where a token of the drafter has so many bytes."""
        if isinstance(length, AdaptiveDraft):
            tokens = length.tokens(self.acceptance, token_bytes)
            wanted = 1 + tokens * token_bytes * (_SLACK if token_bytes > 1 else 1.0)
            pieces = max(1, min(-(-round(wanted) // _MULTIPLE), (LONGEST + 1) // _MULTIPLE))
            return Plan(tokens, _MULTIPLE * pieces - 1)
        return Plan(max(1, min(length, round(length / token_bytes))), length)

    def saw(self, examined: int, accepted: int) -> None:
        """What came of a round: bytes looked at, and of these stood."""
        self._examined = _MEMORY * self._examined + examined
        self._accepted = _MEMORY * self._accepted + accepted
