"""What every command prints with: the result on stdout, progress on stderr, tables, JSON, progress bars."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Off a terminal a line of progress at most this often, in seconds.
LINE_EVERY = 10.0
# What is over sooner, in seconds, shows no progress where that would be in the way.
AFTER = 2.0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of stdout has gone: for `cli/main.py` to end quietly, not for Rich to exit with 1."""
        raise  # the BrokenPipeError that is being handled


def _console(error: bool) -> Console:
    """A console that writes control characters to a terminal only, whatever the environment says."""
    stream = sys.stderr if error else sys.stdout
    terminal = stream.isatty()
    return _Console(
        stderr=error,
        force_terminal=terminal,
        no_color=None if terminal else True,
        highlight=False,
        soft_wrap=not terminal,
        width=None if terminal else 120,
    )


stdout = _console(error=False)  # the result
stderr = _console(error=True)  # everything else


def say(line: str) -> None:
    """A line of progress on stderr, as it is (no markup)."""
    stderr.print(Text(line))


def standing(bytes_read: int, rate: float, nbytes: int, name: str | None = None) -> None:
    """A line on stderr: a session's name if given, where it stands, its rate (NaN: nothing written), what it holds."""
    written = f"{count(rate)} bytes/s" if rate == rate else "nothing written"
    parts = [*([] if name is None else [name]), f"{count(bytes_read)} bytes", written, f"state {size(nbytes)}"]
    aside("[" + ", ".join(parts) + "]")


def aside(line: str) -> None:
    """A line on stderr about what was written, as it is, dim on a terminal."""
    stderr.print(Text(line, style="dim"), soft_wrap=True)


def harmless(text: str) -> str:
    """What a model wrote, for a terminal: U+FFFD for controls, which could move its cursor or change its settings."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def print_json(value: object) -> None:
    """The result of `--json`: one JSON document on stdout. Figures that are no numbers come out as null."""
    sys.stdout.write(json.dumps(_without_nan(value), indent=2) + "\n")


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> Table:
    """A table for `stdout.print`. Columns whose index is in `right` are set flush right. Cells hold no markup."""
    made = Table(title=Text(title) if title else None, title_justify="left", title_style="bold")
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def count(value: float) -> str:
    """A whole number with its thousands set apart: `18,340`."""
    return f"{value:,.0f}"


def size(nbytes: float) -> str:
    """Bytes as people read them: `412 bytes`, `3.4 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes / 1024:.3g} TiB"


def duration(seconds: float) -> str:
    """`0:42`, `3:05` or `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Bar:
    """Progress of one task: a bar on a terminal, else a line now and then. Use `progress` to make one."""

    def __init__(self, what: str, total: float | None, unit: str, start: int):
        self.what, self.total, self.unit = what, total, unit
        self.done: float = start
        self.note, self._first = "", start
        self._began = time.monotonic()
        self._said = self._began
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        if stderr.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=stderr,
            )
            self._task = self._bar.add_task(self.what, total=self.total, completed=self._first, note="")
            self._bar.start()
        return self

    def update(self, done: float, note: str = "") -> None:
        """`done` of the total so far; `note` holds the figures to show beside it."""
        self.done, self.note = done, note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=self._figures())
        elif time.monotonic() - self._said >= LINE_EVERY:
            self._line()

    def overdue(self) -> None:
        """Off a terminal the next update is a line at once."""
        self._said -= LINE_EVERY

    def expect(self, total: float) -> None:
        """How much there is in all, where that becomes known only now."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def advance(self, by: float, note: str = "") -> None:
        """`by` more than before."""
        self.update(self.done + by, note)

    def _figures(self) -> str:
        total = f"/{count(self.total)}" if self.total is not None else ""
        parts = [f"{count(self.done)}{total} {self.unit}".rstrip(), self.note]
        return ", ".join(part for part in parts if part)

    def _line(self) -> None:
        self._said = time.monotonic()
        elapsed, gained = self._said - self._began, self.done - self._first
        left = ""
        if self.total is not None and gained > 0 and self.done < self.total:
            left = f", {duration(elapsed / gained * (self.total - self.done))} left"
        say(f"{self.what}: {self._figures()}{left}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line()


class LateBar:
    """Progress of one task that shows itself once the task has taken `AFTER` seconds. Use `late_progress`."""

    def __init__(self, what: str, total: float | None, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._began = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> "LateBar":
        return self

    def update(self, done: int, note: str = "") -> None:
        """As `Bar.update`."""
        if self._bar is None:
            if time.monotonic() - self._began < AFTER:
                return
            self._bar = Bar(self._what, self._total, self._unit, done).__enter__()
            self._bar.overdue()
        self._bar.update(done, note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)


def late_progress(what: str, total: float | None = None, unit: str = "") -> LateBar:
    """`progress` for what may be over at once: nothing is shown of a task that takes less than `AFTER` seconds."""
    return LateBar(what, total, unit)


def progress(what: str, total: float | None = None, unit: str = "", *, start: int = 0) -> Bar:
    """A progress bar on stderr, as a context manager::

        with progress("training", total=steps, unit="steps") as bar:
            bar.update(step, f"{bits:.3f} bits/byte, {rate:,.0f} bytes/s")

    Args:
        what: the task, as a few words.
        total: what `update` counts up to; None where that is not known.
        unit: of the total.
        start: where the count begins (a resumed run), so that the time left is not misjudged.
    """
    return Bar(what, total, unit, start)
