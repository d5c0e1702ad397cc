"""What every picture is drawn with: SVG that takes its colours and its typeface from the page it stands in."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """The colours of a picture."""

    ink: str
    muted: str
    grid: str
    model: str
    second: str
    other: str


# Colours that stand for the page's: each is replaced by a CSS variable, so that a dark page has a dark figure.
PAGE = Palette("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
# Colours of a picture that stands alone, as on a light page.
PAPER = Palette("#1c1b19", "#6b675f", "#e4e0d7", "#0f6b6b", "#9c8a68", "#c2501f")
_VARIABLES = {
    PAGE.ink: "var(--ink)",
    PAGE.muted: "var(--muted)",
    PAGE.grid: "var(--grid)",
    PAGE.model: "var(--model)",
    PAGE.second: "var(--second)",
    PAGE.other: "var(--other)",
}
SIZE = (4.7, 3.1)  # inches of 72 SVG units: about as many pixels as a phone has, so its text is not shrunk


def style(palette: Palette = PAGE) -> dict[str, object]:
    """Matplotlib's settings for every picture: use as `with mpl.rc_context(style()):`."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "milonga",
        "font.size": 10,
        "axes.edgecolor": palette.grid,
        "axes.labelcolor": palette.muted,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "text.color": palette.ink,
        "grid.color": palette.grid,
        "grid.linewidth": 0.7,
        "lines.linewidth": 2.2,
        "lines.solid_capstyle": "round",
    }


def byte_count(value: float) -> str:
    """`512`, `1K`, `256K`, `1M`: bytes of text, in powers of 1024."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def byte_size(value: float) -> str:
    """`670 KiB`, `3.1 GiB`: bytes of memory, held together by a space that does not break."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g}\N{NO-BREAK SPACE}{unit}"
        value /= 1024
    return f"{value:.3g}\N{NO-BREAK SPACE}TiB"


def new_figure(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty picture with a grid of horizontal lines."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.spines["left"].set_visible(False)
    return figure, axes


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element for a page. `name` keeps the ids of several figures on one page apart."""
    with mpl.rc_context(style() | {"svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"font-family:[^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font:[^;\"]*?px)[^;\"]*", r"\1 var(--face)", svg)
    svg = re.sub(
        r'id="((?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|PolyCollection|LineCollection|PathCollection|FillBetweenPolyCollection|legend)[^"]*)"',
        rf'id="{name}-\1"',
        svg,
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def end_label(axes: Axes, x: float, y: float, text: str, colour: str, *, above: bool = True) -> None:
    """A line's name at its right end."""
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 6 if above else -6),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=colour,
    )


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture drawn with `PAPER` as PNG or SVG, by the file's ending.

    Raises:
        OSError: if the file cannot be written.
    """
    figure.savefig(path, dpi=200, facecolor="white", format=path.suffix.removeprefix("."))
