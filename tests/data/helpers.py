"""Small corpora and an independent definition of what a step sees."""

from pathlib import Path

import numpy as np

from milonga.data.bpe import BpeCodec
from milonga.data.bpe_training import train_bpe
from milonga.data.corpus import Corpus, Names

STORY = b"the cat sat on the mat; the cat saw the moon, and the moon saw the sea. \n\n" * 5


def story_codec(vocab_size: int = 278) -> BpeCodec:
    """A small vocabulary with tokens of many lengths."""
    return train_bpe([[STORY]], vocab_size)


def _write(folder: Path, texts: list[bytes]) -> Path:
    source = folder / "texts"
    source.mkdir(parents=True)
    for number, text in enumerate(texts):
        (source / f"{number:04}.txt").write_bytes(text)
    return source


def make_corpus(folder: Path, texts: list[bytes], separator: bytes = b"") -> Corpus:
    """A corpus of one file per text, `0000.txt` and on."""
    return Corpus.build([_write(folder, texts)], folder / "cache", separator=separator)


def in_memory(texts: list[bytes], separator: bytes = b"") -> Corpus:
    """The same without files, for properties with many examples."""
    lengths = [len(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    text = "".join(f"{number:04}.txt" for number in range(len(texts))).encode()
    names = Names(np.frombuffer(text, np.uint8), np.arange(len(texts) + 1, dtype=np.int64) * len("0000.txt"))
    return Corpus(tokens, offsets[:-1], offsets, names, "test", separator)


def subword_corpus(folder: Path, texts: list[bytes], codec: BpeCodec, separator: bytes = b"") -> Corpus:
    """As `make_corpus`, in subwords."""
    return Corpus.build([_write(folder, texts)], folder / "cache", separator=separator, codec=codec)
