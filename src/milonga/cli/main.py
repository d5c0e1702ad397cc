"""The command `milonga`: every command's options are declared here, and its work is imported when it runs.

A command is a function here that only imports what it needs once it is called, so that `milonga --help` and
`milonga train --help` load neither torch nor numba nor pydantic::

    @app.command()
    def train(recipe: Annotated[str, typer.Argument(...)], ...) -> None:
        from milonga.cli.train import run_train

        _finish(run_train(recipe, ...))

To add one: write `cli/<command>.py` with a plain function `run_<command>(...) -> int` that takes the options and gives
the exit code, and declare it here with an example. That file prints its result with `console.stdout` or
`console.print_json` and shows progress on `console.stderr` (`console.progress`).

`main` is the one place that turns an error into a line: `UserError`, pydantic's `ValidationError`, a wrong option and
what the file system refuses give `milonga: ...` and exit code 2; Ctrl-C gives 130; a reader that has gone (`| head`)
ends quietly. Anything else is a fault of ours and keeps its traceback.
"""

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from milonga import __version__
from milonga.cli import bench
from milonga.cli.options import (
    Ban,
    Begin,
    Device,
    Draft,
    Drafter,
    Dtype,
    HeldoutTexts,
    Json,
    LearnFrom,
    Load,
    Logprobs,
    MinP,
    RepetitionPenalty,
    RepetitionWindow,
    Rule,
    Run,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    Weights,
)
from milonga.cli.refusals import REFUSALS


def _example(command: str) -> str:
    return f"\b\nExample:\n  {command}"  # \b: not to be rewrapped


app = typer.Typer(
    name="milonga",
    help="Language models whose memory does not grow with the text they read: train, evaluate, stream.",
    epilog="Start with: milonga demo",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(
    help="What a trained model can do, as numbers.",
    epilog=_example("milonga evaluate perplexity runs/demo my-book.txt"),
    rich_markup_mode=None,
)
app.add_typer(evaluate, name="evaluate")
tokenizer = typer.Typer(
    help="Learn a vocabulary of subwords, or look at one.",
    epilog=_example("milonga tokenizer train --data my-texts/ --vocab-size 4096 --out tokenizer.json"),
    rich_markup_mode=None,
)
app.add_typer(tokenizer, name="tokenizer")
app.add_typer(bench.app, name="bench")

# The base of all mistakes in options. Typer exports only this descendant, and from another package in each version.
_UsageError = typer.BadParameter.__mro__[1]


def _finish(code: int) -> NoReturn:
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"milonga {__version__}")
        raise typer.Exit


