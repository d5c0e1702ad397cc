"""From a recipe's data section to the two corpora of a run."""

from pathlib import Path

from milonga.data.bpe import load_tokenizer
from milonga.data.config import DataConfig
from milonga.data.corpus import Corpus
from milonga.data.corpus_cache import Progress
from milonga.data.text import TextCodec
from milonga.errors import UserError

_DOCUMENT = "document:"


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    seed: int = 0,
    codec: TextCodec | None = None,
    progress: Progress | None = None,
) -> tuple[Corpus, Corpus | None]:
    """The documents to train on and those held out (None if the recipe holds nothing out).

    Args:
        config: the data section of a recipe.
        folder: where the prepared text is kept, in `train/` and `heldout/`; the same call is instant the next time.
        seed: chooses the documents where a fraction is held out.
        codec: what encodes the documents; None: the config's tokenizer, or bytes where it names none. Which documents
            are held out does not depend on it.
        progress: see `Corpus.build`.

    Raises:
        UserError: as `Corpus.build`, `Corpus.split` and `load_tokenizer` do, and if documents and files are both
            held out.
    """
    entries = config.heldout if isinstance(config.heldout, list) else []
    names = [entry.removeprefix(_DOCUMENT) for entry in entries if entry.startswith(_DOCUMENT)]
    files = [entry for entry in entries if not entry.startswith(_DOCUMENT)]
    if names and files:
        raise UserError(f"data.heldout: give either files or documents of data.paths, not both: {', '.join(entries)}")
    if codec is None and config.tokenizer is not None:
        codec = load_tokenizer(Path(config.tokenizer).expanduser())

    def build(paths: list[str], name: str, exclude: list[str]) -> Corpus:
        return Corpus.build(
            paths,
            folder / name,
            text_field=config.text_field,
            separator=config.separator.encode(),
            exclude=exclude,
            codec=codec,
            progress=progress,
        )

    heldout = build(files, "heldout", []) if files else None
    train = build(config.paths, "train", files)
    if isinstance(config.heldout, float):
        return train.split(config.heldout, seed, holdout_tail=config.heldout_tail)
    if names:
        return train.split(names, seed)
    return train, heldout
