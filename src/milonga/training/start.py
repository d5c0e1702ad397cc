"""Opening a run's folder: a new run, or one that continues exactly where its last checkpoint stands."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from milonga.data.bpe import TOKENIZER, load_tokenizer
from milonga.data.prepare import prepare
from milonga.data.text import ByteCodec, TextCodec
from milonga.data.windows import WindowSampler
from milonga.errors import UserError
from milonga.files import ensure_folder, remove_partials, write_atomically
from milonga.layers import Attention
from milonga.models import Network, NetworkState
from milonga.models.pretrained import load_tensors, read_config, read_header
from milonga.state import from_flat
from milonga.training.checkpoint import CHECKPOINTS, Checkpoint, Position, last_checkpoint, remove_remains
from milonga.training.config import RunConfig, TrainingConfig, changed_keys
from milonga.training.heldout import HeldOut
from milonga.training.metrics import check_tensorboard
from milonga.training.optimizer import Optimizer, build_optimizer
from milonga.training.report import Callback, Progress
from milonga.training.timing import steps_that_fit

RUN_FILE = "run.yaml"
DATA = "data"


class Run(NamedTuple):
    """All that a loop needs."""

    folder: Path
    config: RunConfig  # with its number of steps
    device: torch.device
    network: Network
    optimizer: Optimizer
    sampler: WindowSampler
    heldout: HeldOut | None
    state: NetworkState | None  # a row per row of the batch, where states are carried
    position: Position
    checkpoint: Path | None  # where it continues from

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        assert self.config.training.steps is not None
        return self.config.training.steps


def stored_config(folder: str | Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        UserError: if `folder` holds no run, or its config is not one that this version reads.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: holds no run ({RUN_FILE} is missing); start one with milonga train RECIPE --out {folder}"
        )
    return RunConfig.load(path)


def _check_compiler(device: torch.device) -> None:
    """Raises:
    UserError: if `torch.compile` would need a C++ compiler that is not there.
    """
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise UserError(
            "training.compile: on a CPU torch.compile needs a C++ compiler (g++, say), and none was found; "
            "install one, or train with --set training.compile=false"
        )


def open_run(config: RunConfig, folder: Path, device: torch.device, *, resume: bool, progress: Callback) -> Run:
    """Build or load everything; for a new run, fix its number of steps and write the config. The folder is locked.

    Raises:
        UserError: if a new run would write over another, a continued one would differ from what it was, a checkpoint is
            damaged, or the data cannot be read.
    """
    remove_partials(folder)
    remove_remains(folder)
    checkpoint = _agreed(config, folder) if resume else _unused(config, folder)
    if config.training.steps is None and resume:
        config = config.with_steps(stored_config(folder).training.steps or 0)
    if config.training.tensorboard:
        check_tensorboard()
    if config.training.compile:
        _check_compiler(device)
    codec = _codec(config, folder, resume=resume)
    sampler, heldout = _data(config, folder, codec, progress)
    if checkpoint is not None and checkpoint.data != sampler.identity():
        changed = [key for key, value in sampler.identity().items() if checkpoint.data.get(key) != value]
        raise UserError(
            f"{folder}: the training data are not those of {checkpoint.path.name} (changed: {', '.join(changed)}); "
            "restore the files, or start a new run in another folder"
        )
    network = config.model.build(seed=config.training.seed, device=device)
    apply_training(network, config.training)
    if checkpoint is not None:
        _load_weights(network, checkpoint, config)
    if config.training.steps is None:
        progress(Progress("timing", 0, None))
        config = config.with_steps(steps_that_fit(config.training, network, sampler, heldout, device))
    optimizer = build_optimizer(network, config.training.optimizer)
    state = network.init_state(config.training.batch, device=device) if config.data.carried else None
    position = Position()
    if checkpoint is not None:
        position = checkpoint.position
        optimizer.load_tensors(checkpoint.optimizer())
        flat = checkpoint.state()
        state = None if flat is None or state is None else from_flat(flat, like=state)
    write_atomically(folder / RUN_FILE, config.dump())
    ensure_folder(folder / CHECKPOINTS)
    where = checkpoint.path if checkpoint is not None else None
    return Run(folder, config, device, network, optimizer, sampler, heldout, state, position, where)


def apply_training(network: Network, training: TrainingConfig) -> None:
    """Tell a network how it is to be trained: what it makes again, the dtype of its stream, the order of its sums."""
    network.recompute = training.recompute
    network.residual_dtype = torch.bfloat16 if training.residual == "bf16" else None
    for layer in network.layers():
        if isinstance(layer, Attention):
            layer.deterministic = training.deterministic


def _unused(config: RunConfig, folder: Path) -> None:
    """A new run may not write over another."""
    if not (folder / RUN_FILE).exists():
        return
    differs = ""
    try:
        keys = changed_keys(stored_config(folder), config)
        differs = f" with other settings ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else ""
    except UserError:
        differs = " that this version cannot read"
    raise UserError(
        f"{folder} already holds a run{differs}: continue it with milonga train --resume {folder}, "
        "choose another folder with --out, or remove it"
    )


def _agreed(config: RunConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to continue from, if the config is the one it was made with; None before the first checkpoint."""
    stored = stored_config(folder)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        stored = RunConfig.parse(checkpoint.config, str(checkpoint.path))
    keys = changed_keys(stored, config)
    if keys:
        raise UserError(
            f"{folder}: cannot continue with another {', '.join(keys)}: the result would be neither run; "
            "leave it as it was, or start a new run in another folder"
        )
    return checkpoint


