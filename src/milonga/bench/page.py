"""A measurement as one HTML page that needs nothing but itself, and its plot as a file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib as mpl

from milonga.bench.figures import Figure, number
from milonga.bench.plots import draw, svg
from milonga.bench.result import BenchResult, Table
from milonga.errors import UserError
from milonga.evaluation import report_page as html
from milonga.evaluation.drawing import PAPER, save_picture, style

PLOT_FORMATS = (".png", ".svg")
_TITLES = {
    "ops": "Every op beside its floor",
    "train": "Training",
    "prefill": "Reading prompts",
    "decode": "Generating",
    "first-use": "First use",
}


def render(result: BenchResult, command: str) -> str:
    """The page."""
    machine = result.machine
    where = machine.gpu or f"{machine.cpu}, {machine.threads} threads"
    cards = [html.Card(plot.title, "", svg(plot, f"plot{index}"), wide=True) for index, plot in enumerate(result.plots)]
    cards += [html.Card(table.title, "", _table(table), wide=True) for table in result.tables]
    cards.append(html.Card("Figures", "", _table(figure_table(result.figures)), wide=True))
    if result.notes:
        notes = "".join(f"<p>{escape(note)}</p>" for note in result.notes)
        cards.append(html.Card("Notes", "", notes, wide=True))
    cards.append(html.Card("What the machine can do, measured in this run", "", html.facts(_ceilings(result))))
    facts = {"Processor": f"{machine.cpu}, {machine.cores} cores, threads used: {machine.threads}"}
    facts |= {"GPU": machine.gpu or "none", "System": machine.system, "Python": machine.python} | machine.packages
    cards.append(html.Card("The machine", "", html.facts(facts)))
    return html.page(
        title=_TITLES[result.kind],
        over="Milonga · bench",
        lead=f"Measured on {where}, {result.date:%d %B %Y}; medians.",
        headline="",
        cards=cards,
        footer=f"Made by <code>{escape(command)}</code> on {result.date:%d %B %Y at %H:%M}. "
        "The figures are in <code>bench.json</code> beside this page.",
    )


def _table(table: Table) -> str:
    return html.table(table.headings, table.rows, right=table.right, own=table.own)


def figure_table(figures: Sequence[Figure]) -> Table:
    """What was measured beside what was demanded."""
    rows = []
    for figure in figures:
        side = "at least" if figure.at_least else "at most"
        demanded = "" if figure.demanded is None else f"{side} {number(figure.demanded)}"
        aim = "" if figure.aim is None else number(figure.aim)
        verdict = "" if figure.demanded is None else "ok" if figure.met else "MISSED"
        rows.append((figure.what, f"{number(figure.measured)} {figure.unit}".strip(), demanded, aim, verdict))
    return Table("Figures", ("what", "measured", "demanded", "aim", ""), rows, right=(1,))


def _ceilings(result: BenchResult) -> dict[str, str]:
    shown: dict[str, str] = {}
    for size, rate in result.ceilings.get("copy_bytes_per_second", {}).items():
        shown[f"Copy of {int(size) / 2**20:g} MiB"] = f"{rate / 1e9:,.0f} GB/s, read and written"
    for name, rate in result.ceilings.get("product_flops_per_second", {}).items():
        shown[f"Matrix products, {name}"] = f"{rate / 1e12:,.3g} TFLOP/s"
    if result.ceilings.get("exps_per_second"):
        shown["Exponentials"] = f"{result.ceilings['exps_per_second'] / 1e12:.3g} e12/s"
    return shown


def check_plot(path: str | None) -> None:
    """Raises:
    UserError: if a plot cannot be written in the format that the name asks for.
    """
    if path is not None and Path(path).suffix not in PLOT_FORMATS:
        raise UserError(f"--plot: the name must end in {' or '.join(PLOT_FORMATS)}, got {path!r}")


def write_plot(result: BenchResult, path: Path) -> None:
    """The first plot as a file.

    Raises:
        UserError: if nothing was measured that could be drawn.
    """
    if not result.plots:
        raise UserError("--plot: nothing was measured that could be drawn")
    with mpl.rc_context(style(PAPER)):
        save_picture(draw(result.plots[0], PAPER), path)
