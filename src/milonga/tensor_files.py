"""safetensors files that are either whole or not there, and say what they are in their header."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milonga.errors import UserError
from milonga.files import disk_errors, fsync_folder, partial_beside


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and the header's `metadata` to `path`: whole and synced to the disk, or not at all.

    Raises:
        UserError: if the disk is full or refuses; what was at `path` stays as it was.
    """
    path = Path(path)
    temporary = partial_beside(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with disk_errors(path):
            _save(contiguous, temporary, metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _save(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """`save_file`, with the operating system's error number brought back out of its message."""
    try:
        save_file(tensors, path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_metadata(path: str | os.PathLike[str], what: str) -> dict[str, str]:
    """The metadata in a safetensors file's header; `what` names the kind of file in errors.

    Raises:
        UserError: if the file is missing, cut short, or no safetensors file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such {what}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, cut short or no {what} ({error})") from error
