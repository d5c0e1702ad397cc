"""`milonga bench train`: whole training steps, beside what their matrix products alone would take."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from milonga.bench.ceilings import Ceilings
from milonga.bench.demands import CHIP, TRAIN, judged
from milonga.bench.figures import Figure, number
from milonga.bench.models import TrainingShape, product_flops
from milonga.bench.peers import one_line, peer_models
from milonga.bench.result import Bar, Bars, BenchResult, Progress, Table, silent
from milonga.bench.study import forget
from milonga.bench.timing import synchronize
from milonga.data.windows import Batch
from milonga.errors import UserError
from milonga.models.accounting import flops_per_token, parameter_count
from milonga.training import OptimizerConfig, TrainingConfig, apply_training, build_optimizer, training_step

Precision = Literal["fp32", "bf16"]
_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Positions at which the arithmetic of a token is looked up and averaged.
_SAMPLES = 257
_GIB = 2**30
OURS = "milonga"


@dataclass(frozen=True)
class TrainRow:
    """One model's training step."""

    shape: TrainingShape
    who: str  # `milonga`, or a peer's package
    precision: Precision
    compiled: bool
    parameters: int
    seconds: float  # of a step, the median of the blocks
    spread: float  # half the distance between the slowest and the fastest block, over the median
    steps: int
    first: float  # seconds of the first step, compiling included
    peak_bytes: int | None
    flops_6nd: float  # of a step
    flops_counted: float
    floor: float  # seconds of the matrix products alone
    product_rate: float
    loss: float  # nats of a token in the last step: a number, if all is well

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.shape.batch * self.shape.length

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, object]:
        """Times in milliseconds, memory in bytes."""
        return {
            "model": self.shape.name,
            "who": self.who,
            "parameters": self.parameters,
            "vocab_size": self.shape.config.vocab_size,
            "batch": self.shape.batch,
            "length": self.shape.length,
            "precision": self.precision,
            "compiled": self.compiled,
            "recompute": list(self.shape.recompute) if self.who == OURS else None,
            "residual": self.shape.residual if self.who == OURS else None,
            "deterministic": self.shape.deterministic if self.who == OURS else None,
            "tokens_per_second": self.rate,
            "step_ms": self.seconds * 1e3,
            "spread": self.spread,
            "steps": self.steps,
            "first_step_seconds": self.first,
            "peak_bytes": self.peak_bytes,
            "floor_ms": self.floor * 1e3,
            "fraction": self.floor / self.seconds,
            "utilisation_6nd": self.flops_6nd / self.seconds / self.product_rate,
            "utilisation_counted": self.flops_counted / self.seconds / self.product_rate,
            "loss": self.loss,
        }


def random_batch(shape: TrainingShape, device: torch.device) -> Batch:
    """Random tokens, and as targets the tokens after them."""
    generator = torch.Generator().manual_seed(0)
    rows, length = shape.batch, shape.length
    text = torch.randint(shape.config.vocab_size, (rows, length + 1), generator=generator).to(device)
    index = torch.arange(rows)
    return Batch(
        tokens=text[:, :-1].contiguous(),
        targets=text[:, 1:].contiguous(),
        segments=None,
        first=index,
        last=index,
        fresh=torch.ones(rows, dtype=torch.bool),
        bytes=rows * length,
        target_bytes=rows * length,
    )


def step_of(
    shape: TrainingShape, device: torch.device, precision: Precision, compile_: bool
) -> tuple[Callable[[], float], int]:
    """The library's own training step of a new model: -> (one step, which gives its loss in nats; parameters)."""
    network = shape.config.build(device=device)
    settings = TrainingConfig(
        steps=1,
        precision=precision,
        recompute=shape.recompute,
        residual=shape.residual if precision == "bf16" else "fp32",
        deterministic=shape.deterministic,
    )
    apply_training(network, settings)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1e-4))
    forward = torch.compile(network) if compile_ else network
    batch = random_batch(shape, device)

    def step() -> float:
        result = training_step(forward, optimizer, batch, device=device, lr=1e-4, precision=precision)
        return result.nats / result.tokens

    return step, sum(parameter.numel() for parameter in network.parameters())


