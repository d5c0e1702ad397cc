"""What the commands of `milonga bench` do: measure with progress, print a table, write JSON, a page and a plot."""

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from milonga.bench import BenchResult, bench_decode, bench_first_use, bench_ops, bench_prefill, bench_train
from milonga.bench.ceilings import dtype_name
from milonga.bench.first_use import parse_parts
from milonga.bench.models import ON_CPU, ON_GPU, STUDY, TrainingShape, study_model, training_shape
from milonga.bench.ops import jobs_of, parse_dtype, parse_ops, parse_shape
from milonga.bench.page import check_plot, figure_table, render, write_plot
from milonga.bench.prefill import batches
from milonga.bench.result import Progress
from milonga.cli import console
from milonga.errors import UserError
from milonga.files import check_target, ensure_folder, write_atomically
from milonga.inference.language_model import choose_device
from milonga.layers.recompute import CHEAP
from milonga.models import ModelConfig
from milonga.training import RunConfig

# The paper's prompts end at 128K, its generations at 64K.
PAPER_LENGTHS = tuple(1 << power for power in range(10, 18))
SMALL_LENGTHS = (64, 256, 1024)


def command_line() -> str:
    """What was typed, as it would be typed again."""
    return shlex.join(["milonga", *sys.argv[1:]])


class Outputs(NamedTuple):
    """Where a result goes besides the terminal."""

    json: str | None  # a file, or - for stdout
    folder: str | None
    plot: str | None


def check(outputs: Outputs) -> None:
    """Raises:
    UserError: if something could not be written after minutes of measuring.
    """
    check_plot(outputs.plot)
    for path in (outputs.plot, outputs.json if outputs.json != "-" else None):
        if path is not None:
            check_target(path)
    if outputs.folder is not None:
        ensure_folder(outputs.folder)


def finish(result: BenchResult, outputs: Outputs) -> int:
    """Print the tables, or JSON, and write the files asked for; the exit code."""
    command = command_line()
    facts = result.to_json(command)
    text = json.dumps(facts, indent=2) + "\n"
    if outputs.folder is not None:
        folder = Path(outputs.folder)
        ensure_folder(folder)
        write_atomically(folder / "bench.json", text)
        write_atomically(folder / "bench.html", render(result, command))
    if outputs.plot is not None:
        write_plot(result, Path(outputs.plot))
    if outputs.json == "-":
        console.print_json(facts)
        return 0
    if outputs.json is not None:
        write_atomically(Path(outputs.json), text)
    demanded = [figure for figure in result.figures if figure.demanded is not None]
    tables = [*result.tables, *([figure_table(demanded)] if demanded else [])]
    for table in tables:
        console.stdout.print(console.table(table.title, table.headings, table.rows, right=table.right))
    for note in result.notes:
        console.stdout.print(note, markup=False)
    return 0


@contextmanager
def shown(unit: str) -> Iterator[Progress]:
    """Progress with the time left, as measurements take a callback for it."""
    with console.progress("measuring", unit=unit) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.expect(total)
            bar.update(done, what)

        yield show


def run_bench_ops(
    op: str | None,
    shape: list[str],
    dtype: str | None,
    passes: str,
    peers: bool,
    device: str | None,
    outputs: Outputs,
) -> int:
    """Measure ops.

    Raises:
        UserError: if an op, shape, dtype, pass or device is not known or not there.
    """
    ops, shapes = parse_ops(op), [parse_shape(text) for text in shape]
    place = choose_device(device)
    chosen = parse_dtype(dtype, place)
    check(outputs)
    jobs_of(ops, shapes, place, passes)  # what is wrong is said before anything is measured
    with shown("measurements") as progress:
        result = bench_ops(ops, shapes, chosen, place, passes, peers=peers, progress=progress)
    return finish(result, outputs)


# More rows, tokens or steps than any memory holds; torch knows no such sizes.
_LARGEST = 10**12


def _expect_possible(**counts: int | None) -> None:
    for option, number in counts.items():
        if number is not None and number >= _LARGEST:
            raise UserError(f"--{option}: must be below {_LARGEST}, got {number}")


class TrainChanges(NamedTuple):
    """What the command line says about the shapes it trains; None leaves a shape as it is."""

    batch: int | None
    length: int | None
    recompute: str | None
    residual: str | None
    deterministic: bool

    def apply(self, shape: TrainingShape) -> TrainingShape:
        """The shape with these changes.

        Raises:
            UserError: if a name is not known, or a size is none that a machine could have.
        """
        _expect_possible(batch=self.batch, length=self.length)
        shape = replace(shape, batch=self.batch or shape.batch, length=self.length or shape.length)
        if self.recompute is not None:
            asked = [] if self.recompute == "none" else [name.strip() for name in self.recompute.split(",")]
            unknown = [name for name in asked if name not in CHEAP]
            if unknown:
                raise UserError(f"--recompute: no result {unknown[0]!r}; choose from {', '.join(CHEAP)}, or none")
            shape = replace(shape, recompute=tuple(name for name in CHEAP if name in asked))
        if self.residual not in (None, "fp32", "bf16"):
            raise UserError(f"--residual: expected fp32 or bf16, got {self.residual!r}")
        if self.residual is not None:
            shape = replace(shape, residual=self.residual)
        return shape if self.deterministic else replace(shape, deterministic=False)


