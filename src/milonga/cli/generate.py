"""`milonga generate`: a continuation of a prompt, on stdout as it is written."""

import sys
from collections.abc import Iterator
from typing import cast

from milonga.cli import console
from milonga.cli.speculation import CONTEXT, Speculation, decoder_of, speculation_facts, speculation_line
from milonga.errors import UserError
from milonga.files import check_target
from milonga.inference import Generation, LanguageModel, Sampling, Session, SpeculativeDecoder, load
from milonga.layers.linear import STORAGES, Storage

_BLOCK = 1 << 16


def run_generate(
    run: str,
    prompt: str,
    bytes_: int,
    sampling: Sampling,
    device: str | None,
    json_: bool,
    *,
    state: str | None = None,
    save: str | None = None,
    logprobs: int | None = None,
    speculation: Speculation | None = None,
    dtype: str | None = None,
    weights: str | None = None,
) -> int:
    """Feed the prompt and write what follows: the text alone (on a terminal without control characters, and a line on
    where the session stands, and one on what was drafted), or one JSON object. Interrupted, it saves what it wrote.

    A prompt of `-` is read from stdin, any bytes of any length; without a prompt a fresh text begins after a line
    break.

    Args:
        run: where the model is.
        prompt: the text to continue.
        bytes_: to write, at most.
        sampling: how to draw.
        device: `cpu`, `cuda`, `cuda:N` or None.
        json_: print one JSON object instead.
        state: a state file to go on from.
        save: where to save the state afterwards.
        logprobs: with `json_`, also the log-probabilities and so many alternatives.
        speculation: what drafts, and which rule accepts; None for plain decoding.
        dtype, weights: of the model, as for `milonga.load`.

    Raises:
        UserError: if there is no model at `run`, the prompt is not UTF-8, a setting is out of range, or a state file
            cannot be read or written.
    """
    _expect_logprobs(logprobs, json_, speculation)
    if save is not None:
        check_target(save)  # not once the text is written
    lm = load(run, device=device, dtype=dtype, weights=storage_of(weights))
    warm_up(lm)
    decoder = None if speculation is None else decoder_of(lm, speculation)
    session = lm.session(state)
    before, known = session.bytes_read, lm.codec.decode(session.mark().recent)
    context = _read(lm, session, _prompt(prompt, fresh=state is None))
    read = session.bytes_read - before
    generation: Generation[str]
    if decoder is None:
        generation = session.generate(bytes_, sampling, logprobs=logprobs)
    else:
        generation = decoder.generate(session, bytes_, sampling, context=known + context)
    generation.most_bytes = bytes_  # of subwords `generate` counts tokens
    try:
        if json_:
            text = _whole(generation, bytes_)
            console.print_json(_facts(session, generation, decoder, text, read))
        else:
            _stream(session, generation, decoder)
    finally:  # where it is interrupted too, what was written is kept
        generation.close()
        if save is not None:
            session.save(save)
    return 0


def _expect_logprobs(logprobs: int | None, json_: bool, speculation: Speculation | None) -> None:
    if logprobs is not None and not json_:
        raise UserError("--logprobs: are part of the JSON; give --json too")
    if logprobs is not None and speculation is not None:
        raise UserError("--logprobs: are not known of drafted bytes; leave --drafter out")


def storage_of(weights: str | None) -> Storage | None:
    """What `--weights` says.

    Raises:
        UserError: if there is no such storage.
    """
    if weights is not None and weights not in STORAGES:
        raise UserError(f"--weights: must be one of {', '.join(STORAGES)}, got '{weights}'")
    return cast("Storage | None", weights)


def warm_up(lm: LanguageModel) -> None:
    """Before the text begins, so that its rate is that of the writing. On a CPU load the kernels of a step; on a GPU
    compile what is new there and capture a step, with a line that says so."""
    if lm.device.type != "cuda":
        list(lm.session().generate_bytes(2))
        return
    with console.progress("preparing the GPU (kernels that are new here are compiled)", 2, "steps") as bar:
        session = lm.session()
        session.feed(b"a text to warm up with")
        bar.update(1)
        list(session.generate_bytes(2))
        bar.update(2)


def _stream(session: Session, generation: Generation[str], decoder: SpeculativeDecoder | None) -> None:
    """As it is written; on a terminal with a line on where the session stands then, and one on what was drafted."""
    terminal = sys.stdout.isatty()
    for piece in generation:
        sys.stdout.write(console.harmless(piece) if terminal else piece)
        sys.stdout.flush()
    if terminal:
        sys.stdout.write("\n")
        if sys.stderr.isatty():
            console.standing(session.bytes_read, generation.bytes_per_second, session.nbytes)
            if decoder is not None:
                console.aside(speculation_line(decoder, session))


def _whole(generation: Generation[str], bytes_: int) -> str:
    """All of it at once, showing how far it is where that takes long."""
    pieces = []
    with console.late_progress("writing", bytes_, "bytes") as bar:
        for piece in generation:
            pieces.append(piece)
            bar.update(generation.bytes)
    return "".join(pieces)


def _facts(
    session: Session, generation: Generation[str], decoder: SpeculativeDecoder | None, text: str, read: int
) -> dict[str, object]:
    facts: dict[str, object] = {
        "text": text,
        "bytes": generation.bytes,
        "tokens": generation.tokens,
        "prompt_bytes": read,
        "position_bytes": session.bytes_read,
        "stop_reason": generation.stop_reason,
        "stop": generation.stop.decode(errors="backslashreplace") if generation.stop is not None else None,
        "seed": generation.seed,
        "bytes_per_second": generation.bytes_per_second,
        "state_bytes": session.nbytes,
    }
    if generation.logprobs:
        facts["log2_probabilities"] = [
            {
                "token": list(entry.token),
                "log2": entry.log2,
                "alternatives": [{"token": list(token), "log2": log2} for token, log2 in entry.alternatives],
            }
            for entry in generation.logprobs
        ]
    if decoder is not None:
        facts["speculation"] = speculation_facts(decoder, session)
    return facts


def _read(lm: LanguageModel, session: Session, prompt: Iterator[bytes]) -> bytes:
    """Feed a prompt of any length, showing how far it has been read where that takes long: -> its last bytes."""
    read, last = 0, b""
    with console.late_progress("reading", unit="bytes") as bar:
        for part in lm.codec.cut(prompt, _BLOCK):

            def show(done: int, before: int = read) -> None:
                bar.update(before + done)

            session.feed(part, progress=show)
            read, last = read + len(part), (last + part)[-CONTEXT:]
    return last


def _prompt(prompt: str, *, fresh: bool) -> Iterator[bytes]:
    if prompt == "-":
        yield from iter(lambda: sys.stdin.buffer.read(_BLOCK), b"")
        return
    try:
        yield (prompt or ("\n" if fresh else "")).encode()
    except UnicodeEncodeError as error:
        # what the shell gave and Python could not decode comes as lone surrogates
        raise UserError(
            f"--prompt: character {error.start + 1} is not valid UTF-8; to continue raw bytes, give them on stdin "
            "with --prompt -"
        ) from error