def peer_step(
    model: nn.Module, shape: TrainingShape, device: torch.device, precision: Precision
) -> tuple[Callable[[], float], int]:
    """A peer's model with PyTorch's fused AdamW, clipping and, for bf16, autocast, as one trains it."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = random_batch(shape, device).tokens

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in model.parameters())


def counted_flops(shape: TrainingShape) -> float:
    """FLOPs of a training step by the library's own accounting, averaged over the positions of a row."""
    last = shape.length - 1
    places = [last * index / (_SAMPLES - 1) for index in range(_SAMPLES)]
    per_token = statistics.fmean(flops_per_token(shape.config, place, training=True) for place in places)
    return per_token * shape.batch * shape.length


def _blocks(
    step: Callable[[], float], device: torch.device, budget: float, least: int
) -> tuple[list[float], int, float]:
    """-> (seconds of a step in each block, steps in all, the last loss). The device is waited for between blocks."""
    synchronize(device)
    began = time.perf_counter()
    loss = step()
    synchronize(device)
    one = time.perf_counter() - began
    inner = max(1, min(5, int(1.0 / max(one, 1e-6))))
    times: list[float] = []
    while len(times) < least or sum(times) * inner < budget:
        began = time.perf_counter()
        for _ in range(inner):
            loss = step()
        synchronize(device)
        times.append((time.perf_counter() - began) / inner)
    return times, inner * len(times), loss


def _row(
    shape: TrainingShape,
    who: str,
    make: Callable[[], tuple[Callable[[], float], int]],
    precision: Precision,
    compiled: bool,
    budget: float,
    ceilings: Ceilings,
    say: Callable[[str], None],
) -> TrainRow:
    device = ceilings.device
    forget()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    say(f"{shape.name}, {who}: the first step, kernels are compiled where they are new")
    began = time.perf_counter()
    step, parameters = make()
    built = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - built
    step()
    say(f"{shape.name}, {who}: {parameters / 1e6:.0f}M parameters, timing (set up in {built - began:.0f} s)")
    times, steps, loss = _blocks(step, device, budget, least=3)
    middle = statistics.median(times)
    rate = ceilings.product(_DTYPE[precision])
    tokens = shape.batch * shape.length
    return TrainRow(
        shape=shape,
        who=who,
        precision=precision,
        compiled=compiled,
        parameters=parameters,
        seconds=middle,
        spread=(max(times) - min(times)) / 2 / middle,
        steps=steps,
        first=first,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        flops_6nd=6.0 * parameter_count(shape.config) * tokens,
        flops_counted=counted_flops(shape),
        floor=3 * product_flops(shape.config, shape.length) * tokens / rate,
        product_rate=rate,
        loss=loss,
    )


def _peer_rows(
    shape: TrainingShape, precision: Precision, budget: float, ceilings: Ceilings, say: Callable[[str], None]
) -> tuple[list[TrainRow], list[str]]:
    """The same shape in other packages: -> (rows, why others are left out)."""
    device = ceilings.device
    rows: list[TrainRow] = []
    notes: list[str] = []
    for package, model in peer_models(shape.config, device.type):
        if isinstance(model, str):
            notes.append(f"{package} is installed but could not be used: {model}")
            continue

        def make(model: nn.Module = model) -> tuple[Callable[[], float], int]:
            return peer_step(model, shape, device, precision)

        try:
            rows.append(_row(shape, package, make, precision, False, budget, ceilings, say))
        except torch.OutOfMemoryError:
            notes.append(f"{package} was left out at {shape.name}: out of memory")
        except Exception as error:  # a peer's fault must not end the measurement
            notes.append(f"{package} was left out at {shape.name}: {one_line(error)}")
    return rows, notes


