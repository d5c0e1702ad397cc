"""Small corpora and an independent definition of what a step sees."""

from pathlib import Path

import numpy as np

from milonga.data.corpus import Corpus, Names


def make_corpus(folder: Path, texts: list[bytes], separator: bytes = b"") -> Corpus:
    """A corpus of one file per text, `0000.txt` and on."""
    source = folder / "texts"
    source.mkdir(parents=True)
    for number, text in enumerate(texts):
        (source / f"{number:04}.txt").write_bytes(text)
    return Corpus.build([source], folder / "cache", separator=separator)


def in_memory(texts: list[bytes], separator: bytes = b"") -> Corpus:
    """The same without files, for properties with many examples."""
    lengths = [len(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    text = "".join(f"{number:04}.txt" for number in range(len(texts))).encode()
    names = Names(np.frombuffer(text, np.uint8), np.arange(len(texts) + 1, dtype=np.int64) * len("0000.txt"))
    return Corpus(tokens, offsets[:-1], offsets, names, "test", separator)
