"""What a run tells its caller: progress while it goes on, and the result."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["reading", "timing", "compiling", "capturing", "training", "evaluating", "saving"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands, given to the callback after every step and when the phase changes.

    Attributes:
        phase: `reading` the text, `timing` steps to decide their number, `compiling` (the first step on a GPU, or with
            `compile`), `capturing` (a step as a CUDA graph, see `TrainingConfig.capture`), `training`, `evaluating`,
            `saving`.
        done: steps done; while reading, bytes of source files.
        total: of all; None where it is not known yet.
        bits_per_byte: of the training text lately.
        bytes_per_second: of training, since the run began or continued.
        seconds_left: estimated.
        left_out: names of files that hold no text and are not read (1000 at most); given once, behind the reading.
    """

    phase: Phase
    done: int
    total: int | None
    bits_per_byte: float | None = None
    bytes_per_second: float | None = None
    seconds_left: float | None = None
    left_out: tuple[str, ...] = ()


Callback = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run came to.

    Attributes:
        run: its folder.
        checkpoint: the last checkpoint.
        step: updates done.
        bits_per_byte: of the held-out windows at the end; None where nothing is held out.
        train_bits_per_byte: of the training text, over the steps of the last line of metrics; None if no step was left.
        bytes: text read in all, counted as often as it was read.
        seconds: time spent in steps, evaluations and saving, over all sessions of the run.
        bytes_per_second: bytes / seconds.
        parameters: of the network.
    """

    run: Path
    checkpoint: Path
    step: int
    bits_per_byte: float | None
    train_bits_per_byte: float | None
    bytes: int
    seconds: float
    bytes_per_second: float
    parameters: int
