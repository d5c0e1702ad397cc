"""`milonga demo`: train, score, stream, report; each part is skipped where an earlier demo has done it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from milonga.cli import console
from milonga.cli.doctor import compile_kernels
from milonga.cli.train import ProgressBars
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.errors import UserError
from milonga.evaluation import COMMANDS, Perplexity, evaluate_perplexity, measure_throughput
from milonga.evaluation.report import (
    REPORT_HTML,
    REPORT_JSON,
    Sample,
    TrainingFacts,
    make_report,
    write_report,
)
from milonga.files import FolderLock
from milonga.inference import LanguageModel, load
from milonga.training import Interrupted, RunConfig, TrainingResult, read_metrics, stored_config, train
from milonga.training.start import RUN_FILE

RECIPE = "demo"
PROMPT = "No one would have believed in the last years of the nineteenth century that "
WRITTEN, TEMPERATURE, SEED = 500, 0.7, 0
# Bytes of the held-out text that reading and writing are timed on.
TIMED = 32768


def run_demo(out: str, again: bool, json_: bool) -> int:
    """Run the demo in the folder `out`, or what is left of it; -> the exit code.

    Raises:
        UserError: if `out` holds something else, another process writes to it, or the disk is full.
    """
    run = Path(out)
    if again:
        _remove(run)
    shown = _finished(run)
    if shown is not None:
        console.say(f"this demo is finished; to start over: {_command(run)} --again")
        if not json_:
            _show_text(shown["sample"]["prompt"])
            _show_text(shown["sample"]["text"] + "\n\n")
        return _show(shown, run, json_)
    compile_kernels()
    try:
        result, config = _train(run)
    except Interrupted as stopped:
        console.say(f"milonga: stopped and saved; {_command(run)} continues here")
        return stopped.exit_code
    lm = load(run, device="cpu" if config.training.device == "cpu" else None)
    text = _heldout(config)
    scores = _score(lm, text)
    rates = measure_throughput(lm, next(iter(text.values()))[:TIMED])
    sample = _stream(lm, silent=json_)
    facts = TrainingFacts(
        name=config.name,
        config=config.model_dump(mode="json"),
        metrics=read_metrics(run),
        seconds=result.seconds,
        bytes=result.bytes,
        window=config.training.window,
        command=_command(run),
    )
    report = make_report(lm, facts, scores, rates, sample)
    write_report(run, report)
    return _show(report.to_json(), run, json_)


def _command(run: Path) -> str:
    return "milonga demo" if run == Path("runs/demo") else f"milonga demo --out {run}"


def _remove(run: Path) -> None:
    """Remove an earlier demo at that place, and nothing else."""
    if not run.exists():
        return
    _check_name(stored_config(run), run)
    with FolderLock(run):
        shutil.rmtree(run)


def _check_name(config: RunConfig, run: Path) -> None:
    if config.name != RECIPE:
        raise UserError(f"{run} holds the run {config.name!r}, not a demo; choose another folder with --out")


def _finished(run: Path) -> dict[str, Any] | None:
    """The figures of a finished demo at that place."""
    if not (run / REPORT_JSON).is_file() or not (run / REPORT_HTML).is_file():
        return None
    try:
        figures = json.loads((run / REPORT_JSON).read_bytes())
    except ValueError as error:
        raise UserError(f"{run / REPORT_JSON} is damaged; remove it, and the demo makes it again") from error
    if not isinstance(figures, dict) or figures.get("name") != RECIPE:
        raise UserError(f"{run} holds the report of another run; choose another folder with --out")
    return figures


def _train(run: Path) -> tuple[TrainingResult, RunConfig]:
    """Train, or continue where an earlier demo stopped."""
    resume = (run / RUN_FILE).is_file()
    if resume:
        config = stored_config(run)
        _check_name(config, run)
        console.say(f"continuing the demo in {run}; to start over: {_command(run)} --again")
    else:
        config = RunConfig.load(RECIPE)
    bars = ProgressBars()
    try:
        result = train(config, run, resume=resume, progress=bars)
    finally:
        bars.close()
    return result, stored_config(run)


def _heldout(config: RunConfig) -> dict[str, bytes]:
    """The held-out documents, by name."""
    heldout = config.data.heldout
    if isinstance(heldout, float) or not heldout:
        raise UserError("the recipe holds out no document of its own to score (data.heldout)")
    reading = Reading(config.data.text_field, lambda _: None, lambda _: None)
    return {name: b"".join(pieces) for name, pieces in read_documents(find_sources(heldout), reading)}


def _score(lm: LanguageModel, documents: Mapping[str, bytes]) -> Perplexity:
    total = sum(len(text) for text in documents.values())
    with console.progress("scoring a book it has never seen", total, "bytes") as bar:
        pieces = ((name, [text]) for name, text in documents.items())
        return evaluate_perplexity(lm, pieces, progress=lambda done, bits: bar.update(done, f"{bits:.3f} bits/byte"))


def _stream(lm: LanguageModel, *, silent: bool) -> Sample:
    """Let the model write, on stdout as it does."""
    session = lm.session()
    session.feed(PROMPT)
    if not silent:
        _show_text(PROMPT)
    pieces = []
    for piece in session.generate(WRITTEN, temperature=TEMPERATURE, seed=SEED):
        pieces.append(piece)
        if not silent:
            _show_text(piece)
    if not silent:
        _show_text("\n\n")
    return Sample(PROMPT, "".join(pieces), f"temperature {TEMPERATURE}, seed {SEED}")


def _show_text(text: str) -> None:
    """Text as the model writes it."""
    console.stdout.print(Text(console.harmless(text)), end="", soft_wrap=True)


def _show(figures: Mapping[str, Any], run: Path, json_: bool) -> int:
    """The closing table and the report's place; or the figures as JSON."""
    page = run / REPORT_HTML
    if json_:
        console.print_json(dict(figures) | {"report": str(page)})
        return 0
    rows = [("bits per byte, held-out book", f"{figures['bits_per_byte']:.3f}")]
    rows += [
        (f"bits per byte, {command}", f"{figures[f'{name}_bits_per_byte']:.3f}") for name, command in COMMANDS.items()
    ]
    rows += [
        (
            f"after {console.count(bucket['start'])} to {console.count(bucket['bytes'])} bytes",
            f"{bucket['bits_per_byte']:.3f}",
        )
        for bucket in figures["context"]
    ]
    cache = figures["transformer_cache_bytes"]
    rows += [
        ("parameters", console.count(figures["parameters"])),
        ("training", f"{console.duration(figures['train_seconds'])}, {console.count(figures['train_steps'])} steps"),
        ("training speed", f"{console.count(figures['bytes_per_second'])} bytes/s"),
        ("reading", f"{console.count(figures['feed_bytes_per_second'])} bytes/s"),
        ("writing", f"{console.count(figures['generate_bytes_per_second'])} bytes/s"),
        ("state, at any length of text", console.size(figures["state_bytes"])),
        (f"a Transformer's cache after {console.count(figures['heldout_bytes'])} bytes", console.size(cache)),
    ]
    console.stdout.print(console.table("The demo", ("what", "figure"), rows, right=(1,)))
    console.stdout.print(Text(f"report: {page}"))
    return 0
