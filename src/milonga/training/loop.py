"""The one training loop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from milonga.errors import UserError
from milonga.files import FolderLock
from milonga.inference.language_model import choose_device
from milonga.state import to_flat
from milonga.training.captured import CapturedGradient
from milonga.training.checkpoint import save_checkpoint
from milonga.training.config import RunConfig
from milonga.training.metrics import MetricsLog
from milonga.training.report import Callback, Phase, Progress, TrainingResult
from milonga.training.schedule import learning_rate
from milonga.training.signals import Interrupted, StopRequests
from milonga.training.start import Run, open_run, stored_config
from milonga.training.step import Forward, StepResult, enter, leave, training_step


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Callback | None = None,
    device: str | torch.device | None = None,
) -> TrainingResult:
    """Train `config` in the folder `out`, to its last step.

    Which samples a step sees, its learning rate and its random numbers are functions of the config and the step alone,
    so a run that was killed and resumed ends with the same bits as one that was not.

    Args:
        config: see `RunConfig`. A run that gives minutes gets its number of steps before step 0.
        out: the run's folder: run.yaml, metrics.jsonl, checkpoints/, data/.
        resume: continue the run in `out` from its last checkpoint; `config` must be the one it was started with, but
            for steps, device and how many checkpoints are kept.
        progress: called with a `Progress` after every step.
        device: overrides the config's.

    Raises:
        UserError: for a folder that holds another run or is being written to, data that cannot be read, a damaged
            checkpoint, a full disk, a loss that is NaN or infinite. What was saved before stays whole.
        Interrupted: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    asked = config.training.device
    where = choose_device(device if device is not None else None if asked == "auto" else asked)
    report = progress or (lambda _: None)
    if resume:
        stored_config(out)  # before a lock would make the folder
    with FolderLock(out):
        run = open_run(config, Path(out), where, resume=resume, progress=report)
        training = config.training
        with MetricsLog(run.folder, run.position.step, tensorboard=training.tensorboard) as metrics:
            loop = _Loop(run, metrics, report)
            try:
                return loop.finish()
            finally:
                loop.close()


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside depend on the run's seed and the step alone; outside nothing changes."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


