"""How many steps fit into some minutes: measured on a copy, decided once."""

import copy
import statistics
import time

import torch

from milonga.data.windows import WindowSampler
from milonga.models import Network
from milonga.training.captured import CapturedGradient
from milonga.training.config import TrainingConfig
from milonga.training.heldout import HeldOut, batch_nats
from milonga.training.optimizer import build_optimizer
from milonga.training.step import enter, training_step

WARM_UP, TIMED = 2, 5


def steps_that_fit(
    config: TrainingConfig, network: Network, sampler: WindowSampler, heldout: HeldOut | None, device: torch.device
) -> int:
    """The number of steps that, with their evaluations, take about `config.minutes` on this machine; at least 1.

    Real steps on real batches are timed, on a copy of the network: its weights stay as they are.
    """
    assert config.minutes is not None, "only where the recipe gives minutes"
    trial = copy.deepcopy(network)
    bf16 = config.precision == "bf16"
    per_step = _seconds_of_a_step(config, trial, sampler, device)
    per_evaluation = 0.0
    if heldout is not None:
        batch_nats(trial, heldout.batch(0), device=device, bf16=bf16)
        began = time.perf_counter()
        batch_nats(trial, heldout.batch(0), device=device, bf16=bf16)
        per_evaluation = (time.perf_counter() - began) * heldout.count
    budget = config.minutes * 60 - per_evaluation  # one comes at the end in any case
    cost = per_step + (per_evaluation / config.evaluate_every if config.evaluate_every else 0.0)
    return max(1, int(budget / cost))


def _seconds_of_a_step(config: TrainingConfig, trial: Network, sampler: WindowSampler, device: torch.device) -> float:
    optimizer = build_optimizer(trial, config.optimizer)
    carried = trial.init_state(config.batch, device=device) if sampler.carried else None
    captured = CapturedGradient(config.capture)
    warm_up = WARM_UP + (device.type == "cuda")  # the third step captures
    seconds = []
    for index in range(warm_up + TIMED):
        began = time.perf_counter()
        batch = sampler.batch(index)
        training_step(
            trial,
            optimizer,
            batch,
            None if carried is None else enter(trial, carried, batch),
            device=device,
            lr=config.optimizer.lr,
            clip=config.optimizer.clip,
            precision=config.precision,
            accumulation=config.accumulation,
            gradient_of=captured,
        )
        seconds.append(time.perf_counter() - began)  # the step has read its loss: nothing is left running on a GPU
    captured.release()
    return statistics.median(seconds[warm_up:])
