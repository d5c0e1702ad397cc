"""`milonga bench ops`: every op against its floor and against its peers, in one run."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milonga.bench.cases import OPS, Case, Contender, Letters, Op
from milonga.bench.ceilings import Ceilings, dtype_name
from milonga.bench.demands import AS_FAST_AS_PEERS, CHIP, Demand, demand, judged
from milonga.bench.figures import Figure
from milonga.bench.peers import OF_OP, absent, peers_of
from milonga.bench.result import Bar, Bars, BenchResult, Progress, Table, silent
from milonga.bench.study import no_room
from milonga.bench.timing import Call, Failure, Timing, measure
from milonga.bench.work import Floor, Work, floor_of_passes
from milonga.errors import UserError
from milonga.evaluation.machine import available_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = {"forward": (False,), "both": (True,), "all": (False, True)}
# Outputs of an op and of a peer that differ by more (relative RMS) are no measurements of the same thing.
_SAME = 0.05


@dataclass(frozen=True)
class OpRow:
    """One implementation of one op at one shape."""

    op: str
    shape: Letters
    dtype: str
    both: bool
    who: str
    backend: str | None  # ours only
    outcome: Timing | Failure
    ratio: float | None  # its time over ours
    difference: float | None  # relative RMS against our output
    work: tuple[Work, ...]  # of the passes
    floor: Floor | None = None  # known once everything is measured

    @property
    def passes(self) -> str:
        """`forward`, or `forward + backward`."""
        return "forward + backward" if self.both else "forward"

    @property
    def title(self) -> str:
        """`scan B8 T4096 E3072 N16 bf16`."""
        return f"{self.op} {shape_text(self.shape)} {self.dtype}"

    @property
    def fraction(self) -> float | None:
        """Of the floor's speed, how much is reached: 1 is the floor itself."""
        if self.floor is None or isinstance(self.outcome, Failure):
            return None
        return self.floor.seconds / self.outcome.median

    def to_json(self) -> dict[str, object]:
        """Times in milliseconds, memory in bytes."""
        timed = self.outcome if isinstance(self.outcome, Timing) else None
        return {
            "op": self.op,
            "shape": dict(self.shape),
            "dtype": self.dtype,
            "pass": "both" if self.both else "forward",
            "who": self.who,
            "backend": self.backend,
            "ms": timed and timed.median * 1e3,
            "best_ms": timed and timed.best * 1e3,
            "spread": timed and timed.spread,
            "repeats": timed and timed.repeats,
            "host_ms": timed and timed.host * 1e3,
            "queued": timed and timed.queued,
            "first_call_ms": timed and timed.first * 1e3,
            "peak_bytes": timed and timed.peak_bytes,
            "floor_ms": self.floor and self.floor.seconds * 1e3,
            "bound": self.floor and self.floor.bound,
            "fraction": self.fraction,
            "times_ours": self.ratio,
            "difference": self.difference,
            "failed": self.outcome.reason if isinstance(self.outcome, Failure) else None,
        }


def shape_text(letters: Letters) -> str:
    """`B8 T4096 E3072 N16`."""
    return " ".join(f"{letter}{number}" for letter, number in letters.items())


def parse_ops(names: str | None) -> list[Op]:
    """The ops of a list such as `scan,conv`; all for None.

    Raises:
        UserError: if one is not known.
    """
    if names is None:
        return list(OPS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in OPS]
    if unknown or not wanted:
        raise UserError(f"--op: no op {unknown[0] if unknown else names!r}; choose from {', '.join(OPS)}")
    return [OPS[name] for name in dict.fromkeys(wanted)]


