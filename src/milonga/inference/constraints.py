"""What may be written next: bytes that are banned or forced, and nothing but UTF-8.

Tokens are looked at as the bytes they stand for, so a constraint on bytes holds for models of subwords too.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from milonga.errors import UserError

# Well-formed UTF-8 as a finite automaton (Unicode 16.0, table 3-7; RFC 3629): the states between bytes.
WHOLE, ONE, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4, DEAD = range(9)
# (state, first byte, last byte, next state); every other byte leads to DEAD
_MOVES = (
    (WHOLE, 0x00, 0x7F, WHOLE),
    (WHOLE, 0xC2, 0xDF, ONE),
    (WHOLE, 0xE0, 0xE0, AFTER_E0),
    (WHOLE, 0xE1, 0xEC, TWO),
    (WHOLE, 0xED, 0xED, AFTER_ED),
    (WHOLE, 0xEE, 0xEF, TWO),
    (WHOLE, 0xF0, 0xF0, AFTER_F0),
    (WHOLE, 0xF1, 0xF3, THREE),
    (WHOLE, 0xF4, 0xF4, AFTER_F4),
    (ONE, 0x80, 0xBF, WHOLE),
    (TWO, 0x80, 0xBF, ONE),
    (THREE, 0x80, 0xBF, TWO),
    (AFTER_E0, 0xA0, 0xBF, ONE),  # lower ones would be overlong
    (AFTER_ED, 0x80, 0x9F, ONE),  # higher ones would be surrogates
    (AFTER_F0, 0x90, 0xBF, TWO),  # lower ones would be overlong
    (AFTER_F4, 0x80, 0x8F, TWO),  # higher ones would be past U+10FFFF
)


def _automaton() -> np.ndarray:
    """uint8 `[9, 256]`: the state behind each byte, from each state."""
    table = np.full((DEAD + 1, 256), DEAD, np.uint8)
    for state, first, last, after in _MOVES:
        table[state, first : last + 1] = after
    return table


UTF8 = _automaton()


class Place(NamedTuple):
    """Where a text stands between two tokens."""

    utf8: int  # state of the automaton
    forced: int  # bytes of the forced text written so far


class Constraint:
    """Which tokens may come where.

    Args:
        token_bytes: what each of the V tokens stands for.
        banned: bytes that are never written.
        forced: what the text must begin with.
        valid_utf8: write nothing but UTF-8, and whole characters at the end.

    Raises:
        UserError: if nothing could be written.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], *, banned: bytes = b"", forced: bytes = b"", valid_utf8: bool = False
    ):
        self._tokens, self._forced, self._valid_utf8 = tuple(token_bytes), forced, valid_utf8
        wrong = set(banned)
        self._clean = np.array([wrong.isdisjoint(token) for token in self._tokens]) if banned else None
        clean = self._clean if self._clean is not None else np.ones(len(self._tokens), bool)
        if not clean.any():
            raise UserError("generate: with these bytes banned nothing is left to write")
        if valid_utf8:
            self._moves = _token_moves(self._tokens)
            self._need = _tokens_needed(self._moves, clean)
            # need is infinite where no whole character can follow any more: never go there
            self._behind = np.where(clean, self._need[self._moves], np.inf)  # [9 V]
            if not np.isfinite(self._behind[WHOLE]).any():
                raise UserError("generate: with these bytes banned no UTF-8 text can be written")
            self._open = np.isfinite(self._behind)
            self._longest = float(self._need[np.isfinite(self._need)].max())

    def start(self, pending: bytes = b"") -> Place:
        """The place behind a text that ends in `pending`, the beginning of a character.

        Raises:
            UserError: if the forced text is no UTF-8 there and has to be.
        """
        state = _walk(WHOLE, pending)
        if not self._valid_utf8:
            return Place(WHOLE, 0)
        if state == DEAD or not np.isfinite(self._need[state]):
            state = WHOLE  # a character that cannot be finished: the text goes on behind it
        if _walk(state, self._forced) == DEAD:
            raise UserError(
                f"generate: the forced text {self._forced!r} is not valid UTF-8 here, but valid_utf8 is set"
            )
        return Place(state, 0)

    def allowed(self, place: Place, left: int | None = None) -> np.ndarray | None:
        """bool `[V]`: the tokens that may come next, with `left` tokens still to come (None: any number); None for all.
        Not to be written into."""
        mask = self._clean
        if self._valid_utf8:
            mask = self._open[place.utf8]
            if left is not None and left - 1 < self._longest:
                whole_at_the_end = self._behind[place.utf8] <= left - 1
                mask = whole_at_the_end if whole_at_the_end.any() else mask
        if place.forced < len(self._forced):
            agrees = self._agrees(self._forced[place.forced :])
            both = agrees if mask is None else agrees & mask
            if not both.any() and self._valid_utf8:  # the forced text matters more than a whole character at the end
                both = agrees & self._open[place.utf8]
            mask = both
        return mask

    def after(self, place: Place, token: int) -> Place:
        """The place behind a token."""
        forced = min(place.forced + len(self._tokens[token]), len(self._forced))
        state = int(self._moves[place.utf8, token]) if self._valid_utf8 else WHOLE
        return Place(WHOLE if state == DEAD else state, forced)

    def _agrees(self, text: bytes) -> np.ndarray:
        """bool `[V]`: the tokens that begin with `text` or that `text` begins with."""
        fits = [bool(token) and (text.startswith(token) or token.startswith(text)) for token in self._tokens]
        return np.array(fits)


def _walk(state: int, data: bytes) -> int:
    for byte in data:
        state = int(UTF8[state, byte])
    return state


@lru_cache(maxsize=4)
def _token_moves(tokens: tuple[bytes, ...]) -> np.ndarray:
    """uint8 `[9, V]`: the state of the automaton behind each token, from each state."""
    lengths = np.array([len(token) for token in tokens])
    moves = np.repeat(np.arange(DEAD + 1, dtype=np.uint8)[:, None], len(tokens), axis=1)
    joined = np.frombuffer(b"".join(tokens), np.uint8)
    starts = lengths.cumsum() - lengths
    for index in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > index)
        moves[:, longer] = UTF8[moves[:, longer], joined[starts[longer] + index]]
    return moves


def _tokens_needed(moves: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """float64 `[9]`: the fewest tokens, among the `clean` ones, from each state to a whole character; inf for never."""
    need = np.full(DEAD + 1, np.inf)
    need[WHOLE] = 0
    for _ in range(DEAD):
        behind = np.where(clean, need[moves], np.inf).min(axis=1) + 1
        need[:DEAD] = np.minimum(need, behind)[:DEAD]
    return need
