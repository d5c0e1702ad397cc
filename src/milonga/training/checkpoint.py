"""Checkpoints: everything that the next step depends on, complete or not there at all.

    RUN/checkpoints/step-00000100/model.safetensors      weights and model config (`models/pretrained.py`)
                                  optimizer.safetensors  moments, named `parameter/moment`
                                  state.safetensors      the carried state, where training carries one
                                  tokenizer.json         what made the tokens, for a model of subwords
                                  trainer.json           format, position, config, sha256 of each file

A checkpoint is written to a hidden folder beside its place; every file is synced, then the folder is renamed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import load_file
from torch import Tensor

from milonga.data.bpe import TOKENIZER, BpeCodec
from milonga.data.text import TextCodec
from milonga.errors import UserError
from milonga.files import checksum, disk_errors, ensure_folder, fsync_folder, write_atomically
from milonga.models import Network
from milonga.models.pretrained import CHECKPOINTS, WEIGHTS, save_weights
from milonga.tensor_files import save_tensors

FORMAT = 1
OPTIMIZER = "optimizer.safetensors"
STATE = "state.safetensors"
TRAINER = "trainer.json"


class Position(BaseModel):
    """Where a run stands.

    Args:
        step: updates done; also the index of the next batch.
        tokens: read in all.
        bytes: of the text that they stand for.
        seconds: time spent, all sessions of the run together.
        pending_nats, pending_bytes: losses since the last line of metrics, and the bytes of text they are for.
        evaluation: bits per byte of the last evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    pending_nats: float = 0.0
    pending_bytes: int = 0
    evaluation: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_bytes_alone(cls, stored: object) -> object:
        """Checkpoints from before there were subwords count tokens only: bytes."""
        if isinstance(stored, dict) and "pending_tokens" in stored:
            stored = {**stored, "bytes": stored.get("tokens", 0), "pending_bytes": stored["pending_tokens"]}
            del stored["pending_tokens"]
        return stored


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums agree."""

    path: Path
    position: Position
    config: dict[str, Any]
    data: dict[str, Any]

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors, on the CPU."""
        return load_file(self.path / OPTIMIZER)

    def state(self) -> dict[str, Tensor] | None:
        """The carried state's tensors, on the CPU; None where nothing was carried."""
        return load_file(self.path / STATE) if (self.path / STATE).is_file() else None

    @property
    def weights(self) -> Path:
        """The weight file."""
        return self.path / WEIGHTS


class _Damaged(Exception):
    """What is wrong with a checkpoint, as the end of a sentence."""


def checkpoint_name(step: int) -> str:
    """The folder of step `step`."""
    return f"step-{step:08}"


def list_checkpoints(run: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first, unread."""
    found = [p for p in (Path(run) / CHECKPOINTS).glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def remove_remains(run: Path) -> None:
    """Remove what a killed process left half written or half deleted. Only while holding the run's lock."""
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    run: Path,
    position: Position,
    *,
    network: Network,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    codec: TextCodec | None = None,
    keep: int,
) -> Path:
    """Write the checkpoint of `position.step` and then delete all but the newest `keep`.

    Args:
        optimizer: `Optimizer.tensors()`.
        state: the carried state's tensors by name.
        config: the run's resolved config, JSON-ready.
        data: what decides which samples a step sees (`WindowSampler.identity`).
        codec: what made the tokens; a tokenizer is written beside the weights, which name its digest. None for bytes.

    Raises:
        UserError: if the disk is full or refuses; older checkpoints stay whole.
    """
    folder = ensure_folder(run / CHECKPOINTS)
    final = folder / checkpoint_name(position.step)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(final):
            partial.mkdir()
        facts = {"run": str(config["name"]), "step": str(position.step), "tokens": str(position.tokens)}
        facts["bytes"] = str(position.bytes)
        if isinstance(codec, BpeCodec):
            facts |= {"codec": codec.name, "tokenizer": codec.digest}
            codec.save(partial / TOKENIZER)
        save_weights(network, partial / WEIGHTS, facts)
        save_tensors(optimizer, partial / OPTIMIZER, {"format": str(FORMAT)})
        if state is not None:
            save_tensors(state, partial / STATE, {"format": str(FORMAT)})
        record = {
            "format": FORMAT,
            "position": position.model_dump(),
            "data": dict(data),
            "files": {path.name: checksum(path) for path in sorted(partial.iterdir())},
            "config": config,
        }
        write_atomically(partial / TRAINER, json.dumps(record, indent=1))
        with disk_errors(final):
            if final.exists():
                _delete(final)
            os.rename(partial, final)
            fsync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        _delete(old)
    return final


def _delete(checkpoint: Path) -> None:
    """Out of sight first: a process killed half-way leaves no checkpoint that looks whole and is not."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, its checksums verified.

    Raises:
        UserError: if it is damaged, incomplete or of a newer format.
    """
    try:
        return _read(path)
    except _Damaged as problem:
        raise UserError(f"{path} is damaged: {problem}") from None


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, verified; None if there is none yet.

    Raises:
        UserError: if it is damaged, with the older one that is whole and how to go on from it; or of a newer format.
    """
    paths = list_checkpoints(run)
    if not paths:
        return None
    try:
        return _read(paths[-1])
    except _Damaged as problem:
        for index in range(len(paths) - 2, -1, -1):
            try:
                _read(paths[index])
            except _Damaged:
                continue
            damaged = " ".join(str(path) for path in paths[index + 1 :])
            advice = f"{paths[index].name} before it is whole: remove {damaged} and resume again"
            raise UserError(f"{paths[-1]} is damaged: {problem}; {advice}") from None
        advice = f"no older checkpoint is whole: start over in another folder, or remove {run}"
        raise UserError(f"{paths[-1]} is damaged: {problem}; {advice}") from None


def _read(path: Path) -> Checkpoint:
    try:
        record = json.loads((path / TRAINER).read_bytes())
    except OSError as error:
        raise _Damaged(f"{TRAINER} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _Damaged(f"{TRAINER} is not JSON (cut short?)") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise _Damaged(f"{TRAINER} says no format")
    if record["format"] > FORMAT:
        raise UserError(
            f"{path}: written in format {record['format']}, this version reads up to {FORMAT}; upgrade milonga"
        )
    try:
        position, config, data = Position.model_validate(record["position"]), record["config"], record["data"]
        files = dict(record["files"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise _Damaged(f"{TRAINER} lacks something ({error})") from error
    for name, digest in files.items():
        if not (path / name).is_file():
            raise _Damaged(f"{name} is missing")
        if checksum(path / name) != digest:
            raise _Damaged(f"{name} is not what was written (its checksum differs)")
    if not {WEIGHTS, OPTIMIZER} <= files.keys():
        raise _Damaged(f"{TRAINER} does not list {WEIGHTS} and {OPTIMIZER}")
    return Checkpoint(path, position, config, data)
