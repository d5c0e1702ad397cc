"""The public-domain books that come with the package. `text/NOTICE.md` beside them names titles, authors and source."""

from importlib.resources import files
from pathlib import Path

from milonga.errors import UserError

_FILES = {"train": "books-train.tar.xz", "heldout": "the-war-of-the-worlds.txt.xz"}
_PREFIX = "bundled:"


def bundled_train() -> Path:
    """Nine English novels of 1811-1890 in one `.tar.xz`: 6,135,330 bytes of text, one document per book."""
    return _locate("train")


def bundled_heldout() -> Path:
    """One novel by an author who is not in the training text, `.txt.xz`: 337,055 bytes."""
    return _locate("heldout")


def is_bundled(path: str) -> bool:
    """Whether `path` names a bundled text, as in `bundled:train`."""
    return path.startswith(_PREFIX)


def resolve_bundled(path: str) -> Path:
    """The file behind `bundled:train` or `bundled:heldout`.

    Raises:
        UserError: if there is no bundled text of that name.
    """
    name = path.removeprefix(_PREFIX)
    if name not in _FILES:
        known = ", ".join(_PREFIX + key for key in _FILES)
        raise UserError(f"data: no bundled text '{path}': there are {known}")
    return _locate(name)


def _locate(name: str) -> Path:
    path = Path(str(files("milonga") / "text" / _FILES[name]))
    if not path.is_file():
        raise UserError(f"data: the bundled text {path} is missing: install milonga again")
    return path
