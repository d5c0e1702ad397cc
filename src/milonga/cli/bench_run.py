"""What the commands of `milonga bench` do: measure with progress, print a table, write JSON, a page and a plot."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from milonga.bench import BenchResult, bench_ops
from milonga.bench.ops import parse_dtype, parse_ops, parse_shape
from milonga.bench.page import check_plot, figure_table, render, write_plot
from milonga.bench.result import Progress
from milonga.cli import console
from milonga.files import ensure_folder, write_atomically
from milonga.inference.language_model import choose_device


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
    json_: str | None,
    out: str | None,
    plot: str | None,
) -> int:
    """Measure ops.

    Raises:
        UserError: if an op, shape, dtype, pass or device is not known or not there.
    """
    ops, shapes = parse_ops(op), [parse_shape(text) for text in shape]
    place = choose_device(device)
    chosen = parse_dtype(dtype, place)
    outputs = Outputs(json_, out, plot)
    check(outputs)
    with shown("measurements") as progress:
        result = bench_ops(ops, shapes, chosen, place, passes, peers=peers, progress=progress)
    return finish(result, outputs)
