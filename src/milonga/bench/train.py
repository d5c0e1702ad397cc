"""`milonga bench train`: whole training steps, beside what their matrix products alone would take."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from milonga.bench.ceilings import Ceilings
from milonga.bench.models import TrainingShape, product_flops
from milonga.bench.peers import WITH_MODELS, absent, one_line, peer_models
from milonga.bench.result import BenchResult, Progress, silent
from milonga.bench.study import attempt, forget
from milonga.bench.timing import synchronize
from milonga.bench.train_rows import OURS, Precision, TrainRow, figures_of, plots, table
from milonga.data.windows import Batch
from milonga.errors import UserError
from milonga.models.accounting import flops_per_token, parameter_count
from milonga.training import (
    CapturedGradient,
    OptimizerConfig,
    TrainingConfig,
    apply_training,
    build_optimizer,
    training_step,
)

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Positions at which the arithmetic of a token is looked up and averaged.
_SAMPLES = 257


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


class Made(NamedTuple):
    """A model that is ready to be trained."""

    step: Callable[[], float]  # gives its loss in nats a token
    parameters: int
    captured: CapturedGradient | None = None  # what replays its passes, if it is asked to


def step_of(
    shape: TrainingShape, device: torch.device, precision: Precision, compile_: bool, capture: bool = True
) -> Made:
    """The library's own training step of a new model. The batch is on the CPU, as those of a run are."""
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
    batch = random_batch(shape, torch.device("cpu"))
    captured = CapturedGradient(capture)

    def step() -> float:
        result = training_step(
            forward, optimizer, batch, device=device, lr=1e-4, precision=precision, gradient_of=captured
        )
        return result.nats / result.tokens

    return Made(step, sum(parameter.numel() for parameter in network.parameters()), captured)


def peer_step(model: nn.Module, shape: TrainingShape, device: torch.device, precision: Precision) -> Made:
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

    return Made(step, sum(parameter.numel() for parameter in model.parameters()))


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
    make: Callable[[], Made],
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
    step, parameters, captured = make()
    built = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - built
    for _ in range(2):  # the third captures
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
        captured=captured is not None and captured.captured,
        parameters=parameters,
        seconds=middle,
        spread=(max(times) - min(times)) / 2 / middle,
        steps=steps,
        first=first,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
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

        def make(model: nn.Module = model) -> Made:
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
    capture: bool = True,
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

        def ours(shape: TrainingShape = shape) -> Made:
            return step_of(shape, device, precision, compile_, capture)

        own = attempt(partial(_row, shape, OURS, ours, precision, compile_, budget, ceilings, say))
        if isinstance(own, TrainRow):
            rows.append(own)
        elif len(shapes) == 1:
            raise UserError(
                f"{shape.name}: {own} at batch {shape.batch} x {shape.length}; give a smaller --batch or --length"
            )
        else:
            notes.append(f"{shape.name} was left out: {own} at batch {shape.batch} x {shape.length}")
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
        "capture": capture,
        "device": str(device),
    }
    notes += _explained(precision, device, peers)
    return BenchResult(
        "train",
        settings,
        [row.to_json() for row in rows],
        figures_of(rows, gpu),
        [table(rows, f"Training in {precision} on {gpu or 'the CPU'}")],
        plots(rows),
        ceilings.to_json(),
        notes,
    )


def _explained(precision: Precision, device: torch.device, peers: bool) -> list[str]:
    """What is missing beside the rows, and what the words of the table mean."""
    notes = [
        *(absent(WITH_MODELS) if peers else []),
        "utilisation: FLOPs of a step (6 x parameters x tokens; or as counted from the config) over the time of a step "
        f"and the measured rate of {precision} matrix products; floor: the matrix products of both passes alone",
    ]
    if device.type == "cuda":
        notes.append(
            "captured: both passes replayed as a CUDA graph; launched: each kernel from Python; memory: the most that "
            "tensors took at once, those inside a graph included, of the most that PyTorch held for them"
        )
    return notes
