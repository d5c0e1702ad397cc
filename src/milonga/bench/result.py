"""What a measurement hands over: rows, the figures they come down to, and all that says where they were taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from milonga.bench.figures import Figure
from milonga.evaluation.machine import Machine, describe_machine

# told: parts done, parts in all, what is being done
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BenchResult:
    """One run of one measurement.

    Attributes:
        kind: `ops`, `train`, `prefill`, `decode` or `first-use`.
        settings: what was asked for.
        rows: JSON-ready, one for each line of the table.
        figures: the same as figures with demands.
        ceilings: what the machine can do, as measured in this run.
        notes: what a reader must know, one sentence each.
    """

    kind: str
    settings: Mapping[str, object]
    rows: Sequence[Mapping[str, object]]
    figures: Sequence[Figure]
    ceilings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    machine: Machine = field(default_factory=describe_machine)
    date: datetime = field(default_factory=lambda: datetime.now(UTC).astimezone())

    def to_json(self, command: str) -> dict[str, object]:
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
