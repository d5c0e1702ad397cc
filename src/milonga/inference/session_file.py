"""The state file: one safetensors file with all that a session knows."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import safe_open
from torch import Tensor

from milonga.errors import UserError
from milonga.models.network import NetworkState
from milonga.state import from_flat, to_flat
from milonga.tensor_files import save_tensors

FORMAT = 1
_STATE, _LOGITS = "state.", "next_logits"
_KEYS = ("session_format", "model", "codec", "position", "pending", "checksum")


@dataclass(frozen=True, eq=False)
class SavedSession:
    """What a state file holds."""

    state: NetworkState
    logits: Float[Tensor, " V"]  # fp32, of the next byte
    position: int
    pending: bytes
    model: str  # fingerprint of the network
    codec: str


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over every tensor and every other entry of the header."""
    digest = hashlib.sha256()
    for key in sorted(header.keys() - {"checksum"}):
        digest.update(f"{key}={header[key]}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_session(path: Path, session: SavedSession) -> None:
    """Write a state file, whole or not at all.

    Raises:
        UserError: if it cannot be written; what was at `path` stays.
    """
    tensors = {_STATE + name: tensor for name, tensor in to_flat(session.state).items()} | {_LOGITS: session.logits}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "session_format": str(FORMAT),
        "model": session.model,
        "codec": session.codec,
        "position": str(session.position),
        "pending": session.pending.hex(),
    }
    header["checksum"] = _checksum(tensors, header)
    save_tensors(tensors, path, header)


def read_session(path: Path, model: str, codec: str, like: tuple[NetworkState, Tensor]) -> SavedSession:
    """Read a state file.

    Args:
        path: the file.
        model: the fingerprint that the file must have.
        codec: the name of the text codec that it must have.
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
    if header["codec"] != codec:
        raise UserError(f"{path}: reads text as '{header['codec']}', this model as '{codec}'")
    logits = tensors.pop(_LOGITS)
    flat = {name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}
    try:
        state, logits = from_flat(flat, like=like[0]), from_flat({"": logits}, like=like[1])
    except ValueError as error:
        raise UserError(f"{path}: does not fit this version of milonga: {error}") from error
    return SavedSession(state, logits, int(header["position"]), bytes.fromhex(header["pending"]), model, codec)


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
