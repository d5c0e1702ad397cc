"""The weight file: one safetensors file that says which network it belongs to.

The header's metadata holds `format` (a number), `config` (the `ModelConfig` as JSON) and whatever the writer adds as
strings. Tied weights are stored once.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from milonga.errors import UserError, describe_validation
from milonga.models.config import ModelConfig
from milonga.models.network import Network, allocate
from milonga.tensor_files import read_metadata, save_tensors

FORMAT = 1
WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"


def _stored(network: Network) -> dict[str, torch.Tensor]:
    """The tensors of the file: all parameters, a tied head only as the embedding."""
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    if network.config.tied:
        del tensors["head.weight"]
    return tensors


def save_weights(network: Network, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the network's weights and config to `path`, atomically and synced to disk.

    Raises:
        UserError: if the file cannot be written (a full disk, say); what was at `path` stays.
    """
    config = ModelConfig.model_validate(network.config)
    header = dict(metadata or {}) | {"format": str(FORMAT), "config": config.model_dump_json()}
    save_tensors(_stored(network), path, header)


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a weight file, its format checked.

    Raises:
        UserError: if the file is missing, damaged, no weight file of this library, or of a newer format.
    """
    header = read_metadata(path, "weight file")
    if not header.get("format", "").isdigit() or "config" not in header:
        raise UserError(f"{path}: not a Milonga weight file (its header has no format and config)")
    if int(header["format"]) > FORMAT:
        raise UserError(
            f"{path}: written in format {header['format']}, this version reads up to {FORMAT}; upgrade milonga"
        )
    return header


def read_config(path: Path, header: Mapping[str, str]) -> ModelConfig:
    """The model config in a weight file's header.

    Raises:
        UserError: if it is not a config this version can build.
    """
    try:
        return ModelConfig.model_validate_json(header["config"])
    except ValidationError as error:
        raise UserError(f"{path}: its model config cannot be built: {describe_validation(error, 'model')}") from error


def load_tensors(network: Network, path: Path) -> None:
    """Fill `network` with the weights of the file at `path`.

    Raises:
        UserError: naming the first tensor that is missing, left over, or of another shape: another architecture.
    """
    own = _stored(network)
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted(own.keys() - names), sorted(names - own.keys())
            if missing or extra:
                what = f"misses {missing[0]}" if missing else f"has {extra[0]}, which the model has not"
                raise UserError(f"{path}: weights of another architecture: the file {what}")
            for name, tensor in own.items():
                shape = file.get_slice(name).get_shape()
                if list(shape) != list(tensor.shape):
                    raise UserError(
                        f"{path}: weights of another architecture: {name} is {shape}, "
                        f"the model has {list(tensor.shape)}"
                    )
            with torch.no_grad():
                parameters = network.state_dict()
                for name in own:
                    parameters[name].copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{path}: the weight file is damaged or cut short ({error})") from error


def load_weights(path: Path, *, device: torch.device | str | None = None) -> tuple[Network, dict[str, str]]:
    """-> (the network of the file with its weights, the file's metadata).

    Raises:
        UserError: if the file is missing, damaged, of another architecture than its header says, or of a newer format.
    """
    header = read_header(path)
    network = Network(read_config(path, header), device="meta")
    allocate(network, device or "cpu")
    load_tensors(network, path)
    return network, header


def fingerprint(network: Network) -> str:
    """sha256 (hex) over config and weights: two networks have the same exactly when they compute the same function."""
    config = ModelConfig.model_validate(network.config)
    digest = hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode())
    for name, tensor in sorted(_stored(network).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_checkpoint(path: str | Path) -> Path:
    """The weight file that `path` stands for: itself, that of a checkpoint folder, or of the last checkpoint of a run.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or weight file; train one with `milonga train`")
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    complete = sorted((path / CHECKPOINTS).glob(f"step-*/{WEIGHTS}"))
    if not complete:
        raise UserError(
            f"{path}: holds no checkpoint; has the run reached its first save? (`milonga train --resume {path}`)"
        )
    return complete[-1]
