"""metrics.jsonl: one JSON object a line, cut back to a checkpoint when a run continues from it."""

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from milonga.errors import UserError
from milonga.files import disk_errors, write_atomically

METRICS = "metrics.jsonl"
# fields that tell the time: the only ones in which a continued run differs from an uninterrupted one
CLOCK_FIELDS = ("seconds", "bytes_per_second", "time")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, in order. A last line cut short by a killed process is left out.

    Raises:
        UserError: if the run has none.
    """
    path = Path(run) / METRICS
    if not path.is_file():
        raise UserError(f"{run}: has no {METRICS}; is it a run's folder?")
    return [json.loads(line) for line in _whole_lines(path.read_bytes())]


def _whole_lines(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")[:-1]  # what follows the last newline was cut short
    whole = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            break
        whole.append(line)
    return whole


class MetricsLog:
    """Appends to RUN/metrics.jsonl, and to TensorBoard's event files where asked.

    Args:
        run: the run's folder.
        step: lines after this step are cut: they belong to steps that the run will take again.
        tensorboard: also write RUN/tensorboard.

    Raises:
        UserError: if the disk refuses, or TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool = False):
        self.path = run / METRICS
        if self.path.is_file():
            lines = [line for line in _whole_lines(self.path.read_bytes()) if json.loads(line)["step"] <= step]
            write_atomically(self.path, b"".join(line + b"\n" for line in lines))
        with disk_errors(self.path):
            self._file = open(self.path, "ab")  # noqa: SIM115  closed in __exit__
        self._events = _event_writer(run, step) if tensorboard else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; `step` must be among its fields."""
        with disk_errors(self.path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    self._events.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Make every line so far survive a power cut; called before a checkpoint counts as complete."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Raises:
    UserError: if TensorBoard is not installed, with the command that installs it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("training.tensorboard: TensorBoard is not installed: pip install 'milonga[tensorboard]'")


def _event_writer(run: Path, step: int) -> Any:
    check_tensorboard()
    # imported when asked for: an extra, and slow to load
    writer = vars(importlib.import_module("torch.utils.tensorboard"))["SummaryWriter"]
    return writer(str(run / "tensorboard"), purge_step=step + 1)
