"""What a measurement hands over: rows, the figures they come down to, and all that says where they were taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from milonga.bench.figures import Figure
from milonga.evaluation.machine import Machine, describe_machine

# told: parts done, parts in all, what is being done
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Table:
    """Rows of text for people. `right`: columns flush right. `own`: rows that are this library's."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    own: Sequence[int] = ()


@dataclass(frozen=True)
class Bar:
    """A bar of a plot: what it is, its length, and `model`, `second` (a floor) or `other` (another library)."""

    label: str
    value: float
    kind: str


@dataclass(frozen=True)
class Bars:
    """Groups of bars, one group below the other, on one logarithmic axis."""

    title: str
    axis: str
    groups: Sequence[tuple[str, Sequence[Bar]]]


@dataclass(frozen=True)
class Line:
    """A curve: points (x, y); `solid` is measured here, dashed is from elsewhere."""

    label: str
    points: Sequence[tuple[float, float]]
    solid: bool = True


@dataclass(frozen=True)
class Lines:
    """Curves over a logarithmic axis of lengths."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class BenchResult:
    """One run of one measurement.

    Attributes:
        kind: `ops`, `train`, `prefill`, `decode` or `first-use`.
        settings: what was asked for.
        rows: JSON-ready, one for each line of the table.
        figures: what they come down to, with demands.
        tables, plots: the same for people.
        ceilings: what the machine can do, as measured in this run.
        notes: what a reader must know, one sentence each.
    """

    kind: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    figures: Sequence[Figure]
    tables: Sequence[Table]
    plots: Sequence[Bars | Lines] = ()
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    machine: Machine = field(default_factory=describe_machine)
    date: datetime = field(default_factory=lambda: datetime.now(UTC).astimezone())

    def to_json(self, command: str) -> dict[str, Any]:
        """Everything, JSON-ready. `command`: the command line that made it."""
        return {
            "bench": self.kind,
            "command": command,
            "date": self.date.isoformat(timespec="seconds"),
            "machine": self.machine.to_json(),
            "settings": dict(self.settings),
            "ceilings": dict(self.ceilings),
            "rows": [dict(row) for row in self.rows],
            "figures": [asdict(figure) | {"met": figure.met} for figure in self.figures],
            "notes": list(self.notes),
        }