class Engine(NamedTuple):
    """What runs both passes of a step."""

    compile: bool  # torch.compile
    capture: bool  # a CUDA graph


def run_bench_train(
    presets: list[str],
    recipe: str | None,
    changes: TrainChanges,
    precision: str | None,
    engine: Engine,
    seconds: float,
    peers: bool,
    device: str | None,
    outputs: Outputs,
) -> int:
    """Measure training steps.

    Raises:
        UserError: if a model, recipe, precision or device is not known or not there.
    """
    place = choose_device(device)
    check(outputs)
    if recipe is not None and presets:
        raise UserError("give --preset or --recipe, not both")
    on_gpu = place.type == "cuda"
    if recipe is not None:
        config = RunConfig.load(recipe)
        training = config.training
        rows = training.batch // training.accumulation
        settings = (training.recompute, training.residual, training.deterministic)
        shapes = [TrainingShape(config.name, config.model, rows, training.window, *settings)]
        precision = precision or training.precision
        engine = engine._replace(capture=engine.capture and training.capture)
    else:
        shapes = [training_shape(name) for name in presets or (ON_GPU if on_gpu else ON_CPU)]
    shapes = [changes.apply(shape) for shape in shapes]
    chosen = precision or ("bf16" if on_gpu else "fp32")
    if chosen not in ("bf16", "fp32"):
        raise UserError(f"--precision: expected bf16 or fp32, got {chosen!r}")
    with shown("models") as progress:
        result = bench_train(
            shapes,
            place,
            "bf16" if chosen == "bf16" else "fp32",
            compile_=engine.compile,
            capture=engine.capture,
            budget=seconds,
            peers=peers,
            progress=progress,
        )
    return finish(result, outputs)


def parse_length(text: str, option: str = "--lengths") -> int:
    """`4096` or `4K`, K being 1024 and M 1024 times as many.

    Raises:
        UserError: if it is neither.
    """
    found = re.fullmatch(r"([0-9]{1,12})([KkMm]?)", text.strip())
    if not found or int(found[1]) < 1:
        raise UserError(f"{option}: expected lengths such as 4096 or 4K, got {text!r}")
    return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()]


def _lengths(text: str | None, default: Sequence[int]) -> list[int]:
    return sorted({parse_length(part) for part in text.split(",")}) if text is not None else list(default)


def _models(names: str | None, small: bool) -> dict[str, ModelConfig]:
    wanted = list(STUDY) if names is None else [name.strip() for name in names.split(",")]
    return {name: study_model(name, small=small) for name in dict.fromkeys(wanted)}


def run_bench_prefill(
    models: str | None,
    lengths: str | None,
    total: str | None,
    small: bool | None,
    dtype: str | None,
    device: str | None,
    outputs: Outputs,
) -> int:
    """Measure prompts.

    Raises:
        UserError: if a model, length, dtype or device is not known or not there, or a length above the total.
    """
    place = choose_device(device)
    check(outputs)
    tiny = place.type != "cuda" if small is None else small
    chosen, used = parse_dtype(dtype, place), _models(models, tiny)
    sizes = _lengths(lengths, SMALL_LENGTHS if tiny else PAPER_LENGTHS)
    usual = max(*sizes, *(SMALL_LENGTHS if tiny else PAPER_LENGTHS))
    tokens = parse_length(total, "--total") if total is not None else usual
    batches(sizes, tokens)  # what cannot be is refused before anything is shown
    with shown("measurements") as progress:
        result = bench_prefill(used, sizes, tokens, place, chosen, progress=progress)
    return finish(result, outputs)


def run_bench_decode(
    models: str | None,
    lengths: str | None,
    batch: int,
    steps: int | None,
    small: bool | None,
    dtype: str | None,
    device: str | None,
    outputs: Outputs,
) -> int:
    """Measure generating.

    Raises:
        UserError: if a model, length, dtype or device is not known or not there.
    """
    _expect_possible(batch=batch, steps=steps)
    place = choose_device(device)
    check(outputs)
    tiny = place.type != "cuda" if small is None else small
    chosen, used = parse_dtype(dtype, place), _models(models, tiny)
    sizes = _lengths(lengths, SMALL_LENGTHS if tiny else PAPER_LENGTHS[:-1])
    with shown("measurements") as progress:
        result = bench_decode(used, sizes, batch, place, chosen, steps=steps or (8 if tiny else 64), progress=progress)
    return finish(result, outputs)


def run_bench_first_use(
    what: str | None, compile_: bool, dtype: str | None, device: str | None, outputs: Outputs
) -> int:
    """Measure what compiling costs.

    Raises:
        UserError: if a part, dtype or device is not known or not there.
    """
    parts, place = parse_parts(what), choose_device(device)
    check(outputs)
    chosen = dtype_name(parse_dtype(dtype, place))
    with shown("processes") as progress:
        result = bench_first_use(parts, place, chosen, compile_=compile_, progress=progress)
    return finish(result, outputs)