@app.callback()
def _milonga(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(short_help="Train, score and stream a small model.", epilog=_example("milonga demo"))
def demo(
    out: Annotated[str, typer.Option(help="The run's folder.", metavar="FOLDER")] = "runs/demo",
    again: Annotated[
        bool, typer.Option("--again", help="Remove an earlier demo at that place and start over.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train a small byte-level Samba on bundled novels, score it, let it write, and report.

    A demo that was interrupted goes on where it stopped; a finished one is shown again.
    """
    from milonga.cli.demo import run_demo

    _finish(run_demo(out, again, json_))


@app.command(
    short_help="Train a model by a recipe, or continue a run.",
    epilog=_example("milonga train demo --data my-texts/ --set training.steps=500 --out runs/mine"),
)
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A packaged recipe's name or a YAML file.", metavar="RECIPE")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting of the recipe; may be repeated.", metavar="KEY.PATH=VALUE"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Train on this file, folder or glob of texts.", metavar="PATH")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The new run's folder. [default: runs/ and the recipe's name]", metavar="FOLDER")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue this run from its last checkpoint.", metavar="RUN")
    ] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Train a model by a recipe. Ctrl-C saves a checkpoint before leaving; --resume RUN continues exactly there."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("give a RECIPE to train, or --resume RUN to continue one, not both or neither")
    from milonga.cli.train import run_train

    _finish(run_train(recipe, set_ or [], data, out, resume, device, json_))


@app.command(
    short_help="Stream a continuation of a prompt.",
    epilog=_example('milonga generate runs/demo --prompt "It was the best of times" --bytes 500'),
)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.", metavar="TEXT")] = "",
    bytes_: Annotated[int, typer.Option("--bytes", help="Bytes to write.", min=0, metavar="N")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    repetition_window: RepetitionWindow = 64,
    stop: Stop = None,
    ban: Ban = "",
    begin: Begin = "",
    utf8: Annotated[bool, typer.Option("--valid-utf8", help="Write nothing but valid UTF-8.")] = False,
    seed: Seed = 0,
    load: Load = None,
    save: Annotated[str | None, typer.Option(help="Save the state afterwards.", metavar="FILE")] = None,
    logprobs: Logprobs = None,
    drafter: Drafter = None,
    rule: Rule = None,
    draft: Draft = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    json_: Json = False,
) -> None:
    """Stream a continuation of a prompt to stdout, in constant memory."""
    from milonga.cli.generate import run_generate
    from milonga.cli.sampling_options import sampling_of
    from milonga.cli.speculation import speculation_of

    sampling = sampling_of(
        temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, stop or [], ban, begin, utf8, seed
    )
    asked = speculation_of(drafter, rule, draft)
    named = {"state": load, "save": save, "dtype": dtype, "weights": weights}
    _finish(run_generate(run, prompt, bytes_, sampling, device, json_, **named, logprobs=logprobs, speculation=asked))


@app.command(short_help="A session in the terminal.", epilog=_example("milonga chat runs/demo"))
def chat(
    run: Run,
    bytes_: Annotated[int, typer.Option("--bytes", help="Bytes of a reply, at most.", min=1, metavar="N")] = 400,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    repetition_window: RepetitionWindow = 64,
    stop: Stop = None,
    ban: Ban = "",
    begin: Begin = "",
    any_bytes: Annotated[bool, typer.Option("--any-bytes", help="Write bytes that are not UTF-8 too.")] = False,
    seed: Seed = 0,
    load: Load = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
) -> None:
    """Write to a model and read what it makes of it; save, load, fork and rewind the session on the way.

    A reply ends before an empty line, if no --stop says otherwise.
    """
    from milonga.cli.chat import run_chat
    from milonga.cli.sampling_options import sampling_of

    stop = [r"\n\n"] if stop is None else stop
    sampling = sampling_of(
        temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, stop, ban, begin, not any_bytes, seed
    )
    _finish(run_chat(run, bytes_, sampling, load, device, dtype, weights))


@evaluate.command(
    short_help="Bits per byte of texts.",
    epilog=_example("milonga evaluate perplexity runs/demo my-book.txt other-books/"),
)
def perplexity(
    run: Run,
    files: Annotated[list[str], typer.Argument(help="Texts: files, folders or globs.", metavar="FILES...")],
    device: Device = None,
    json_: Json = False,
) -> None:
    """Bits per byte of texts streamed at constant memory: by position, and beside gzip, bz2 and xz."""
    from milonga.cli.evaluate import run_evaluate_perplexity

    _finish(run_evaluate_perplexity(run, files, device, json_))


@evaluate.callback()
def _evaluate() -> None:
    pass


@tokenizer.command(
    name="train",
    short_help="Learn byte-pair encoding from texts.",
    epilog=_example("milonga tokenizer train --data my-texts/ --vocab-size 4096 --out tokenizer.json"),
)
def tokenizer_train(
    data: LearnFrom,
    out: Annotated[str, typer.Option(help="The file to write.", metavar="FILE")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes included.", metavar="N")] = 4096,
    heldout: HeldoutTexts = None,
    seed: Annotated[int, typer.Option(help="Chooses what is held out, as training.seed does.")] = 0,
    text_field: Annotated[str, typer.Option(help="The field of .jsonl and .parquet files.", metavar="NAME")] = "text",
    json_: Json = False,
) -> None:
    """Learn byte-level byte-pair encoding from texts; whatever bytes it is given, it gives them back."""
    from milonga.cli.tokenizer import run_tokenizer_train

    _finish(run_tokenizer_train(data, vocab_size, out, heldout or [], seed, text_field, json_))


@tokenizer.command(
    name="inspect",
    short_help="Show what a tokenizer holds.",
    epilog=_example('milonga tokenizer inspect tokenizer.json --text "It was the best of times"'),
)
def tokenizer_inspect(
    file: Annotated[str, typer.Argument(help="A tokenizer.json.", metavar="FILE")],
    text: Annotated[str | None, typer.Option("--text", help="Also show how this text is cut.", metavar="TEXT")] = None,
    json_: Json = False,
) -> None:
    """Size, digest, lengths and some tokens of a tokenizer, and how it cuts a text."""
    from milonga.cli.tokenizer import run_tokenizer_inspect

    _finish(run_tokenizer_inspect(file, text, json_))


@app.command(short_help="List the named models and their sizes.", epilog=_example("milonga presets --json"))
def presets(json_: Json = False) -> None:
    """Every named model: parameters, layers, width and the size of its state."""
    from milonga.cli.presets import run_presets

    _finish(run_presets(json_))


@app.command(short_help="Check this installation.", epilog=_example("milonga doctor"))
def doctor(
    compile_: Annotated[
        bool, typer.Option("--compile", help="Only compile the CPU kernels, once per install.")
    ] = False,
    json_: Json = False,
) -> None:
    """Versions, devices, the backend of each op, and a self-test of each against its definition in float64."""
    from milonga.cli.doctor import run_doctor

    _finish(run_doctor(compile_, json_))


def _usage_line(error: Exception) -> str:
    """One line for a mistake in the options, with where to look."""
    values = vars(error)
    context = values.get("ctx")
    where = context.command_path if context is not None else "milonga"
    text = error.format_message() if isinstance(error, _UsageError) else str(error)
    return f"{' '.join(text.split()).rstrip('.')} (see {where} --help)"


def _user_line(error: Exception) -> str | None:
    """The line for an error the user can mend; None for a fault of ours."""
    if isinstance(error, OSError):
        reason = REFUSALS.get(error.errno or 0)
        return f"{error.filename or 'writing the output'}: {reason}" if reason else None
    from pydantic import ValidationError

    from milonga.errors import UserError, describe_validation

    if isinstance(error, UserError):
        return str(error)
    return describe_validation(error) if isinstance(error, ValidationError) else None


def _leave_quietly() -> int:
    """The reader of stdout has gone: point it elsewhere, so that the interpreter's last flush meets no broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _complain(line: str) -> int:
    print(f"milonga: {' '.join(line.split())}", file=sys.stderr)
    return 2


def run(arguments: list[str]) -> int:
    """Run one command line and give its exit code. Errors of the user become a line on stderr."""
    try:
        # not `app()`: Typer would turn interrupts, broken pipes and wrong options into its own exits
        command = typer.main.get_command(app)
        with command.make_context("milonga", arguments or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as leaving:
        return _flushed(leaving.exit_code)
    except BrokenPipeError:
        return _leave_quietly()
    except (KeyboardInterrupt, typer.Abort):
        print("\nmilonga: interrupted" if sys.stderr.isatty() else "milonga: interrupted", file=sys.stderr)
        return 130
    except _UsageError as error:
        return _complain(_usage_line(error))
    except Exception as error:
        line = _user_line(error)
        if line is None:
            raise
        return _complain(line)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_quietly()
    return code


def main() -> None:
    """The entry point of the console script."""
    # Before torch loads its OpenMP. Its idle threads would spin for milliseconds after every product, on the cores that
    # the Numba kernels run on; asleep they cost microseconds (two busy cores: training steps 3 to 4 times as fast).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Where colorama is installed, Numba would end what we show on a terminal with a control sequence.
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 gets escapes, not a traceback
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
