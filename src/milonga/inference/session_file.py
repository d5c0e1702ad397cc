"""The state file: one safetensors file with all that a session knows."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import safe_open
from torch import Tensor

from milonga.errors import UserError
from milonga.inference.sampling import Sampling
from milonga.models.network import NetworkState
from milonga.state import from_flat, to_flat
from milonga.tensor_files import save_tensors

# 2 added the codec's digest, the bytes and the last tokens read, and the sampling; a file of format 1 has none of them
FORMAT = 2
_STATE, _LOGITS, _RECENT = "state.", "next_logits", "recent"
_KEYS = ("session_format", "model", "codec", "position", "pending", "checksum")


@dataclass(frozen=True, eq=False)
class SavedSession:
    """What a state file holds."""

    state: NetworkState
    logits: Float[Tensor, " V"]  # fp32, of the next byte
    position: int
    pending: bytes
    bytes_read: int
    recent: np.ndarray  # int32, ids of the last tokens
    sampling: Sampling | None  # of the last generate, with its seed: all that its random numbers depend on
    model: str  # fingerprint of the network
    codec: str
    codec_digest: str


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


def write_session(path: Path, session: SavedSession) -> None:
    """Write a state file, whole or not at all.

    Raises:
        UserError: if it cannot be written; what was at `path` stays.
    """
    tensors = {_STATE + name: tensor for name, tensor in to_flat(session.state).items()} | {_LOGITS: session.logits}
    tensors |= {_RECENT: torch.tensor(session.recent)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "session_format": str(FORMAT),
        "model": session.model,
        "codec": session.codec,
        "codec_digest": session.codec_digest,
        "position": str(session.position),
        "bytes_read": str(session.bytes_read),
        "pending": session.pending.hex(),
        "sampling": json.dumps(session.sampling.to_json() if session.sampling is not None else None),
    }
    header["checksum"] = _checksum(tensors, header)
    save_tensors(tensors, path, header)


def read_session(path: Path, model: str, codec: tuple[str, str], like: tuple[NetworkState, Tensor]) -> SavedSession:
    """Read a state file.

    Args:
        path: the file.
        model: the fingerprint that the file must have.
        codec: name and digest of the text codec that it must have.
        like: a state and logits whose structure, shapes, dtypes and devices the result takes.

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
    if header["codec"] != codec[0]:
        raise UserError(f"{path}: reads text as '{header['codec']}', this model as '{codec[0]}'")
    if header.get("codec_digest", codec[1]) != codec[1]:
        raise UserError(
            f"{path}: was saved with another tokenizer of the kind '{codec[0]}'; use the one it was made with"
        )
    logits = tensors.pop(_LOGITS)
    recent = tensors.pop(_RECENT, torch.empty(0, dtype=torch.int32)).numpy()
    flat = {name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}
    try:
        state, logits = from_flat(flat, like=like[0]), from_flat({"": logits}, like=like[1])
    except ValueError as error:
        raise UserError(f"{path}: does not fit this version of milonga: {error}") from error
    position, sampling = int(header["position"]), json.loads(header.get("sampling", "null"))
    return SavedSession(
        state,
        logits,
        position,
        bytes.fromhex(header["pending"]),
        int(header.get("bytes_read", position)),  # format 1 knew models of bytes only
        recent,
        Sampling.from_json(sampling) if sampling is not None else None,
        model,
        *codec,
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """-> (header, tensors) of something that is a state file by its form."""
    if not path.is_file():
        raise UserError(f"{path}: no such state file; `session.save` writes one")
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
