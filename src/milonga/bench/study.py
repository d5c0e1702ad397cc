"""What the two halves of the throughput study share: models with random weights, one after the other."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from milonga.bench.ceilings import dtype_name
from milonga.bench.models import STUDY, study_model
from milonga.bench.result import Line, Lines
from milonga.models import ModelConfig

Models = Mapping[str, ModelConfig]
Measured = TypeVar("Measured")
Curves = Mapping[str, Sequence[tuple[float, float]]]


def forget() -> None:
    """Give the memory of a model back before the next is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_NO_ROOM = re.compile("allocate memory|not enough memory|multiplication overflow|size calculation overflow")


def attempt(work: Callable[[], Measured]) -> Measured | str:
    """The result, or that memory ran out."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not no_room(error):
            raise
        forget()
        return "out of memory"


def no_room(error: BaseException) -> bool:
    """Whether tensors did not fit into memory: a GPU has an exception for it, a CPU words, and so have sizes that no
    machine could have."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_ROOM.search(str(error)) is not None


def settings_of(models: Models, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What was asked for, JSON-ready."""
    return {
        "models": {name: config.model_dump(mode="json") for name, config in models.items()},
        "dtype": dtype_name(dtype),
        "device": str(device),
    }


def times(rate: float | None, baseline: float | None) -> float | None:
    """The ratio, where both are known."""
    return rate / baseline if rate and baseline else None


def curves_plot(title: str, x: str, y: str, curves: Curves, published: Curves) -> list[Lines]:
    """Curves over lengths, what a paper printed dashed; no plot where nothing was measured."""
    lines = [Line(name, points) for name, points in curves.items() if points]
    drawn = [Line(f"{name} (published)", points, solid=False) for name, points in published.items() if name in curves]
    return [Lines(title, x, y, lines + drawn)] if lines else []


def as_published(models: Models) -> set[str]:
    """Those of the models that have the paper's shape, so that its figures may stand beside theirs."""
    return {name for name, config in models.items() if name in STUDY and config == study_model(name, small=False)}
