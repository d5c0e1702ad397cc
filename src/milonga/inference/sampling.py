"""Choosing the next token from the model's prediction: settings, the distribution they make, and seeded draws from it.

Everything here is NumPy in float64 and knows nothing of networks, so that plain and speculative decoding draw from the
same distribution.
"""

import dataclasses
import math
import numbers
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from milonga.errors import UserError
from milonga.inference.constraints import Constraint

# The longest window of the repetition penalty: a session remembers as many of its last tokens.
LONGEST_WINDOW = 1024
_BLOCK = 256  # uniform numbers made at once


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is to be drawn. The settings act in this order: repetition penalty, what is not allowed (`banned`,
    `forced`, `valid_utf8`), temperature, `top_k`, `top_p`, `min_p`.

    Args:
        temperature: the logits are divided by it; 0 always takes the likeliest token (the lowest id of equals).
        top_k: draw among the k likeliest tokens only; None for all.
        top_p: draw among the fewest likeliest tokens that together have this probability, in (0, 1]; None for all. With
            `top_k` too, it counts within the k.
        min_p: leave out tokens whose probability is below this share of the likeliest one's, in [0, 1]; None for none.
        repetition_penalty: positive logits of tokens seen lately are divided by it, negative ones multiplied (Keskar et
            al., arXiv 1909.05858); 1 for none, above 1 against repetition.
        repetition_window: how many of the last tokens, read or written, count as seen lately, 1 to 1024.
        stop: the text ends before the first of these that would be written.
        banned: bytes that are never written.
        forced: what the text must begin with.
        valid_utf8: write nothing but UTF-8 (RFC 3629: no overlong forms, no surrogates), and end on a whole character
            where the length allows it.
        seed: of the draws; None takes one from the operating system. The number drawn with is a function of the seed
            and the position in the text alone: a text written in two calls, or after a resume, is that of one, as far
            as `Session.sampling` says.

    Whole numbers and numbers may be NumPy's; they are kept as Python's.

    Raises:
        UserError: if a setting is of another type or out of range, or they leave nothing to write.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    stop: tuple[bytes, ...] = ()
    banned: bytes = b""
    forced: bytes = b""
    valid_utf8: bool = False
    seed: int | None = 0

    def __post_init__(self) -> None:
        self._take_types()
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more", self)
        _require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1", self)
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self)
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "0 to 1", self)
        penalty, window = self.repetition_penalty, self.repetition_window
        _require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "above 0", self)
        _require(1 <= window <= LONGEST_WINDOW, "repetition_window", f"1 to {LONGEST_WINDOW} tokens", self)
        _require(self.seed is None or self.seed >= 0, "seed", "0 or more", self)
        whole = isinstance(self.stop, tuple) and all(isinstance(text, bytes) and text for text in self.stop)
        _require(whole, "stop", "a tuple of bytes, none of them empty", self)
        both = sorted(set(self.forced) & set(self.banned))
        if both:
            raise UserError(f"generate: forced holds the byte {both[0]}, which is banned")

    def _take_types(self) -> None:
        """Keep every setting as the Python type that it is declared with, whatever kind of number was given."""
        numbers_ = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        numbers_ |= {name: value for name, value in (("top_p", self.top_p), ("min_p", self.min_p)) if value is not None}
        wholes: dict[str, object] = {"repetition_window": self.repetition_window}
        wholes |= {name: value for name, value in (("top_k", self.top_k), ("seed", self.seed)) if value is not None}
        taken: dict[str, object] = {name: real_number(value, name) for name, value in numbers_.items()}
        taken |= {name: whole_number(value, name) for name, value in wholes.items()}
        for name, value in (("banned", self.banned), ("forced", self.forced)):
            if not isinstance(value, bytes):
                raise UserError(f"generate: {name} must be bytes, such as b'abc', got {value!r}")
        if not isinstance(self.valid_utf8, bool | np.bool_):
            raise UserError(f"generate: valid_utf8 must be True or False, got {self.valid_utf8!r}")
        for name, value in (taken | {"valid_utf8": bool(self.valid_utf8)}).items():
            object.__setattr__(self, name, value)

    def behind(self, written: int) -> "Sampling":
        """The settings to go on with once so many bytes of a text are written: what is left of `forced`."""
        left = self.forced[max(0, written) :]
        return self if left == self.forced else dataclasses.replace(self, forced=left)

    def to_json(self) -> dict[str, object]:
        """The settings, JSON-ready; bytes as hexadecimal digits."""
        plain = dataclasses.asdict(self)
        return plain | {
            "stop": [text.hex() for text in self.stop],
            "banned": self.banned.hex(),
            "forced": self.forced.hex(),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Sampling":
        """The settings that `to_json` described."""
        settings: dict[str, Any] = dict(stored)
        settings |= {name: bytes.fromhex(stored[name]) for name in ("banned", "forced")}
        settings["stop"] = tuple(bytes.fromhex(text) for text in stored["stop"])
        return cls(**settings)

    @property
    def penalises(self) -> bool:
        """Whether the last tokens matter."""
        return self.repetition_penalty != 1

    @property
    def constrains(self) -> bool:
        """Whether some tokens may not be allowed at some places."""
        return self.valid_utf8 or bool(self.banned) or bool(self.forced)


def _require(holds: bool, name: str, what: str, settings: Sampling) -> None:
    if not holds:
        raise UserError(f"generate: {name} must be {what}, got {dataclasses.asdict(settings)[name]}")


def whole_number(value: object, name: str, of: str = "generate") -> int:
    """A whole number of any type as Python's; an error says what it was given as, and to what.

    Raises:
        UserError: if it is none.
    """
    if isinstance(value, SupportsIndex):
        try:
            return operator.index(value)
        except TypeError:  # an array of several, say
            pass
    raise UserError(f"{of}: {name} must be a whole number, got {value!r}")


def number_from_zero(value: object, name: str, of: str = "generate") -> int:
    """A `whole_number`, 0 or more.

    Raises:
        UserError: if it is none, or below 0.
    """
    number = whole_number(value, name, of)
    if number < 0:
        raise UserError(f"{of}: {name} must be 0 or more, got {number}")
    return number


def real_number(value: object, name: str) -> float:
    """A number of any type as Python's.

    Raises:
        UserError: if it is none.
    """
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:  # a whole number past them all
            pass
    raise UserError(f"generate: {name} must be a number, got {value!r}")


def distribution(
    logits: np.ndarray,
    sampling: Sampling,
    context: Sequence[int] | np.ndarray = (),
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """The probabilities that the next token is drawn with. Pure.

    Args:
        logits: `[V]`, any floating dtype; not changed.
        sampling: its seed, `stop`, and what makes up `allowed` are not looked at.
        context: ids of the last tokens, the latest last; only the last `repetition_window` count.
        allowed: bool `[V]`, tokens that may come; None for all.

    Returns:
        float64 `[V]`, its sum 1 up to rounding; at temperature 0 all of it on one token.

    Raises:
        UserError: if the logits hold NaN, +inf or nothing but -inf: the model is broken, or was trained to NaN.
    """
    scores = logits.astype(np.float64)
    top = float(scores[scores.argmax()])  # the first NaN, where there is one
    if not math.isfinite(top):
        raise UserError(f"generate: the model predicts {top} for the next token; its weights are damaged")
    if sampling.penalises and len(context):
        seen = np.unique(np.asarray(context[-sampling.repetition_window :], np.int64))
        score = scores[seen]
        scores[seen] = np.where(score > 0, score / sampling.repetition_penalty, score * sampling.repetition_penalty)
    if allowed is not None:
        scores[~allowed] = -np.inf
    best = int(scores.argmax())
    if not math.isfinite(float(scores[best])):
        raise UserError("generate: the model gives no probability to any token that is allowed here")
    if sampling.temperature == 0:
        only = np.zeros(len(scores))
        only[best] = 1
        return only
    with np.errstate(over="ignore"):  # a tiny temperature: what is not the best gets -inf
        scores -= scores[best]
        scores /= sampling.temperature
    weights = np.exp(scores)
    _keep_likeliest(weights, sampling)
    return weights / weights.sum()


def _keep_likeliest(weights: np.ndarray, sampling: Sampling) -> None:
    """Set what `top_k`, `top_p` and `min_p` leave out to 0, in place; the largest of `weights` is 1."""
    if sampling.top_k is not None and sampling.top_k < len(weights):
        least = np.partition(weights, -sampling.top_k)[-sampling.top_k]
        equal = np.flatnonzero(weights == least)
        weights[equal[sampling.top_k - int((weights > least).sum()) :]] = 0  # of equals the lowest ids stay
        weights[weights < least] = 0
    if sampling.top_p is not None:
        kept = np.flatnonzero(weights)
        order = kept[np.argsort(-weights[kept], kind="stable")]
        cumulative = weights[order].cumsum()
        enough = int(cumulative.searchsorted(sampling.top_p * cumulative[-1])) + 1
        weights[order[enough:]] = 0
    if sampling.min_p is not None:
        weights[weights < sampling.min_p] = 0


def pick(probabilities: np.ndarray, uniform: float) -> int:
    """The id at which the cumulative sum of `probabilities [V]` passes a share `uniform`, from 0 to below 1, of its
    total; never one of probability 0."""
    cumulative = probabilities.cumsum()
    total = cumulative[-1]
    index = int(cumulative.searchsorted(uniform * total, side="right"))
    return index if index < len(cumulative) else int(cumulative.searchsorted(total))


def log2_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 `[V]`: the base-2 logarithm of the model's own probabilities, for `logits [V]`, before any setting."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return (wide - math.log(np.exp(wide).sum())) / math.log(2)


class Uniforms:
    """Uniform numbers in [0, 1), each a function of seed, position and lane alone (Philox, Salmon et al., SC 2011).

    Lanes are independent streams, for decoders that need several numbers at one position; plain sampling uses lane 0.
    """

    def __init__(self, seed: int):
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._blocks: dict[int, tuple[int, np.ndarray]] = {}  # of each lane the block of numbers made last

    def __call__(self, position: int, lane: int = 0) -> float:
        """The number of one position, >= 0, in one lane, >= 0."""
        block, index = divmod(position, _BLOCK)
        return float(self._block(block, lane)[index])

    def span(self, first: int, count: int, lane: int = 0) -> np.ndarray:
        """float64 `[count]`: the numbers of positions `first`, `first + 1`, ... in one lane."""
        block, start = divmod(first, _BLOCK)
        if start + count <= _BLOCK:
            return self._block(block, lane)[start : start + count]
        blocks = range(block, (first + count - 1) // _BLOCK + 1)
        return np.concatenate([self._block(block, lane) for block in blocks])[start : start + count]

    def _block(self, block: int, lane: int) -> np.ndarray:
        made = self._blocks.get(lane)
        if made is None or made[0] != block:
            counter = np.array([0, block, lane, 0], np.uint64)
            raw = np.random.Philox(key=self._key, counter=counter).random_raw(_BLOCK)
            made = self._blocks[lane] = block, (raw >> np.uint64(11)) * 2.0**-53
        return made[1]


class Sampler:
    """Draws one text after another's end: settings, and where in the text it stands.

    `Session.sampler` makes one that stands where the session does. Decoders call `draw` for each token; speculative
    ones take `probabilities`, `uniform` and `accept` apart, and `fork` to look ahead.

    Args:
        sampling: the settings; with the seed None one is taken from the operating system, and `sampling` then shows it.
        position: tokens before the first that is drawn.
        context: ids of the last tokens before it, for the repetition penalty.
        constraint: what may come where; needed if the settings constrain.
        pending: the last bytes before it, where they begin a UTF-8 character.
        left: tokens that will be drawn at most; None where that is not known.

    Attributes:
        sampling: the settings, with a seed.
        position: tokens before the next that is drawn.
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        *,
        position: int = 0,
        context: Sequence[int] | np.ndarray = (),
        constraint: Constraint | None = None,
        pending: bytes = b"",
        left: int | None = None,
    ):
        sampling = sampling or Sampling()
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        assert constraint is not None or not sampling.constrains
        self.sampling, self.position = dataclasses.replace(sampling, seed=seed), position
        self._uniforms = Uniforms(seed)
        window = sampling.repetition_window if sampling.penalises else 0
        self._context = deque((int(token) for token in context[-window:]) if window else (), maxlen=window)
        self._constraint, self._left = constraint, left
        self._place = constraint.start(pending) if constraint is not None else None

    @property
    def rest(self) -> Sampling:
        """The settings that a text goes on with from here: see `Sampling.behind`."""
        return self.sampling.behind(self._place.forced if self._place is not None else 0)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 `[V]`: what the next token is drawn from, for `logits [V]`. Raises as `distribution`."""
        allowed = None
        if self._constraint is not None and self._place is not None:
            allowed = self._constraint.allowed(self._place, self._left)
        return distribution(logits, self.sampling, list(self._context), allowed)

    def uniform(self, lane: int = 0) -> float:
        """The uniform number of the next token's position; see `Uniforms` for lanes."""
        return self._uniforms(self.position, lane)

    def accept(self, token: int) -> None:
        """The next token is this one: go on behind it."""
        self.position += 1
        self._context.append(token)
        if self._left is not None:
            self._left -= 1
        if self._constraint is not None and self._place is not None:
            self._place = self._constraint.after(self._place, token)

    def choose(self, logits: np.ndarray) -> int:
        """What `draw` draws, without going on behind it. Raises as `distribution`."""
        probabilities = self.probabilities(logits)
        if self.sampling.temperature == 0:
            return int(probabilities.argmax())
        return pick(probabilities, self.uniform())

    def draw(self, logits: np.ndarray) -> int:
        """Draw the next token from its `logits [V]` and go on behind it. Raises as `distribution`."""
        token = self.choose(logits)
        self.accept(token)
        return token

    def fork(self) -> "Sampler":
        """A second sampler at the same place, with the same numbers to come."""
        twin = Sampler(self.sampling, position=self.position, context=list(self._context), constraint=self._constraint)
        twin._place, twin._left = self._place, self._left
        return twin
