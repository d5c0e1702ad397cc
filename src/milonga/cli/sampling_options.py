"""The options of writing that commands share, as settings; and escapes in texts given on a command line."""

import re

from milonga.errors import UserError
from milonga.inference import Sampling

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.|$)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\"}


def unescaped(option: str, text: str) -> bytes:
    r"""The bytes of a text in which `\n`, `\r`, `\t`, `\\` and `\xHH` may stand for bytes.

    Raises:
        UserError: naming the option, if a backslash begins something else, or the shell gave bytes that are not UTF-8.
    """

    def meant(match: re.Match[bytes]) -> bytes:
        name = match[1]
        if len(name) == 3:
            return bytes([int(name[1:], 16)])
        if name not in _LETTERS:
            raise UserError(f"{option}: \\{name.decode(errors='replace')} is no escape; write \\n, \\t, \\xHH or \\\\")
        return _LETTERS[name]

    try:
        return _ESCAPE.sub(meant, text.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{option}: character {error.start + 1} is not valid UTF-8; write bytes as \\xHH") from error


def sampling_of(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    repetition_window: int,
    stop: list[str],
    ban: str,
    begin: str,
    valid_utf8: bool,
    seed: int,
) -> Sampling:
    """The settings that the options ask for.

    Raises:
        UserError: if one is out of range.
    """
    if not ban.isascii():
        raise UserError("--ban: characters outside ASCII are several bytes; name single ones as \\xHH")
    if "" in stop:
        raise UserError("--stop: is empty; give the text to end before, or leave it out")
    banned, forced = unescaped("--ban", ban), unescaped("--begin", begin)
    if clash := set(forced) & set(banned):
        raise UserError(f"--begin: holds {bytes([min(clash)])!r}, which --ban forbids")
    return Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_window=repetition_window,
        stop=tuple(unescaped("--stop", text) for text in stop),
        banned=banned,
        forced=forced,
        valid_utf8=valid_utf8,
        seed=seed,
    )
