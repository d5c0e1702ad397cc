"""`milonga generate`: a continuation of a prompt, on stdout as it is written."""

import sys
import time
from collections.abc import Iterator

from milonga.cli import console
from milonga.errors import UserError
from milonga.inference import load

_BLOCK = 1 << 16


def run_generate(
    run: str,
    prompt: str,
    bytes_: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str | None,
    json_: bool,
) -> int:
    """Feed the prompt and write what follows: the text alone (on a terminal without control characters), or one JSON
    object.

    A prompt of `-` is read from stdin, any bytes of any length; without a prompt the text begins after a line break.

    Raises:
        UserError: if there is no model at `run`, the prompt is not UTF-8, or a setting is out of range.
    """
    session = load(run, device=device).session()
    for piece in _prompt(prompt):
        session.feed(piece)
    read, began = session.position, time.monotonic()
    pieces = session.generate(bytes_, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if json_:
        text = "".join(pieces)
        seconds = time.monotonic() - began
        console.print_json(
            {
                "text": text,
                "bytes": session.position - read,
                "prompt_bytes": read,
                "seed": seed,
                "bytes_per_second": (session.position - read) / seconds if seconds > 0 else None,
                "state_bytes": session.nbytes,
            }
        )
        return 0
    terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(console.harmless(piece) if terminal else piece)
        sys.stdout.flush()
    if terminal:
        sys.stdout.write("\n")
    return 0


def _prompt(prompt: str) -> Iterator[bytes]:
    if prompt == "-":
        yield from iter(lambda: sys.stdin.buffer.read(_BLOCK), b"")
        return
    try:
        yield (prompt or "\n").encode()
    except UnicodeEncodeError as error:
        # what the shell gave and Python could not decode comes as lone surrogates
        raise UserError(
            f"--prompt: character {error.start + 1} is not valid UTF-8; to continue raw bytes, give them on stdin "
            "with --prompt -"
        ) from error
