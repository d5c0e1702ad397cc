"""`milonga bench decode`: generating, as in the Samba paper's study, with this library's best path.

A step is timed at several positions whose caches are filled rather than run to, and the time of a whole generation is
the sum of its steps, between two measured positions taken as lying on a straight line. Weights are random.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from milonga.bench import demands, paper
from milonga.bench.ceilings import Ceilings, dtype_name
from milonga.bench.figures import Figure, number
from milonga.bench.models import BASELINE
from milonga.bench.result import BenchResult, Lines, Progress, Table, silent
from milonga.bench.study import Models, as_published, attempt, curves_plot, forget, settings_of, times
from milonga.evaluation.decoding import DecodeTime, measure_decode, random_network
from milonga.evaluation.drawing import byte_count

_COPY = 1 << 30  # bytes of the copy that a GPU's floor counts with


@dataclass(frozen=True)
class DecodeRow:
    """One model: steps at positions, and what they come to over whole generations."""

    model: str
    batch: int
    steps: Mapping[int, DecodeTime | str]

    def milliseconds(self, position: int) -> float | None:
        """Of a step there, if it was measured."""
        step = self.steps.get(position)
        return step.milliseconds if isinstance(step, DecodeTime) else None

    def rate(self, length: int) -> float | None:
        """Tokens a second of the batch over a generation of `length` tokens from nothing."""
        points = [(position, self.milliseconds(position)) for position in sorted(self.steps) if position <= length]
        known = [(position, time) for position, time in points if time is not None]
        if length < 1 or len(known) != len(points) or not known or (known[0][0], known[-1][0]) != (0, length):
            return None
        return self.batch * length / (whole_generation(known) / 1e3)


def whole_generation(points: Sequence[tuple[int, float]]) -> float:
    """Milliseconds of all steps from the first to the last position, given (position, milliseconds of a step)."""
    return sum((b - a) * (at_a + at_b) / 2 for (a, at_a), (b, at_b) in pairwise(points))


def bench_decode(
    models: Models,
    lengths: Sequence[int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    steps: int = 64,
    repeats: int = 5,
    progress: Progress = silent,
) -> BenchResult:
    """Time decoded steps at position 0 and at every length, and whole generations of these lengths."""
    ceilings = Ceilings(device)
    positions = [0, *sorted(set(lengths))]
    bandwidth = ceilings.copy(_COPY if device.type == "cuda" else 1 << 27)
    rows: list[DecodeRow] = []
    parts, done = len(models) * len(positions), 0
    for name, config in models.items():
        progress(done, parts, f"{name}: making random weights")
        network = random_network(config, device, dtype)
        measured: dict[int, DecodeTime | str] = {}
        for position in positions:
            progress(done, parts, f"{name}: {batch} rows at position {byte_count(position)}, capturing and timing")

            def work(position: int = position) -> DecodeTime:
                return measure_decode(
                    network,  # noqa: B023 (called at once)
                    batch,
                    position=position,
                    steps=steps,
                    repeats=repeats,
                    bandwidth=bandwidth,
                )

            measured[position] = attempt(work)
            forget()
            done += 1
        rows.append(DecodeRow(name, batch, measured))
        del network
        forget()
    progress(parts, parts, "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    published = as_published(models) if batch == paper.GENERATION_BATCH else set()
    return BenchResult(
        "decode",
        settings_of(models, device, dtype) | {"lengths": list(lengths), "batch": batch, "steps": steps},
        [part for row in rows for part in _decode_json(row, rows)],
        decode_figures(rows, gpu),
        [_decode_table(rows, f"Generating, {batch} rows, {dtype_name(dtype)} on {gpu or 'the CPU'}")],
        _decode_plots(rows, published),
        ceilings.to_json(),
        [
            f"paper: {paper.GENERATION_RATIO}x for samba over transformer over generations of 65536, on an A100; "
            "caches are filled with random numbers; the time of a generation is summed over the positions measured"
        ],
    )


def _baseline(rows: Sequence[DecodeRow]) -> DecodeRow | None:
    return next((row for row in rows if row.model == BASELINE), None)


def _decode_json(row: DecodeRow, rows: Sequence[DecodeRow]) -> list[dict[str, Any]]:
    base = _baseline(rows)
    made = []
    for position, step in row.steps.items():
        timed = step if isinstance(step, DecodeTime) else None
        there = base.milliseconds(position) if base else None
        rate = row.rate(position)
        made.append(
            {
                "model": row.model,
                "batch": row.batch,
                "position": position,
                "step_ms": timed and timed.milliseconds,
                "spread": timed and timed.spread,
                "floor_ms": timed and timed.floor_milliseconds,
                "fraction": timed and timed.floor_milliseconds / timed.milliseconds,
                "state_bytes": timed and timed.state_bytes,
                "captured": timed and timed.captured,
                "tokens_per_second": rate,
                "times_transformer": times(rate, base.rate(position) if base else None),
                "times_transformer_here": there / timed.milliseconds if there and timed else None,
                "published_tokens_per_second": paper.GENERATION.get(row.model, {}).get(position),
                "failed": step if isinstance(step, str) else None,
            }
        )
    return made


def decode_figures(rows: Sequence[DecodeRow], gpu: str | None) -> list[Figure]:
    """Samba over the Transformer at the longest generation and at its last position; how near it is to its floor."""
    base, samba = _baseline(rows), next((row for row in rows if row.model == "samba"), None)
    if base is None or samba is None:
        return []
    longest = max(base.steps)
    asked = gpu is not None and demands.CHIP in gpu and longest == demands.DECODE_LENGTH
    asked = asked and samba.batch == paper.GENERATION_BATCH
    made = []
    whole = times(samba.rate(longest), base.rate(longest))
    what = f"decode samba over {BASELINE}, batch {samba.batch}"
    if whole is not None:
        bound = demands.DECODE_RATIO if asked else None
        made.append(demands.judged(f"{what}, generating {longest}", whole, "x", bound))
    there, ours = base.milliseconds(longest), samba.milliseconds(longest)
    if there is not None and ours is not None:
        bound = demands.DECODE_RATIO_THERE if asked else None
        made.append(demands.judged(f"{what}, at position {longest}", there / ours, "x", bound))
    step = base.steps[longest]
    if isinstance(step, DecodeTime):
        bound = demands.DECODE_BASELINE_FRACTION if asked else None
        what = f"decode {BASELINE}, at position {longest}: of its bandwidth floor"
        made.append(demands.judged(what, step.floor_milliseconds / step.milliseconds, "", bound))
    return made


def _decode_table(rows: Sequence[DecodeRow], title: str) -> Table:
    shown, own = [], []
    for row in rows:
        for facts in _decode_json(row, rows):
            if row.model == "samba":
                own.append(len(shown))
            what = (row.model, byte_count(facts["position"]))
            if facts["failed"] is not None:
                shown.append((*what, str(facts["failed"]), "", "", "", "", ""))
                continue
            rate, whole, here = facts["tokens_per_second"], facts["times_transformer"], facts["times_transformer_here"]
            shown.append(
                (
                    *what,
                    number(facts["step_ms"]),
                    number(facts["floor_ms"]),
                    f"{facts['fraction']:.0%}",
                    "" if here is None else f"{here:.2f}x",
                    "" if rate is None else f"{rate:,.0f}",
                    "" if whole is None else f"{whole:.2f}x",
                )
            )
    headings = (
        "model",
        "position",
        "step, ms",
        "floor, ms",
        "reached",
        f"over {BASELINE}",
        "tokens/s up to it",
        f"over {BASELINE}",
    )
    return Table(title, headings, shown, right=(1, 2, 3, 4, 5, 6, 7), own=own)


def _decode_plots(rows: Sequence[DecodeRow], published: set[str]) -> list[Lines]:
    """Tokens a second, and how many times the baseline's that is."""
    base = _baseline(rows)
    rates: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for position in row.steps:
            rate = row.rate(position)
            if rate is None:
                continue
            rates.setdefault(row.model, []).append((position, rate))
            ratio = times(rate, base.rate(position) if base else None)
            if ratio is not None and row.model != BASELINE:
                ratios.setdefault(row.model, []).append((position, ratio))
    printed = {name: sorted(paper.GENERATION[name].items()) for name in sorted(published)}
    slowest = paper.GENERATION[BASELINE]
    over = {name: [(length, rate / slowest[length]) for length, rate in points] for name, points in printed.items()}
    x = "tokens generated"
    return [
        *curves_plot("Generating", x, "tokens/s", rates, printed),
        *curves_plot(f"Generating, over {BASELINE}", x, "times", ratios, over),
    ]
