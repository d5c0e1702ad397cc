"""From a recipe's data section to the two corpora of a run."""

from pathlib import Path

from milonga.data.config import DataConfig
from milonga.data.corpus import Corpus, Progress
from milonga.errors import UserError

_DOCUMENT = "document:"


def prepare(
    config: DataConfig, folder: Path, *, seed: int = 0, progress: Progress | None = None
) -> tuple[Corpus, Corpus | None]:
    """The documents to train on and those held out (None if the recipe holds nothing out).

    Args:
        config: the data section of a recipe.
        folder: where the prepared text is kept, in `train/` and `heldout/`; the same call is instant the next time.
        seed: chooses the documents where a fraction is held out.
        progress: see `Corpus.build`.

    Raises:
        UserError: as `Corpus.build` and `Corpus.split` do, and if documents and files are both held out.
    """
    entries = config.heldout if isinstance(config.heldout, list) else []
    names = [entry.removeprefix(_DOCUMENT) for entry in entries if entry.startswith(_DOCUMENT)]
    files = [entry for entry in entries if not entry.startswith(_DOCUMENT)]
    if names and files:
        raise UserError(f"data.heldout: give either files or documents of data.paths, not both: {', '.join(entries)}")
    separator = config.separator.encode()
    field = config.text_field
    heldout = None
    if files:
        heldout = Corpus.build(files, folder / "heldout", text_field=field, separator=separator, progress=progress)
    train = Corpus.build(
        config.paths, folder / "train", text_field=field, separator=separator, exclude=files, progress=progress
    )
    if isinstance(config.heldout, float):
        return train.split(config.heldout, seed, holdout_tail=config.heldout_tail)
    if names:
        return train.split(names, seed)
    return train, heldout
