"""The arguments with which a session is asked to write, and the sampler that they make."""

from collections.abc import Iterable, Sequence

from milonga.data.text import TextCodec
from milonga.errors import UserError
from milonga.inference.constraints import Constraint
from milonga.inference.marks import Mark
from milonga.inference.sampling import Sampler, Sampling, number_from_zero

Stops = str | bytes | Sequence[str | bytes]


def settings_of(
    sampling: Sampling | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Stops,
) -> Sampling:
    """The settings given as one, or one by one.

    Raises:
        UserError: if they are given both ways, or one is out of range.
    """
    given = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=_stop_texts(stop))
    if sampling is not None and given != Sampling():
        raise UserError("generate: give a Sampling or single settings, not both")
    return sampling or given


def _stop_texts(stop: Stops) -> tuple[bytes, ...]:
    if not isinstance(stop, Iterable):
        raise UserError(f"generate: stop must be a text or several, str or bytes, got {stop!r}")
    texts = (stop,) if isinstance(stop, str | bytes) else tuple(stop)
    return tuple(_encoded(text) if isinstance(text, str) else text for text in texts)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"generate: stop: character {error.start} (U+{ord(text[error.start]):04X}) is half of a pair, so this was "
            "never valid UTF-8: give the raw bytes instead"
        ) from error


def tokens_asked(n: int) -> int:
    """How many tokens are to be written.

    Raises:
        UserError: if it is no whole number, or below 0.
    """
    return number_from_zero(n, "the number of bytes")


def alternatives(count: int | None) -> int | None:
    """Of how many of the likeliest tokens log-probabilities are kept; None for none at all.

    Raises:
        UserError: if it is no whole number, or below 0.
    """
    return None if count is None else number_from_zero(count, "logprobs")


def sampler_at(here: Mark, codec: TextCodec, sampling: Sampling, n: int | None = None) -> Sampler:
    """A sampler that stands at a place, to draw at most `n` tokens.

    Raises:
        UserError: if the settings leave nothing to write there.
    """
    constraint = None
    if sampling.constrains:
        constraint = Constraint(
            codec.token_bytes, banned=sampling.banned, forced=sampling.forced, valid_utf8=sampling.valid_utf8
        )
    return Sampler(
        sampling, position=here.position, context=here.recent, constraint=constraint, pending=here.pending, left=n
    )
