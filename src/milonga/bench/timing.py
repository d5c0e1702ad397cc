"""Timing that a busy machine, a warm cache or a slow host does not distort."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]
# Bytes written between two measurements on a GPU: several times its last cache.
_FLUSHED = 1 << 28
# At most this many flushes before a measurement: they also keep the device busy while the host queues the work.
_MOST_FLUSHES = 64


@dataclass(frozen=True)
class Timing:
    """Times of one call in seconds.

    Attributes:
        median: of the repeats.
        best: the least of them.
        spread: half the distance between the quartiles, over the median.
        repeats: how many there were.
        first: the very first call, compiling and tuning included.
        host: until the call gave the host back, when nothing had to be waited for (CPU: the same as `median`).
        peak_bytes: device memory that one call took beyond what was held before it; None on a CPU.
        queued: on a GPU, whether the device began with the call only when all of it was queued, each time; if not, the
            device may have waited for the host in these times.
    """

    median: float
    best: float
    spread: float
    repeats: int
    first: float
    host: float
    peak_bytes: int | None
    queued: bool = True


@dataclass(frozen=True)
class Failure:
    """Why something could not be measured, on one line."""

    reason: str


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Wall time of one call, until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


class _Warm:
    """A call that ran a few times: what its first run took, how long one takes, and how it is best timed."""

    def __init__(self, call: Call, device: torch.device):
        self.call = call
        self.flushes = 0  # of a GPU's cache before each time; 0 while that is not known
        self.queued = True
        self.first = seconds(call, device)
        self.peak: int | None = None
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            seconds(call, device)
            self.peak = torch.cuda.max_memory_allocated(device) - held
        self.estimate = seconds(call, device)
        synchronize(device)
        began = time.perf_counter()
        call()
        self.host = time.perf_counter() - began
        synchronize(device)


def warmed(call: Call, device: torch.device) -> "_Warm | Failure":
    """Run a call until nothing is left to compile. What a peer or a full memory throws becomes a line."""
    try:
        return _Warm(call, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Failure("out of memory")
    except Exception as error:
        return Failure(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200])


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    budget: float = 1.0,
    least: int = 5,
    most: int = 100,
    flush: bool = True,
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | Failure]:
    """Time several calls in turns, so that what disturbs one disturbs all.

    On a GPU each time lies between two events of the stream, after the cache was overwritten often enough that the host
    has queued the call before the device begins with it: what counts is the device. A time for which that was not often
    enough is taken again after more of it, up to a limit; `Timing.queued` says whether it sufficed. On a CPU it is wall
    time.

    Args:
        calls: by name; what they return is dropped.
        device: where they run.
        budget: seconds that all repeats of one call may take together, roughly.
        least, most: bounds of the number of repeats.
        flush: overwrite a GPU's cache before each repeat.
        report: is told the name of each call before it runs for the first time, when it may have to be compiled.
    """
    warm: dict[str, _Warm] = {}
    results: dict[str, Timing | Failure] = {}
    for name, call in calls.items():
        report(name)
        made = warmed(call, device)
        if isinstance(made, Failure):
            results[name] = made
        else:
            warm[name] = made
    repeats = {name: int(min(most, max(least, budget / max(one.estimate, 1e-9)))) for name, one in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in warm}
    timer = _CudaTimer(device, flush) if device.type == "cuda" else None
    for turn in range(max(repeats.values(), default=0)):
        for name, one in warm.items():
            if turn < repeats[name]:
                times[name].append(timer(one) if timer is not None else seconds(one.call, device))
    for name, one in warm.items():
        results[name] = _summary(times[name], one, device)
    return {name: results[name] for name in calls}


def _summary(times: list[float], one: _Warm, device: torch.device) -> Timing:
    middle = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (middle, middle, middle)
    host = one.host if device.type == "cuda" else middle
    return Timing(middle, min(times), (high - low) / 2 / middle, len(times), one.first, host, one.peak, one.queued)


class _CudaTimer:
    """Seconds of a call between two events, behind enough overwriting of the cache to hide the host's part."""

    def __init__(self, device: torch.device, flush: bool):
        self.device = device
        self.waste = torch.empty(_FLUSHED, dtype=torch.uint8, device=device) if flush else None
        self.one_flush = 0.0
        if self.waste is not None:
            waste = self.waste
            seconds(waste.zero_, device)
            self.one_flush = min(seconds(waste.zero_, device) for _ in range(3))

    def __call__(self, one: _Warm) -> float:
        most = _MOST_FLUSHES if self.waste is not None else 0
        one.flushes = min(most, one.flushes or 2 + int(one.host / max(self.one_flush, 1e-6)))
        took, queued = self._once(one)
        while not queued and one.flushes < most:
            one.flushes = min(most, 2 * one.flushes)
            took, queued = self._once(one)
        one.queued = one.queued and queued
        return took

    def _once(self, one: _Warm) -> tuple[float, bool]:
        """-> seconds, and whether all was queued when the device began."""
        if self.waste is not None:
            for _ in range(one.flushes):
                self.waste.zero_()
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        began.record()
        one.call()
        ended.record()
        queued = not began.query()
        torch.cuda.synchronize(self.device)
        return began.elapsed_time(ended) / 1e3, queued
