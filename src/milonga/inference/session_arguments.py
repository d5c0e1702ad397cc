"""The arguments with which a session is asked to write."""

from collections.abc import Sequence

from milonga.errors import UserError
from milonga.inference.sampling import Sampling

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
    texts = (stop,) if isinstance(stop, str | bytes) else tuple(stop)
    return tuple(text.encode() if isinstance(text, str) else text for text in texts)


def alternatives(count: int | None) -> int | None:
    """Of how many of the likeliest tokens log-probabilities are kept; None for none at all.

    Raises:
        UserError: if it is below 0.
    """
    if count is not None and count < 0:
        raise UserError(f"generate: logprobs must be 0 or more, got {count}")
    return count
