"""Byte-pair encoding learned from a text."""

import json
from collections.abc import Callable, Iterable, Iterator

from milonga.data.bpe import ALPHABET, MAPPED_PATTERN, BpeCodec, mapped, split_json, tokenizers_package, unmapped
from milonga.errors import UserError

# Bytes of a token at most: what is longer (rules of dashes, indentation) is no help to a model.
LONGEST_TOKEN = 32
_PART = 1 << 16


def check_vocab_size(vocab_size: int) -> None:
    """Before any text is read.

    Raises:
        UserError: if no tokenizer of so many tokens can be learned.
    """
    if not 257 <= vocab_size <= 1 << 20:
        raise UserError(f"tokenizer: the vocabulary must have 257 to {1 << 20} tokens, got {vocab_size}")


def train_bpe(
    documents: Iterable[Iterable[bytes]], vocab_size: int, *, progress: Callable[[int], None] | None = None
) -> BpeCodec:
    """Learn `vocab_size` - 256 merges: each time the most frequent pair, counted inside words.

    The same text gives the same codec. Memory grows with the number of different words.

    Args:
        documents: pieces of bytes of each, read once.
        vocab_size: V; at least 257.
        progress: called with the bytes read so far.

    Raises:
        UserError: if `vocab_size` is out of range, the text has too few pairs that occur twice, or `tokenizers` is not
            installed.
    """
    check_vocab_size(vocab_size)
    package = tokenizers_package()
    blank = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = package.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split_json(MAPPED_PATTERN), "model": blank})
    )
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=list(ALPHABET),
        max_token_length=LONGEST_TOKEN,
    )
    tokenizer.train_from_iterator(_parts(documents, progress), trainer)
    codec = BpeCodec(map(unmapped, json.loads(tokenizer.to_str())["model"]["merges"]))
    if codec.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer: the text gives {codec.vocab_size:,} tokens, not {vocab_size:,}: no other pair in it occurs "
            "twice; ask for fewer, or give more text"
        )
    return codec


def _parts(documents: Iterable[Iterable[bytes]], progress: Callable[[int], None] | None) -> Iterator[str]:
    done = 0
    codec = BpeCodec(())  # knows where words end
    for document in documents:
        for part in codec.cut(document, _PART):
            yield mapped(part)
            done += len(part)
            if progress is not None:
                progress(done)
