"""The state file: one safetensors file with all that a session knows."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import safe_open
from torch import Tensor

from milonga.data.text import TextCodec
from milonga.errors import UserError
from milonga.inference.marks import Mark
from milonga.inference.sampling import Sampling
from milonga.state import from_flat, to_flat
from milonga.tensor_files import save_tensors

# 2 added the codec's digest, what is known of the text read, and the sampling; a file of format 1 has none of them
FORMAT = 2
_STATE, _LOGITS, _RECENT = "state.", "next_logits", "recent"
_UNKNOWN = "unknown"
_KEYS = ("session_format", "model", "codec", "position", "pending", "checksum")


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over every tensor and every other entry of the header."""
    digest = hashlib.sha256()
    for key in sorted(header.keys() - {"checksum"}):
        digest.update(f"{key}={header[key]}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel() > 0:  # an empty one may have strides that no view as bytes has
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_session(path: Path, mark: Mark, sampling: Sampling | None, model: str, codec: TextCodec) -> None:
    """Write a state file, whole or not at all.

    Args:
        path: the file.
        mark: the place to save.
        sampling: of the last text written, with its seed: all that its random numbers depend on beside the position.
        model: fingerprint of the network.
        codec: of the session.

    Raises:
        UserError: if it cannot be written; what was at `path` stays.
    """
    tensors = {_STATE + name: tensor for name, tensor in to_flat(mark.state).items()} | {_LOGITS: mark.logits}
    tensors |= {_RECENT: torch.tensor(mark.recent)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "session_format": str(FORMAT),
        "model": model,
        "codec": codec.name,
        "codec_digest": codec.digest,
        "position": str(mark.position),
        "bytes_read": str(mark.bytes_read),
        "pending": mark.pending.hex(),
        "chain": mark.chain.hex() if mark.chain is not None else _UNKNOWN,
        "sampling": json.dumps(sampling.to_json() if sampling is not None else None),
    }
    header["checksum"] = _checksum(tensors, header)
    save_tensors(tensors, path, header)


def read_session(path: Path, model: str, codec: TextCodec, like: Mark) -> tuple[Mark, Sampling | None]:
    """Read a state file: -> (the place saved, the sampling saved).

    Args:
        path: the file.
        model: the fingerprint that the file must have.
        codec: the codec that it must have.
        like: a mark of the network, with an empty state; the result's tensors take its shapes, dtypes and devices.

    Raises:
        UserError: if the file is missing, damaged, no state file, of a newer format, or of another model.
    """
    header, tensors = _read(path)
    if header["checksum"] != _checksum(tensors, header):
        raise UserError(f"{path}: the state file was altered or damaged (its checksum does not fit); use another copy")
    if header["model"] != model:
        raise UserError(
            f"{path}: the state of another model (fingerprint {header['model'][:12]}, this one's is {model[:12]}); "
            "load the model it was saved with"
        )
    if header["codec"] != codec.name:
        raise UserError(f"{path}: reads text as '{header['codec']}', this model as '{codec.name}'")
    if header.get("codec_digest", codec.digest) != codec.digest:
        raise UserError(f"{path}: saved with another tokenizer, also of the kind '{codec.name}'; use that one")
    logits, recent = tensors.pop(_LOGITS), tensors.pop(_RECENT, torch.empty(0, dtype=torch.int32))
    flat = {name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}
    try:
        state, logits = from_flat(flat, like=like.state), from_flat({"": logits}, like=like.logits)
    except ValueError as error:
        raise UserError(f"{path}: does not fit this version of milonga: {error}") from error
    position, sampling = int(header["position"]), json.loads(header.get("sampling", "null"))
    bytes_read = int(header.get("bytes_read", position))  # format 1 knew models of bytes only
    chain = header.get("chain", _UNKNOWN)
    mark = Mark(
        like.network,
        state,
        logits,
        position,
        bytes.fromhex(header["pending"]),
        bytes_read,
        recent.numpy(),
        bytes.fromhex(chain) if chain != _UNKNOWN else None,
    )
    return mark, Sampling.from_json(sampling) if sampling is not None else None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """-> (header, tensors) of something that is a state file by its form."""
    if not path.is_file():
        raise UserError(f"{path}: no such state file; `session.save` or `milonga generate --save` writes one")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
        if header.get("session_format", "").isdigit() and int(header["session_format"]) > FORMAT:
            raise UserError(
                f"{path}: a state file of format {header['session_format']}, this version reads up to {FORMAT}; "
                "upgrade milonga to read it"
            )
        if any(key not in header for key in _KEYS):
            raise UserError(f"{path}: not a state file of milonga")
        tensors = deserialise(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a state file, or damaged or cut short ({error})") from error
    if _LOGITS not in tensors:
        raise UserError(f"{path}: not a state file of milonga")
    return header, tensors
