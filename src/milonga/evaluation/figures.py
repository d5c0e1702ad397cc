"""The pictures of a report: SVG that takes its colours and its typeface from the page it stands in."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Colours that stand for the page's: each is replaced by a CSS variable, so that a dark page has a dark figure.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_MODEL, _SECOND, _OTHER = "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _MODEL: "var(--model)",
    _SECOND: "var(--second)",
    _OTHER: "var(--other)",
}
_SIZE = (4.7, 3.1)  # inches of 72 SVG units: about as many pixels as a phone has, so its text is not shrunk
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "milonga",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}

Metrics = Sequence[Mapping[str, Any]]


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


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element for a page. `name` keeps the ids of several figures on one page apart."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
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


def _end_label(axes: Axes, x: float, y: float, text: str, colour: str, *, above: bool = True) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 6 if above else -6),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=colour,
    )


def loss_curve(metrics: Metrics, xz: float) -> str:
    """Bits per byte over steps: of the training text, of held-out windows, and what xz needs.

    Args:
        metrics: lines of `metrics.jsonl`: `step` with `bits_per_byte`, or with `heldout_bits_per_byte`.
        xz: bits per byte of xz on the held-out text.
    """
    train = [(line["step"], line["bits_per_byte"]) for line in metrics if line.get("bits_per_byte") is not None]
    held = [
        (line["step"], line["heldout_bits_per_byte"])
        for line in metrics
        if line.get("heldout_bits_per_byte") is not None
    ]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        last = max((step for step, _ in (*train, *held)), default=1)
        if train:
            axes.plot(*zip(*train, strict=True), color=_SECOND, linewidth=1.6, label="training text")
        if held:
            marker = "o" if len(held) <= 40 else ""
            axes.plot(*zip(*held, strict=True), color=_MODEL, marker=marker, markersize=4, label="held-out text")
        axes.axhline(xz, color=_OTHER, linestyle=(0, (4, 3)), linewidth=1.6)
        values = [value for _, value in (*train, *held)] + [xz]
        low = min(values)
        high = max(low + 0.5, min(max(values), max(xz + 1.2, 4.0)))
        axes.set_ylim(low - 0.16 * (high - low), high)
        axes.set_xlim(0, last * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        _end_label(axes, last * 1.02, xz, f"xz -9 {xz:.2f}", _OTHER)
        if train or held:  # curves come from the top left, so the top right is free
            axes.legend(loc="upper right", frameon=False, labelcolor="linecolor", handlelength=1.2, borderaxespad=0.2)
        axes.set_xlabel("step")
        axes.set_ylabel("bits per byte")
        return _svg(figure, "loss", "Bits per byte against training steps")


def context_curve(context: Sequence[Mapping[str, Any]], window: int | None = None) -> str:
    """Bits per byte by position in the text.

    Args:
        context: entries with `start`, `bytes` (where the bucket ends) and `bits_per_byte`.
        window: the length of the windows the model was trained on.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        values = [entry["bits_per_byte"] for entry in context]
        first = min(512, context[0]["bytes"] / 2)
        edges = [max(entry["start"], first) for entry in context] + [max(context[-1]["bytes"], 2 * first)]
        axes.set_xscale("log", base=2)
        axes.stairs(values, edges, color=_MODEL, linewidth=2.4, baseline=None)
        axes.stairs(values, edges, color=_MODEL, fill=True, alpha=0.10, baseline=0)
        middle = (min(values) + max(values)) / 2
        half = max(0.15, 0.75 * (max(values) - min(values)))
        axes.set_ylim(middle - half, middle + half)
        axes.set_xlim(edges[0], edges[-1])
        ticks = [1 << power for power in range(10, 31, 2) if edges[0] <= 1 << power <= edges[-1]]
        axes.xaxis.set_major_locator(FixedLocator(ticks or [edges[0], edges[-1]]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_count(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        for left, right, value in zip(edges, edges[1:], values, strict=False):
            if len(values) <= 9 or value in (values[0], values[-1]):
                axes.annotate(
                    f"{value:.2f}",
                    ((left * right) ** 0.5, value),
                    xytext=(0, 5),
                    ha="center",
                    textcoords="offset points",
                    color=_INK,
                    fontsize=9,
                )
        if window is not None and edges[0] < window < edges[-1]:
            axes.axvline(window, color=_MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel("bytes of text before")
        axes.set_ylabel("bits per byte")
        return _svg(figure, "context", "Bits per byte against position in the text")


def state_curve(measured: Sequence[tuple[int, int]], cache: Sequence[tuple[int, int]], names: tuple[str, str]) -> str:
    """Memory against text length on two logarithmic axes: (length, bytes) of the model, measured, and of a cache."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        axes.loglog(*zip(*cache, strict=True), color=_OTHER, linestyle=(0, (4, 3)), linewidth=1.8)
        axes.loglog(*zip(*measured, strict=True), color=_MODEL, marker="o", markersize=4.5, clip_on=False, zorder=3)
        lengths = [length for length, _ in (*measured, *cache)]
        sizes = [size for _, size in (*measured, *cache)]
        axes.set_xlim(min(lengths), max(2 * min(lengths), *lengths))
        axes.set_ylim(min(sizes) / 3, max(sizes) * 4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([1 << p for p in range(10, 41, 2) if 1 << p <= max(lengths)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_count(value)))
        axes.yaxis.set_major_locator(FixedLocator([1 << p for p in range(10, 61, 5)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_size(value)))
        _end_label(axes, *measured[-1], f"{names[0]}, {byte_size(measured[-1][1])}", _MODEL, above=False)
        _end_label(axes, *cache[-1], f"{names[1]}, {byte_size(cache[-1][1])}", _OTHER)
        axes.set_xlabel("bytes of text read")
        return _svg(figure, "state", "Memory held against text length, beside a Transformer's cache")
