"""The pictures of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from milonga.evaluation.drawing import PAGE, byte_count, byte_size, end_label, new_figure, style, to_svg

Metrics = Sequence[Mapping[str, Any]]


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
    with mpl.rc_context(style()):
        figure, axes = new_figure()
        last = max((step for step, _ in (*train, *held)), default=1)
        if train:
            axes.plot(*zip(*train, strict=True), color=PAGE.second, linewidth=1.6, label="training text")
        if held:
            marker = "o" if len(held) <= 40 else ""
            axes.plot(*zip(*held, strict=True), color=PAGE.model, marker=marker, markersize=4, label="held-out text")
        axes.axhline(xz, color=PAGE.other, linestyle=(0, (4, 3)), linewidth=1.6)
        values = [value for _, value in (*train, *held)] + [xz]
        low = min(values)
        high = max(low + 0.5, min(max(values), max(xz + 1.2, 4.0)))
        axes.set_ylim(low - 0.16 * (high - low), high)
        axes.set_xlim(0, last * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        end_label(axes, last * 1.02, xz, f"xz -9 {xz:.2f}", PAGE.other)
        if train or held:  # curves come from the top left, so the top right is free
            axes.legend(loc="upper right", frameon=False, labelcolor="linecolor", handlelength=1.2, borderaxespad=0.2)
        axes.set_xlabel("step")
        axes.set_ylabel("bits per byte")
        return to_svg(figure, "loss", "Bits per byte against training steps")


def context_curve(context: Sequence[Mapping[str, Any]], window: int | None = None) -> str:
    """Bits per byte by position in the text.

    Args:
        context: entries with `start`, `bytes` (where the bucket ends) and `bits_per_byte`.
        window: the length of the windows the model was trained on.
    """
    with mpl.rc_context(style()):
        figure, axes = new_figure()
        values = [entry["bits_per_byte"] for entry in context]
        first = min(512, context[0]["bytes"] / 2)
        edges = [max(entry["start"], first) for entry in context] + [max(context[-1]["bytes"], 2 * first)]
        axes.set_xscale("log", base=2)
        axes.stairs(values, edges, color=PAGE.model, linewidth=2.4, baseline=None)
        axes.stairs(values, edges, color=PAGE.model, fill=True, alpha=0.10, baseline=0)
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
                    color=PAGE.ink,
                    fontsize=9,
                )
        if window is not None and edges[0] < window < edges[-1]:
            axes.axvline(window, color=PAGE.muted, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel("bytes of text before")
        axes.set_ylabel("bits per byte")
        return to_svg(figure, "context", "Bits per byte against position in the text")


def state_curve(measured: Sequence[tuple[int, int]], cache: Sequence[tuple[int, int]], names: tuple[str, str]) -> str:
    """Memory against text length on two logarithmic axes: (length, bytes) of the model, measured, and of a cache."""
    with mpl.rc_context(style()):
        figure, axes = new_figure()
        axes.loglog(*zip(*cache, strict=True), color=PAGE.other, linestyle=(0, (4, 3)), linewidth=1.8)
        axes.loglog(*zip(*measured, strict=True), color=PAGE.model, marker="o", markersize=4.5, clip_on=False, zorder=3)
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
        end_label(axes, *measured[-1], f"{names[0]}, {byte_size(measured[-1][1])}", PAGE.model, above=False)
        end_label(axes, *cache[-1], f"{names[1]}, {byte_size(cache[-1][1])}", PAGE.other)
        axes.set_xlabel("bytes of text read")
        return to_svg(figure, "state", "Memory held against text length, beside a Transformer's cache")
