"""The pictures of a measurement: bars of times, curves over lengths."""

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from milonga.bench.figures import number
from milonga.bench.result import Bars, Lines
from milonga.evaluation.drawing import PAGE, Palette, byte_count, new_figure, style, to_svg

_WIDTH, _BAR_HEIGHT = 7.2, 0.24  # inches


def svg(plot: Bars | Lines, name: str) -> str:
    """The picture as an element for a page."""
    with mpl.rc_context(style(PAGE)):
        return to_svg(draw(plot, PAGE), name, plot.title)


def draw(plot: Bars | Lines, palette: Palette) -> Figure:
    """The picture in these colours, inside `mpl.rc_context(style(palette))`."""
    return _bars(plot, palette) if isinstance(plot, Bars) else _lines(plot, palette)


def _bars(plot: Bars, palette: Palette) -> Figure:
    colours = {"model": palette.model, "second": palette.grid, "other": palette.other}
    count = sum(len(bars) + 1.2 for _, bars in plot.groups)
    figure, axes = new_figure((_WIDTH, max(1.6, 0.8 + _BAR_HEIGHT * count)))
    axes.grid(visible=False)
    values = [bar.value for _, bars in plot.groups for bar in bars if bar.value > 0]
    low, high = min(values) / 1.6, max(values) * 12
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    at, ticks, names = 0.0, [], []
    for group, bars in plot.groups:
        ticks.append(at)
        names.append(group)
        at += 1
        for bar in bars:
            axes.barh(at, bar.value - low, left=low, height=0.78, color=colours[bar.kind])
            axes.annotate(
                f"{number(bar.value)}  {bar.label}",
                (bar.value, at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=palette.ink if bar.kind == "model" else palette.muted,
            )
            at += 1
        at += 0.2
    axes.set_ylim(at, -0.8)
    axes.set_yticks([])
    for place, group in zip(ticks, names, strict=True):
        axes.annotate(group, (low, place), xytext=(0, -1), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlabel(plot.axis)
    return figure


def _lines(plot: Lines, palette: Palette) -> Figure:
    figure, axes = new_figure((_WIDTH, 4.2))
    colours = (palette.model, palette.other, palette.second, palette.ink)
    measured = [line.label for line in plot.lines if line.solid]
    for line in plot.lines:
        # a published curve has the colour of the measured one of the same name
        base = line.label.removesuffix(" (published)")
        index = measured.index(base) if base in measured else len(measured)
        colour = colours[index % len(colours)]
        axes.plot(
            *zip(*line.points, strict=True),
            color=colour,
            linestyle="-" if line.solid else (0, (3, 2)),
            linewidth=2.2 if line.solid else 1.2,
            marker="o" if line.solid else "x" if len(line.points) == 1 else "",
            markersize=4 if line.solid else 8,
            label=line.label,
        )
    lengths = sorted({x for line in plot.lines for x, _ in line.points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_count(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.legend(frameon=False, fontsize=8, labelcolor="linecolor", handlelength=2.2)
    return figure
