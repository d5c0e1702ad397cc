"""`milonga bench prefill`: reading prompts, as in the Samba paper's study, with this library's best path.

As many rows of a length as make a fixed number of tokens; every model has random weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from milonga.bench import demands, paper
from milonga.bench.ceilings import Ceilings, dtype_name
from milonga.bench.figures import Figure, number
from milonga.bench.models import BASELINE, product_flops
from milonga.bench.result import BenchResult, Lines, Progress, Table, silent
from milonga.bench.study import Models, as_published, attempt, curves_plot, forget, settings_of, times
from milonga.errors import UserError
from milonga.evaluation.decoding import PrefillTime, measure_prefill, random_network
from milonga.evaluation.drawing import byte_count

_PAPER = f"paper: {paper.PROMPT_RATIO}x for samba over transformer at one prompt of {paper.PROMPT_TOKENS}, on an A100"


@dataclass(frozen=True)
class PrefillRow:
    """One model, one length of prompts."""

    model: str
    length: int
    batch: int
    outcome: PrefillTime | str  # or why there is none
    floor: float  # seconds of the matrix products alone

    @property
    def seconds(self) -> float | None:
        """Of all rows."""
        return self.outcome.milliseconds / 1e3 if isinstance(self.outcome, PrefillTime) else None

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return self.length * self.batch / self.seconds if self.seconds else None


def bench_prefill(
    models: Models,
    lengths: Sequence[int],
    total: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int = 3,
    progress: Progress = silent,
) -> BenchResult:
    """Time reading `total` tokens as prompts of each length: as many rows as that has room for.

    Raises:
        UserError: if a prompt is longer than that.
    """
    batch_of = batches(lengths, total)
    ceilings = Ceilings(device)
    rows: list[PrefillRow] = []
    parts = len(models) * len(lengths)
    for name, config in models.items():
        progress(len(rows), parts, f"{name}: making random weights")
        network = random_network(config, device, dtype)
        for length in lengths:
            batch = batch_of[length]
            progress(len(rows), parts, f"{name}: {batch} x {byte_count(length)}")

            def work(length: int = length, batch: int = batch) -> PrefillTime:
                return measure_prefill(network, length, batch, repeats=repeats)  # noqa: B023 (called at once)

            floor = product_flops(config, length, head=False) * length * batch / ceilings.product(dtype)
            rows.append(PrefillRow(name, length, batch, attempt(work), floor))
        del network
        forget()
    progress(parts, parts, "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return BenchResult(
        "prefill",
        settings_of(models, device, dtype) | {"lengths": list(lengths), "total": total},
        [_prefill_json(row, rows) for row in rows],
        prefill_figures(rows, gpu),
        [_prefill_table(rows, f"Reading prompts, {dtype_name(dtype)} on {gpu or 'the CPU'}")],
        _prefill_plots(rows, as_published(models)),
        ceilings.to_json(),
        [_PAPER, *_real_totals(batch_of, total)],
    )


def batches(lengths: Sequence[int], total: int) -> dict[int, int]:
    """Rows of each length that `total` tokens have room for.

    Raises:
        UserError: if a length is above the total.
    """
    if too_long := [length for length in lengths if length > total]:
        raise UserError(
            f"--lengths: a prompt of {max(too_long)} tokens is longer than all rows together, {total}; "
            f"give --total {max(too_long)} or more"
        )
    return {length: total // length for length in lengths}


def _real_totals(batch_of: Mapping[int, int], total: int) -> list[str]:
    """Lines on the lengths that do not divide the total."""
    return [
        f"{batch} x {length}: {batch * length} tokens, as prompts of {length} do not make {total}"
        for length, batch in batch_of.items()
        if total % length
    ]


def _prefill_ratio(row: PrefillRow, rows: Sequence[PrefillRow]) -> float | None:
    base = [other.rate for other in rows if other.model == BASELINE and other.length == row.length]
    return times(row.rate, base[0]) if base else None


def _prefill_json(row: PrefillRow, rows: Sequence[PrefillRow]) -> dict[str, Any]:
    timed = row.outcome if isinstance(row.outcome, PrefillTime) else None
    return {
        "model": row.model,
        "length": row.length,
        "batch": row.batch,
        "tokens": row.length * row.batch,
        "piece": timed and timed.piece,
        "ms": timed and timed.milliseconds,
        "spread": timed and timed.spread,
        "tokens_per_second": row.rate,
        "peak_bytes": timed and (timed.peak_bytes or None),
        "floor_ms": row.floor * 1e3,
        "fraction": row.floor / row.seconds if row.seconds else None,
        "times_transformer": _prefill_ratio(row, rows),
        "failed": row.outcome if isinstance(row.outcome, str) else None,
    }


def prefill_figures(rows: Sequence[PrefillRow], gpu: str | None) -> list[Figure]:
    """The longest prompts: times, and Samba over the Transformer."""
    made = []
    longest = max((row.length for row in rows), default=0)
    asked = gpu is not None and demands.CHIP in gpu and longest == demands.PREFILL_LENGTH
    bounds = {"samba": demands.PREFILL_MILLISECONDS, BASELINE: demands.PREFILL_BASELINE_MILLISECONDS}
    for row in rows:
        if row.length != longest or row.seconds is None:
            continue
        what = f"prefill {row.model}, {row.batch} x {row.length}"
        bound = bounds.get(row.model) if asked and row.batch == 1 else None
        made.append(demands.judged(what, row.seconds * 1e3, "ms", bound, at_least=False))
        ratio = _prefill_ratio(row, rows)
        if row.model == "samba" and ratio is not None:
            bound = demands.PREFILL_RATIO if asked else None
            made.append(demands.judged(f"{what}, over {BASELINE}", ratio, "x", bound))
    return made


def _prefill_table(rows: Sequence[PrefillRow], title: str) -> Table:
    shown = []
    for row in rows:
        what = (row.model, f"{row.batch} x {byte_count(row.length)}")
        if row.seconds is None or row.rate is None:
            shown.append((*what, str(row.outcome), "", "", "", ""))
            continue
        ratio = _prefill_ratio(row, rows)
        shown.append(
            (
                *what,
                number(row.seconds * 1e3),
                f"{row.rate:,.0f}",
                number(row.floor * 1e3),
                f"{row.floor / row.seconds:.0%}",
                "" if ratio is None else f"{ratio:.2f}x",
            )
        )
    headings = ("model", "prompts", "ms", "tokens/s", "floor, ms", "reached", f"over {BASELINE}")
    own = [index for index, row in enumerate(rows) if row.model == "samba"]
    return Table(title, headings, shown, right=(1, 2, 3, 4, 5, 6), own=own)


def _prefill_plots(rows: Sequence[PrefillRow], published: set[str]) -> list[Lines]:
    """Tokens a second, and how many times the baseline's that is; of the paper's, the closing ratio is known."""
    rates: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.rate is None:
            continue
        rates.setdefault(row.model, []).append((row.length, row.rate))
        ratio = _prefill_ratio(row, rows)
        if ratio is not None and row.model != BASELINE:
            ratios.setdefault(row.model, []).append((row.length, ratio))
    printed = {"samba": [(paper.PROMPT_TOKENS, paper.PROMPT_RATIO)]} if "samba" in published else {}
    x = "tokens of a prompt"
    return [
        *curves_plot("Reading prompts", x, "tokens/s", rates, {}),
        *curves_plot(f"Reading prompts, over {BASELINE}", x, "times", ratios, printed),
    ]