def parse_shape(text: str) -> tuple[int, ...]:
    """The numbers of `8,4096,3072`.

    Raises:
        UserError: if it is no list of whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,12}", part) for part in parts):
        raise UserError(f"--shape: expected whole numbers such as 8,4096,3072, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; for None bf16 on a GPU and fp32 on a CPU.

    Raises:
        UserError: if it is not known.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype: no dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def one_pass(contender: Contender, both: bool) -> Call:
    """What is timed: the forward pass alone keeps nothing for another."""
    if not both:

        def forward() -> Tensor:
            with torch.no_grad():
                return contender.run(*contender.leaves)

        return forward
    upstream: list[Tensor] = []

    def both_passes() -> object:
        out = contender.run(*contender.leaves)
        if not upstream:
            upstream.append(torch.randn_like(out))
        return torch.autograd.grad(out, contender.leaves, upstream[0])

    return both_passes


def _difference(got: Tensor, ours: Tensor) -> float:
    """Relative RMS; a peer that gives a mean is compared with our mean."""
    if got.shape != ours.shape:
        got, ours = got.float().mean(), ours.float().mean()
    return float((got.float() - ours.float()).norm() / ours.float().norm().clamp_min(1e-30))


def _checked(contenders: list[Contender], device: torch.device) -> tuple[list[Contender], dict[str, Failure | float]]:
    """Leave out what does not fit into memory, fails, or computes something else."""
    found: dict[str, Failure | float] = {}
    kept = []
    free = available_bytes(device)
    with torch.no_grad():
        ours: Tensor | None = None
        for contender in contenders:
            if contender.needs > 0.9 * free:
                found[contender.name] = Failure(f"left out: it needs about {contender.needs / 2**30:.0f} GiB")
                continue
            try:
                out = contender.run(*contender.leaves)
                difference = 0.0 if ours is None else _difference(out, ours)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                found[contender.name] = Failure("out of memory")
                continue
            except Exception as error:
                line = (str(error).splitlines() or [""])[0]
                found[contender.name] = Failure(f"{type(error).__name__}: {line}"[:200])
                continue
            ours = out if ours is None and contender is contenders[0] else ours
            if difference > _SAME or difference != difference:
                found[contender.name] = Failure(f"it computes something else: relative difference {difference:.2g}")
                continue
            found[contender.name] = difference
            kept.append(contender)
    return kept, found


def _rows(
    op: Op, case: Case, contenders: list[Contender], both: bool, device: torch.device, step: Callable[[str], None]
) -> list[OpRow]:
    contenders = [one for one in contenders if not (both and one.slow_backward)]
    for contender in contenders:
        step(f"{case.op} {shape_text(case.letters)}: {contender.name}: compiling where it is the first use")
    kept, found = _checked(contenders, device)
    calls = {one.name: one_pass(one, both) for one in kept}
    outcomes = measure(calls, device) if calls else {}
    mine = outcomes.get(case.ours.name)
    rows = []
    for contender in contenders:
        name = contender.name
        known = found[name]
        outcome = known if isinstance(known, Failure) else outcomes[name]
        ratio = None
        if isinstance(outcome, Timing) and isinstance(mine, Timing):
            ratio = outcome.median / mine.median
        rows.append(
            OpRow(
                op=case.op,
                shape=case.letters,
                dtype=dtype_name(case.dtype),
                both=both,
                who=name,
                backend=op.backend(device, case.dtype) if contender is case.ours else None,
                outcome=outcome,
                ratio=ratio,
                difference=known if isinstance(known, float) and contender is not case.ours else None,
                work=case.passes if both else case.passes[:1],
            )
        )
    return rows


def jobs_of(
    ops: Sequence[Op], shapes: Sequence[tuple[int, ...]], device: torch.device, passes: str
) -> list[tuple[Op, Letters, bool]]:
    """What is measured: op, shape, whether with the backward pass.

    Raises:
        UserError: if a shape does not fit an op, or `passes` is not known.
    """
    if passes not in PASSES:
        raise UserError(f"--pass: expected one of {', '.join(PASSES)}, got {passes!r}")
    jobs: list[tuple[Op, Letters, bool]] = []
    for op in ops:
        own = op.on_gpu if device.type == "cuda" else op.on_cpu
        for numbers in shapes or own:
            jobs += [(op, op.shape(numbers), both) for both in PASSES[passes]]
    return jobs


def bench_ops(
    ops: Sequence[Op],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    passes: str = "all",
    *,
    peers: bool = True,
    progress: Progress = silent,
) -> BenchResult:
    """Measure ops at shapes (each op's own where none is given).

    Raises:
        UserError: if a shape does not fit an op, or `passes` is not known.
    """
    jobs = jobs_of(ops, shapes, device, passes)
    ceilings = Ceilings(device)
    ceilings.product(dtype)
    rows: list[OpRow] = []
    notes: list[str] = []
    case: Case | None = None
    contenders: list[Contender] = []
    for index, (op, letters, both) in enumerate(jobs):
        what = f"{op.name} {shape_text(letters)}, {'forward + backward' if both else 'forward'}"
        progress(index, len(jobs), what)
        if case is None or (case.op, case.letters) != (op.name, letters):
            case, contenders = None, []  # free the memory first
            case = _built(op, letters, device, dtype)
            offered, left_out = peers_of(case) if peers else ([], {})
            contenders = [case.ours, *offered]
            notes += [f"{package} is installed but could not be used: {why}" for package, why in left_out.items()]

        def step(text: str, index: int = index) -> None:
            progress(index, len(jobs), text)

        rows += _rows(op, case, contenders, both, device, step)
    progress(len(jobs), len(jobs), "the floors")
    rows = _with_floors(rows, ceilings, dtype)
    if peers:
        notes += absent(package for op in ops for package in OF_OP[op.name])
    if device.type == "cuda" and ceilings.exps is None:
        notes.append("exponentials could not be counted: Triton is not installed")
    notes += _waited(rows)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    settings = {
        "ops": [op.name for op in ops],
        "shapes": [list(shape) for shape in shapes],
        "dtype": dtype_name(dtype),
        "device": str(device),
        "pass": passes,
    }
    return BenchResult(
        "ops",
        settings,
        [row.to_json() for row in rows],
        figures_of(rows, gpu),
        [_table(rows, f"Ops in {dtype_name(dtype)} on {gpu or 'the CPU'}")],
        _plots(rows),
        ceilings.to_json(),
        list(dict.fromkeys(notes)),
    )


def _waited(rows: Sequence[OpRow]) -> list[str]:
    """What to say of times that may hold the host's part."""
    return [
        f"{row.title}, {row.passes}: the device may have waited for the host while {row.who} was timed"
        for row in rows
        if isinstance(row.outcome, Timing) and not row.outcome.queued
    ]


def _with_floors(rows: list[OpRow], ceilings: Ceilings, dtype: torch.dtype) -> list[OpRow]:
    if ceilings.device.type == "cpu":
        ceilings.product(torch.float32)
        ceilings.again()
    return [replace(row, floor=floor_of_passes(row.work, ceilings, dtype)) for row in rows]


def _built(op: Op, letters: Letters, device: torch.device, dtype: torch.dtype) -> Case:
    try:
        return op.build(letters, device, dtype)
    except (MemoryError, RuntimeError) as error:
        if not no_room(error):
            raise
        raise UserError(f"--shape: inputs of {op.name} {shape_text(letters)} do not fit into memory") from error


def figures_of(rows: Sequence[OpRow], gpu: str | None) -> list[Figure]:
    """Our times with what is asked of them, and how much faster we are than the fastest beside us."""
    made = []
    for ours in rows:
        if ours.backend is None or not isinstance(ours.outcome, Timing):
            continue
        what = f"{ours.title}, {ours.passes}"
        asked = demand(ours.op, tuple(ours.shape.values()), ours.both, ours.dtype, gpu)
        made.append(judged(what, ours.outcome.median * 1e3, "ms", asked, at_least=False))
        beside = [
            (row.ratio, row.who)
            for row in rows
            if row.backend is None
            and row.ratio is not None
            and (row.op, row.shape, row.both) == (ours.op, ours.shape, ours.both)
        ]
        if beside:
            ratio, who = min(beside)
            asked_too = gpu is not None and CHIP in gpu and ours.op in AS_FAST_AS_PEERS
            made.append(judged(f"{what}, against {who}", ratio, "x", Demand(1.0) if asked_too else None))
    return made


def _table(rows: Sequence[OpRow], title: str) -> Table:
    shown = []
    for row in rows:
        what = f"{row.op} {shape_text(row.shape)}"
        passes = "both" if row.both else "forward"
        who = row.who if row.backend is None else f"{row.who} ({row.backend})"
        if isinstance(row.outcome, Failure) or row.floor is None:
            reason = row.outcome.reason if isinstance(row.outcome, Failure) else ""
            shown.append((what, passes, who, "-", "", "", "", reason))
            continue
        shown.append(
            (
                what,
                passes,
                who,
                f"{row.outcome.median * 1e3:.3g}",
                f"{row.outcome.spread:.0%}",
                f"{row.floor.seconds * 1e3:.3g} {row.floor.bound}",
                f"{row.fraction:.0%}",
                "" if row.ratio is None or row.backend is not None else f"{row.ratio:.2f}x ours",
            )
        )
    headings = ("op", "pass", "who", "ms", "spread", "floor, ms", "reached", "")
    own = [index for index, row in enumerate(rows) if row.backend is not None]
    return Table(title, headings, shown, right=(3, 4, 6), own=own)


def _plots(rows: Sequence[OpRow]) -> list[Bars]:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        if isinstance(row.outcome, Failure) or row.floor is None:
            continue
        bars = groups.setdefault(f"{row.op} {shape_text(row.shape)}, {row.passes}", [])
        if not bars:
            bars.append(Bar(f"floor: {row.floor.bound}", row.floor.seconds * 1e3, "second"))
        bars.append(Bar(row.who, row.outcome.median * 1e3, "model" if row.backend is not None else "other"))
    return [Bars("Time beside the floor", "milliseconds", list(groups.items()))] if groups else []