def bench_train(
    shapes: Sequence[TrainingShape],
    device: torch.device,
    precision: Precision,
    *,
    compile_: bool,
    budget: float = 6.0,
    peers: bool = True,
    progress: Progress = silent,
) -> BenchResult:
    """Time the library's training step of each model, `budget` seconds or three blocks of steps each, and peers'.

    Raises:
        UserError: if the only model does not fit into memory.
    """
    ceilings = Ceilings(device)
    progress(0, len(shapes), "what the machine can do")
    ceilings.product(_DTYPE[precision])
    rows: list[TrainRow] = []
    notes = []
    for index, shape in enumerate(shapes):

        def say(text: str, index: int = index) -> None:
            progress(index, len(shapes), text)

        def ours(shape: TrainingShape = shape) -> tuple[Callable[[], float], int]:
            return step_of(shape, device, precision, compile_)

        try:
            rows.append(_row(shape, OURS, ours, precision, compile_, budget, ceilings, say))
        except torch.OutOfMemoryError as error:
            if len(shapes) == 1:
                raise UserError(
                    f"{shape.name}: out of memory at batch {shape.batch} x {shape.length}; give a smaller --batch"
                ) from error
            notes.append(f"{shape.name} was left out: out of memory at batch {shape.batch} x {shape.length}")
        if peers:
            beside, reasons = _peer_rows(shape, precision, budget, ceilings, say)
            rows += beside
            notes += reasons
    progress(len(shapes), len(shapes), "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    settings = {
        "models": [shape.name for shape in shapes],
        "precision": precision,
        "compile": compile_,
        "device": str(device),
    }
    notes.append(
        "utilisation: FLOPs of a step (6 x parameters x tokens; or as counted from the config) over the time of a step "
        f"and the measured rate of {precision} matrix products; floor: the matrix products of both passes alone"
    )
    return BenchResult(
        "train",
        settings,
        [row.to_json() for row in rows],
        figures_of(rows, gpu),
        [_table(rows, f"Training in {precision} on {gpu or 'the CPU'}")],
        _plots(rows),
        ceilings.to_json(),
        notes,
    )


def figures_of(rows: Sequence[TrainRow], gpu: str | None) -> list[Figure]:
    """Rates and memory with what is asked of them on one H100 at the shapes of record."""
    made = []
    for row in rows:
        if row.who != OURS:
            continue
        asked = TRAIN.get((row.shape.name, row.shape.batch, row.shape.length))
        if gpu is None or CHIP not in gpu or row.precision != "bf16":
            asked = None
        unit = "bytes/s" if row.shape.config.vocab_size == 256 else "tokens/s"
        what = f"train {row.shape.name}, B{row.shape.batch} T{row.shape.length}"
        made.append(judged(what, row.rate, unit, asked.rate if asked else None))
        if row.peak_bytes is not None:
            memory = asked.memory if asked else None
            made.append(judged(f"{what}: peak memory", row.peak_bytes / _GIB, "GiB", memory, at_least=False))
        beside = [other for other in rows if other.shape == row.shape and other.who != OURS]
        if beside:
            best = max(beside, key=lambda other: other.rate)
            made.append(Figure(f"{what}, against {best.who}", row.rate / best.rate, None, "x"))
    return made


def _table(rows: Sequence[TrainRow], title: str) -> Table:
    headings = (
        "model",
        "who",
        "batch",
        "rate",
        "step, ms",
        "spread",
        "floor, ms",
        "reached",
        "6ND",
        "counted",
        "memory",
    )
    shown = []
    for row in rows:
        facts = row.to_json()
        unit = "bytes/s" if row.shape.config.vocab_size == 256 else "tokens/s"
        shown.append(
            (
                f"{row.shape.name} ({row.parameters / 1e6:,.3g}M)",
                row.who,
                f"{row.shape.batch} x {row.shape.length}",
                f"{row.rate:,.0f} {unit}",
                number(row.seconds * 1e3),
                f"{row.spread:.1%}",
                number(row.floor * 1e3),
                f"{row.floor / row.seconds:.0%}",
                f"{facts['utilisation_6nd']:.0%}",
                f"{facts['utilisation_counted']:.0%}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / _GIB:.1f} GiB",
            )
        )
    own = [index for index, row in enumerate(rows) if row.who == OURS]
    return Table(title, headings, shown, right=(3, 4, 5, 6, 7, 8, 9, 10), own=own)


def _plots(rows: Sequence[TrainRow]) -> list[Bars]:
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        bars = groups.setdefault(f"{row.shape.name}, {row.shape.batch} x {row.shape.length}", [])
        if not bars:
            bars.append(Bar("matrix products alone", row.floor * 1e3, "second"))
        kind = "model" if row.who == OURS else "other"
        bars.append(Bar(f"{row.who}: {row.rate:,.0f} a second", row.seconds * 1e3, kind))
    title = "A training step beside its matrix products"
    return [Bars(title, "milliseconds", list(groups.items()))] if groups else []
