"""The learning rate as a function of the step: warm-up, plateau, decay. Steps, never seconds."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class ScheduleConfig(BaseModel):
    """Linear warm-up to the peak, a plateau, and a decay over the last part of the run.

    Args:
        warmup_steps: length of the warm-up; None takes a share of all steps.
        warmup_fraction: that share; not used where `warmup_steps` is given.
        decay: shape of the decay; `constant` keeps the peak.
        decay_fraction: share of the steps after the warm-up over which the rate decays: 1 is the usual cosine, 0.2 with
            `linear` a trapezoid (warm-up, stable, decay).
        final_fraction: what is left of the peak when the run ends.
        from_zero: the very first step has a rate of 0, as in the Samba code; otherwise peak / warm-up steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_steps: NonNegativeInt | None = None
    warmup_fraction: float = Field(0.01, ge=0, le=1)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    decay_fraction: float = Field(1.0, gt=0, le=1)
    final_fraction: float = Field(0.1, ge=0, le=1)
    from_zero: bool = False

    def warmup(self, steps: int) -> int:
        """Length of the warm-up of a run of `steps`."""
        return round(self.warmup_fraction * steps) if self.warmup_steps is None else self.warmup_steps


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate for step `step` (counted from 0) of a run of `steps`."""
    warmup = schedule.warmup(steps)
    if step < warmup:
        return peak * (step if schedule.from_zero else step + 1) / warmup
    length = max(1, round(schedule.decay_fraction * (steps - warmup)))
    done = min(1.0, max(0.0, (step - (steps - length)) / length))
    if schedule.decay == "constant":
        return peak
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.decay == "cosine" else 1 - done
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * shape)
