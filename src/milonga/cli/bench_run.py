"""What the commands of `milonga bench` do: measure with progress, print a table, write JSON, a page and a plot."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from milonga.bench import BenchResult, Figure, bench_ops, number
from milonga.bench.ops import parse_dtype, parse_ops, parse_shape
from milonga.cli import console
from milonga.files import write_atomically
from milonga.inference.language_model import choose_device


def command_line() -> str:
    """What was typed, as it would be typed again."""
    return shlex.join(["milonga", *sys.argv[1:]])


def finish(result: BenchResult, tables: Sequence[object], json_: str | None) -> int:
    """Print the result, or write it; the exit code."""
    if json_ is not None and json_ != "-":
        write_atomically(Path(json_), json.dumps(result.to_json(command_line()), indent=2) + "\n")
    if json_ == "-":
        console.print_json(result.to_json(command_line()))
        return 0
    for table in tables:
        console.stdout.print(table)
    for note in result.notes:
        console.stdout.print(note, markup=False)
    return 0


def verdict(figure: Figure) -> str:
    """`at most 0.75 (aim 0.6): ok`; empty where nothing is demanded."""
    if figure.demanded is None:
        return ""
    aim = f" (aim {number(figure.aim)})" if figure.aim is not None else ""
    return f"{'at least' if figure.at_least else 'at most'} {number(figure.demanded)}{aim}: {_met(figure)}"


def _met(figure: Figure) -> str:
    return "ok" if figure.met else "MISSED"


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
    with console.progress("measuring", unit="measurements") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.update(done, what)

        result = bench_ops(ops, shapes, chosen, place, passes, peers=peers, progress=show)
    return finish(result, [_op_table(result)], json_)


def _op_table(result: BenchResult) -> object:
    rows = []
    for row in result.rows:
        shape = row["shape"]
        assert isinstance(shape, dict)
        what = f"{row['op']} " + " ".join(f"{letter}{count}" for letter, count in shape.items())
        passes = "both" if row["pass"] == "both" else "forward"
        who = row["who"] if row["backend"] is None else f"{row['who']} ({row['backend']})"
        if row["failed"] is not None:
            rows.append((what, passes, who, "-", "", "", str(row["failed"])))
            continue
        rows.append(
            (
                what,
                passes,
                who,
                f"{row['ms']:.3g}",
                f"{row['floor_ms']:.3g} {row['bound']}",
                f"{row['fraction']:.0%}",
                "" if row["backend"] is not None else f"{row['times_ours']:.2f}x ours",
            )
        )
    headings = ("op", "pass", "who", "ms", "floor", "reached", "")
    return console.table(
        f"Ops in {result.settings['dtype']} on {result.settings['device']}", headings, rows, right=(3, 5)
    )