class _Loop:
    """A run under way: what changes from step to step."""

    def __init__(self, run: Run, metrics: MetricsLog, report: Callback):
        self.run, self.metrics, self.report = run, metrics, report
        self.training = run.config.training
        self.position, self.state, self.checkpoint = run.position, run.state, run.checkpoint
        self.forward: Forward = torch.compile(run.network) if self.training.compile else run.network
        self.gradient = CapturedGradient(self.training.capture, capturing=lambda: self._report("capturing"))
        self.saved_step = run.position.step if run.checkpoint is not None else None
        self.lr, self.grad_norm = 0.0, 0.0  # of the last step
        self.train_bits: float | None = None  # of the last line of metrics, for the display and the result
        self.began = time.monotonic()

    def finish(self) -> TrainingResult:
        """Take all steps that are left."""
        if self.position.step < self.run.steps and (self.run.device.type == "cuda" or self.training.compile):
            self._report("compiling")
        with StopRequests() as stop:
            while self.position.step < self.run.steps:
                if stop.number is not None:
                    self._leave(stop.number)
                self._step()
                self._report("training")
                step, last = self.position.step, self.position.step == self.run.steps
                if last or step % self.training.log_every == 0:
                    self._log_pending()
                if last or _due(step, self.training.evaluate_every):
                    self._evaluate()
                if last or _due(step, self.training.save_every):
                    self._save()
            if self.checkpoint is None:
                self._save()
        return self._result()

    def close(self) -> None:
        """Give a graph's memory back, and let go of the callback that holds this loop."""
        self.gradient.release()
        self.gradient = CapturedGradient(False)

    def _step(self) -> None:
        run, training, step = self.run, self.training, self.position.step
        batch = run.sampler.batch(step)
        lr = learning_rate(step, run.steps, training.optimizer.lr, training.schedule)
        before = None if self.state is None else enter(run.network, self.state, batch)
        with _seeded(training.seed, step, run.device):
            result = training_step(
                self.forward,
                run.optimizer,
                batch,
                before,
                device=run.device,
                lr=lr,
                clip=training.optimizer.clip,
                precision=training.precision,
                accumulation=training.accumulation,
                gradient_of=self.gradient,
            )
        if not (math.isfinite(result.nats) and math.isfinite(result.grad_norm)):
            raise UserError(self._diverged(step, result))
        self.state = None if result.state is None else leave(result.state, batch)
        self.lr, self.grad_norm = lr, result.grad_norm
        position = self.position
        self.position = position.model_copy(
            update={
                "step": step + 1,
                "tokens": position.tokens + batch.tokens.numel(),
                "bytes": position.bytes + batch.bytes,
                "pending_nats": position.pending_nats + result.nats,
                "pending_bytes": position.pending_bytes + batch.target_bytes,
            }
        )

    def _diverged(self, step: int, result: StepResult) -> str:
        what = f"the loss is {result.nats}" if not math.isfinite(result.nats) else "the gradient is not finite"
        kept = f"{self.checkpoint} is good and was kept" if self.checkpoint else "no checkpoint had been saved"
        lower = f"{self.training.optimizer.lr / 3:.1g}"
        return (
            f"step {step}: {what}, so training stops; {kept}. Start again in another folder with a lower rate "
            f"(--set training.optimizer.lr={lower}) or a longer warm-up (training.schedule)"
        )

    def _seconds(self) -> float:
        return self.run.position.seconds + time.monotonic() - self.began

    def _pace(self) -> tuple[float | None, float | None]:
        """(bytes per second, seconds left), both since this session began."""
        steps, elapsed = self.position.step - self.run.position.step, time.monotonic() - self.began
        if steps == 0 or elapsed <= 0:
            return None, None
        rate = (self.position.bytes - self.run.position.bytes) / elapsed
        return rate, elapsed / steps * (self.run.steps - self.position.step)

    def _report(self, phase: Phase) -> None:
        position, (rate, left) = self.position, self._pace()
        bits = self.train_bits
        if position.pending_bytes:
            bits = position.pending_nats / position.pending_bytes / math.log(2)
        self.report(Progress(phase, position.step, self.run.steps, bits, rate, left))

    def _clock(self) -> dict[str, float | None]:
        rate, _ = self._pace()
        return {"seconds": round(self._seconds(), 3), "bytes_per_second": rate, "time": round(time.time(), 3)}

    def _log_pending(self) -> None:
        position = self.position
        self.train_bits = position.pending_nats / max(1, position.pending_bytes) / math.log(2)
        line = {
            "step": position.step,
            "bits_per_byte": self.train_bits,
            "learning_rate": self.lr,
            "grad_norm": self.grad_norm,
            "bytes": position.bytes,
        }
        self.metrics.write(line | self._clock())
        self.position = position.model_copy(update={"pending_nats": 0.0, "pending_bytes": 0})

    def _evaluate(self) -> None:
        heldout, bf16 = self.run.heldout, self.training.precision == "bf16"
        if heldout is None:
            return
        self._report("evaluating")
        bits = self.gradient.beside(lambda: heldout.bits_per_byte(self.forward, device=self.run.device, bf16=bf16))
        self.position = self.position.model_copy(update={"evaluation": bits})
        line = {"step": self.position.step, "heldout_bits_per_byte": bits, "bytes": self.position.bytes}
        self.metrics.write(line | self._clock())

    def _save(self) -> None:
        self._report("saving")
        self.metrics.sync()
        self.position = self.position.model_copy(update={"seconds": self._seconds()})
        self.checkpoint = save_checkpoint(
            self.run.folder,
            self.position,
            network=self.run.network,
            optimizer=self.run.optimizer.tensors(),
            state=None if self.state is None else to_flat(self.state),
            config=self.run.config.model_dump(mode="json"),
            data=self.run.sampler.identity(),
            codec=self.run.sampler.corpus.codec,
            keep=self.training.keep,
        )
        self.saved_step = self.position.step

    def _leave(self, number: int) -> None:
        if self.saved_step != self.position.step:
            self._save()
        raise Interrupted(
            f"stopped after step {self.position.step} of {self.run.steps} and saved; "
            f"continue with: milonga train --resume {self.run.folder}",
            number,
        )

    def _result(self) -> TrainingResult:
        position = self.position
        assert self.checkpoint is not None
        return TrainingResult(
            run=self.run.folder,
            checkpoint=self.checkpoint,
            step=position.step,
            bits_per_byte=position.evaluation,
            train_bits_per_byte=self.train_bits,
            bytes=position.bytes,
            seconds=position.seconds,
            bytes_per_second=position.bytes / max(position.seconds, 1e-9),
            parameters=sum(parameter.numel() for parameter in self.run.network.parameters()),
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
