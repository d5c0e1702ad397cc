"""`milonga train`: from a recipe to a run, with a bar on stderr and a table at the end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from milonga.cli import console
from milonga.data.bpe import load_tokenizer
from milonga.data.corpus import Corpus
from milonga.errors import UserError
from milonga.training import Interrupted, Progress, RunConfig, TrainingResult, stored_config, train
from milonga.training.config import expand_preset, read_recipe, set_key
from milonga.training.start import DATA, RUN_FILE

# Files without text that are named, at most.
_NAMED = 5
_UNITS = {"reading": "bytes"}
_WORDS = {"reading": "reading text", "timing": "timing a few steps", "training": "training"}


class ProgressBars:
    """Shows `Progress` reports on stderr: a bar for each stretch of work, its figures beside it."""

    def __init__(self) -> None:
        self._bar: console.Bar | None = None
        self._what: tuple[str, int | None] = ("", None)

    def __call__(self, report: Progress) -> None:
        """The callback for `milonga.training.train`."""
        if report.left_out:
            self.close()
            names = ", ".join(report.left_out[:_NAMED]) + (", ..." if len(report.left_out) > _NAMED else "")
            console.say(f"left out, for they hold no text: {names}")
            return
        what = _WORDS.get(report.phase, "training")  # evaluating and saving happen inside the bar of the training
        if (what, report.total) != self._what:
            self.close()
            start = report.done if what == "training" else 0
            unit = _UNITS.get(report.phase, "steps")
            self._bar = console.progress(what, report.total, unit, start=start).__enter__()
            self._what = (what, report.total)
        if self._bar is not None:
            self._bar.update(report.done, _figures(report))

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar, self._what = None, ("", None)


def _figures(report: Progress) -> str:
    parts = []
    if report.bits_per_byte is not None:
        parts.append(f"{report.bits_per_byte:.3f} bits/byte")
    if report.bytes_per_second is not None:
        parts.append(f"{console.count(report.bytes_per_second)} bytes/s")
    if report.phase in ("evaluating", "saving"):
        parts.append(report.phase)
    if report.phase == "compiling":
        parts.append("first step: compiling kernels that are new here")
    if report.phase == "capturing":
        parts.append("capturing a step to replay it")
    return ", ".join(parts)


def run_train(
    recipe: str | None,
    set_: list[str],
    data: str | None,
    out: str | None,
    resume: str | None,
    device: str | None,
    json_: bool,
) -> int:
    """Train by a recipe, or continue a run; -> the exit code. The run's folder, a table or JSON goes to stdout.

    Raises:
        UserError: as `milonga.training.train`, and for options that exclude each other.
    """
    if resume is not None:
        if data is not None or out is not None:
            raise UserError("--resume continues a run where it is, with its text: leave out --data and --out")
        config, folder = _continued(resume, set_), Path(resume)
    else:
        assert recipe is not None, "the command line demands one of the two"
        config, folder = _new(recipe, set_, data, out)
    return run_and_show(config, folder, resume=resume is not None, device=device, json_=json_)


def run_and_show(config: RunConfig, folder: Path, *, resume: bool, device: str | None, json_: bool) -> int:
    """Train with progress on stderr and show the result; 130 or 143 where a signal stopped it."""
    bars = ProgressBars()
    try:
        result = train(config, folder, resume=resume, progress=bars, device=device)
    except Interrupted as stopped:
        bars.close()
        console.say(f"milonga: {stopped}")
        return stopped.exit_code
    finally:
        bars.close()
    if json_:
        console.print_json({key: str(v) if isinstance(v, Path) else v for key, v in asdict(result).items()})
    else:
        console.stdout.print(_table(config, result))
    return 0


def _continued(resume: str, set_: list[str]) -> RunConfig:
    """The run's own config, with changes."""
    stored_config(resume)
    return RunConfig.load(Path(resume) / RUN_FILE, set_)


def _new(recipe: str, set_: list[str], data: str | None, out: str | None) -> tuple[RunConfig, Path]:
    settings = read_recipe(recipe)
    expand_preset(settings)
    folder = Path(out) if out is not None else Path("runs") / str(settings.get("name") or Path(recipe).stem)
    if data is not None:
        _point_at(settings, data)
    for change in set_:
        set_key(settings, change)
    expand_preset(settings)
    section = settings.get("data") or {}
    if isinstance(section, dict) and not section.get("paths"):
        raise UserError(f"{recipe}: names no text to train on: give a file, a folder or a glob with --data PATH")
    config = RunConfig.parse(settings, recipe)
    return (_with_tail(config, folder) if data is not None else config), folder


def _point_at(settings: dict[str, Any], path: str) -> None:
    """Train on `path` instead. A part of it is held out, unless the recipe says which part by a fraction."""
    section = dict(settings.get("data") or {})
    if not isinstance(section.get("heldout"), float):
        section.pop("heldout", None)
    settings["data"] = section | {"paths": [path]}


def _with_tail(config: RunConfig, folder: Path) -> RunConfig:
    """For a text that is a single document, a config that holds out its end: there is nothing else to hold out."""
    data = config.data
    if not isinstance(data.heldout, float) or data.heldout_tail:
        return config
    if (folder / RUN_FILE).exists():  # which training will refuse, and name what differs: this does not
        tail = stored_config(folder).data.heldout_tail
        return config.model_copy(update={"data": data.model_copy(update={"heldout_tail": tail})})
    with console.progress("reading text", unit="bytes") as bar:
        corpus = Corpus.build(
            data.paths,
            folder / DATA / "train",
            text_field=data.text_field,
            codec=load_tokenizer(Path(data.tokenizer).expanduser()) if data.tokenizer is not None else None,
            progress=lambda done, total: bar.update(done, f"of {console.count(total)}" if total else ""),
        )
    if corpus.documents > 1:
        return config
    console.say(f"one document: its last {data.heldout:.0%} is held out (data.heldout, data.heldout_tail)")
    return config.model_copy(update={"data": data.model_copy(update={"heldout_tail": True})})


def _table(config: RunConfig, result: TrainingResult) -> object:
    def bits(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.3f} bits per byte"

    rows = [
        ("run", result.run),
        ("checkpoint", result.checkpoint.name),
        ("parameters", console.count(result.parameters)),
        ("steps", console.count(result.step)),
        ("text read", f"{console.count(result.bytes)} bytes"),
        ("time", f"{console.duration(result.seconds)} ({console.count(result.bytes_per_second)} bytes/s)"),
        ("training text", bits(result.train_bits_per_byte)),
        ("held-out text", bits(result.bits_per_byte)),
    ]
    return console.table(f"Trained {config.name}", ["what", "figure"], rows)