def _load_weights(network: Network, checkpoint: Checkpoint, config: RunConfig) -> None:
    path = checkpoint.weights
    if read_config(path, read_header(path)) != config.model:
        raise UserError(f"{path}: weights of another architecture than the run's {RUN_FILE}; put the right files back")
    load_tensors(network, path)


def _codec(config: RunConfig, folder: Path, *, resume: bool) -> TextCodec:
    """What the run reads text with. A tokenizer is copied into the run's folder; a continued run takes that copy."""
    if config.data.tokenizer is None:
        return ByteCodec()
    given, kept = Path(config.data.tokenizer).expanduser(), folder / TOKENIZER
    continued = resume and kept.is_file()
    codec = load_tokenizer(kept if continued else given)
    if continued and given.is_file() and load_tokenizer(given) != codec:
        raise UserError(
            f"{folder}: cannot continue with another tokenizer: {given} has changed since the run began (it kept "
            f"{kept}); put it back or remove it, or start a new run in another folder"
        )
    if config.model.vocab_size != codec.vocab_size:
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {given} has {codec.vocab_size} tokens: "
            f"set model.vocab_size={codec.vocab_size}, or train a tokenizer with --vocab-size {config.model.vocab_size}"
        )
    if not continued:
        codec.save(kept)
    return codec


def _data(
    config: RunConfig, folder: Path, codec: TextCodec, progress: Callback
) -> tuple[WindowSampler, HeldOut | None]:
    training = config.training
    train, held = prepare(
        config.data,
        folder / DATA,
        seed=training.seed,
        codec=codec,
        progress=lambda done, total: progress(Progress("reading", done, total)),
    )
    left_out = dict.fromkeys(name for corpus in (train, held) if corpus is not None for name in corpus.skipped)
    if left_out:
        progress(Progress("reading", 0, None, left_out=tuple(left_out)))
    sampler = WindowSampler(
        train,
        window=training.window,
        batch=training.batch,
        seed=training.seed,
        carried=config.data.carried,
        isolate=config.data.isolate,
    )
    if held is None:
        return sampler, None
    tokens = config.evaluation.tokens
    heldout = HeldOut(held, window=training.window, batch=training.batch, tokens=tokens, isolate=config.data.isolate)
    return sampler, heldout
