"""What `milonga bench train` says of a model: a row, its figures, the table and the plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from milonga.bench.demands import CHIP, TRAIN, judged
from milonga.bench.figures import Figure, number
from milonga.bench.models import TrainingShape
from milonga.bench.result import Bar, Bars, Table

Precision = Literal["fp32", "bf16"]
_GIB = 2**30
OURS = "milonga"


@dataclass(frozen=True)
class TrainRow:
    """One model's training step."""

    shape: TrainingShape
    who: str  # `milonga`, or a peer's package
    precision: Precision
    compiled: bool
    captured: bool  # both passes replayed as a CUDA graph
    parameters: int
    seconds: float  # of a step, the median of the blocks
    spread: float  # half the distance between the slowest and the fastest block, over the median
    steps: int
    first: float  # seconds of the first step, compiling included
    peak_bytes: int | None  # of tensors at once: what a graph's own come to while it is captured is counted
    reserved_bytes: int | None  # that PyTorch took from the device for them, at most
    flops_6nd: float  # of a step
    flops_counted: float
    floor: float  # seconds of the matrix products alone
    product_rate: float
    loss: float  # nats of a token in the last step: a number, if all is well

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.shape.batch * self.shape.length

    @property
    def passes(self) -> str:
        """How the kernels of both passes are launched."""
        return "captured" if self.captured else "compiled" if self.compiled else "launched"

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, object]:
        """Times in milliseconds, memory in bytes."""
        return {
            "model": self.shape.name,
            "who": self.who,
            "parameters": self.parameters,
            "vocab_size": self.shape.config.vocab_size,
            "batch": self.shape.batch,
            "length": self.shape.length,
            "precision": self.precision,
            "compiled": self.compiled,
            "captured": self.captured,
            "recompute": list(self.shape.recompute) if self.who == OURS else None,
            "residual": self.shape.residual if self.who == OURS else None,
            "deterministic": self.shape.deterministic if self.who == OURS else None,
            "tokens_per_second": self.rate,
            "step_ms": self.seconds * 1e3,
            "spread": self.spread,
            "steps": self.steps,
            "first_step_seconds": self.first,
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "floor_ms": self.floor * 1e3,
            "fraction": self.floor / self.seconds,
            "utilisation_6nd": self.flops_6nd / self.seconds / self.product_rate,
            "utilisation_counted": self.flops_counted / self.seconds / self.product_rate,
            "loss": self.loss,
        }


def figures_of(rows: Sequence[TrainRow], gpu: str | None) -> list[Figure]:
    """Rates and memory with what is asked of them on one H100 at the shapes of record."""
    made = []
    for row in rows:
        if row.who != OURS:
            continue
        asked = TRAIN.get((row.shape.name, row.shape.batch, row.shape.length))
        if gpu is None or CHIP not in gpu or row.precision != "bf16":
            asked = None
        unit = "bytes/s" if row.shape.config.vocab_size == 256 else "tokens/s"
        what = f"train {row.shape.name}, B{row.shape.batch} T{row.shape.length}"
        made.append(judged(what, row.rate, unit, asked.rate if asked else None))
        if row.peak_bytes is not None:
            memory = asked.memory if asked else None
            made.append(judged(f"{what}: peak memory", row.peak_bytes / _GIB, "GiB", memory, at_least=False))
        beside = [other for other in rows if other.shape == row.shape and other.who != OURS]
        if beside:
            best = max(beside, key=lambda other: other.rate)
            made.append(Figure(f"{what}, against {best.who}", row.rate / best.rate, None, "x"))
    return made


def _memory(row: TrainRow) -> str:
    if row.peak_bytes is None or row.reserved_bytes is None:
        return "-"
    return f"{row.peak_bytes / _GIB:.1f} of {row.reserved_bytes / _GIB:.1f} GiB"


def table(rows: Sequence[TrainRow], title: str) -> Table:
    """What is shown of each row."""
    headings = (
        "model",
        "who",
        "batch",
        "rate",
        "step, ms",
        "spread",
        "floor, ms",
        "reached",
        "6ND",
        "counted",
        "memory",
    )
    shown = []
    for row in rows:
        facts = row.to_json()
        unit = "bytes/s" if row.shape.config.vocab_size == 256 else "tokens/s"
        shown.append(
            (
                f"{row.shape.name} ({row.parameters / 1e6:,.3g}M)",
                f"{row.who}, {row.passes}" if row.who == OURS else row.who,
                f"{row.shape.batch} x {row.shape.length}",
                f"{row.rate:,.0f} {unit}",
                number(row.seconds * 1e3),
                f"{row.spread:.1%}",
                number(row.floor * 1e3),
                f"{row.floor / row.seconds:.0%}",
                f"{facts['utilisation_6nd']:.0%}",
                f"{facts['utilisation_counted']:.0%}",
                _memory(row),
            )
        )
    own = [index for index, row in enumerate(rows) if row.who == OURS]
    return Table(title, headings, shown, right=(3, 4, 5, 6, 7, 8, 9, 10), own=own)


def plots(rows: Sequence[TrainRow]) -> list[Bars]:
    """Milliseconds of a step, beside those of its matrix products."""
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        bars = groups.setdefault(f"{row.shape.name}, {row.shape.batch} x {row.shape.length}", [])
        if not bars:
            bars.append(Bar("matrix products alone", row.floor * 1e3, "second"))
        kind = "model" if row.who == OURS else "other"
        bars.append(Bar(f"{row.who}: {row.rate:,.0f} a second", row.seconds * 1e3, kind))
    title = "A training step beside its matrix products"
    return [Bars(title, "milliseconds", list(groups.items()))] if groups else []
