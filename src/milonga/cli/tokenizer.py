"""`milonga tokenizer`: byte-pair encoding learned from texts, and a look at what was learned."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from milonga.cli import console
from milonga.data.bpe import BpeCodec, load_tokenizer
from milonga.data.bpe_training import check_vocab_size, train_bpe
from milonga.data.config import DataConfig
from milonga.data.corpus import Corpus
from milonga.data.prepare import prepare
from milonga.errors import UserError
from milonga.files import ensure_folder

# Bytes of held-out text that are measured, at most.
_MEASURED = 1 << 24
_PIECE = 1 << 20
_SHOWN = 12


def run_tokenizer_train(
    data: list[str], vocab_size: int, out: str, heldout: list[str], seed: int, text_field: str, json_: bool
) -> int:
    """Learn a tokenizer from texts, write it to the file `out` and show what it does to held-out text.

    Which documents are held out is what `milonga train` holds out of the same texts with the same seed.

    Raises:
        UserError: as `train_bpe` and `prepare`, and if `out` exists or cannot be written.
    """
    check_vocab_size(vocab_size)
    path = Path(out)
    if path.exists():
        raise UserError(f"{out}: exists already; choose another name with --out, or remove it")
    ensure_folder(path.parent)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        train, held = _corpora(data, heldout, seed, text_field, Path(folder))
        with console.progress("counting words", train.bytes, "bytes") as bar:

            def show(done: int) -> None:
                bar.update(done, "merging" if done == train.bytes else "")

            codec = train_bpe(_documents(train), vocab_size, progress=show)
        seconds = time.monotonic() - began
        codec.save(path)
        facts = _facts(path, codec) | {"train_bytes": train.bytes, "seconds": round(seconds, 3)}
        facts |= {"heldout": _measured(codec, held), "heldout_documents": list(held.names[:_SHOWN])}
    if json_:
        console.print_json(facts)
        return 0
    measured = facts["heldout"]
    rows = [
        ("vocabulary", f"{codec.vocab_size:,} tokens"),
        ("learned from", f"{console.count(train.bytes)} bytes in {console.duration(seconds)}"),
        ("held-out text", f"{console.count(measured['bytes'])} bytes of {_named(facts['heldout_documents'])}"),
        ("bytes per token there", f"{measured['bytes_per_token']:.3f}"),
        ("tokens used there", f"{measured['tokens_used']:,}"),
        ("encoding", f"{console.count(measured['bytes_per_second'])} bytes/s"),
        ("file", str(path)),
    ]
    console.stdout.print(console.table("Tokenizer", ["what", "figure"], rows))
    return 0


def run_tokenizer_inspect(path: str, text: str | None, json_: bool) -> int:
    """Show what a tokenizer holds, and how it cuts a text.

    Raises:
        UserError: if there is no tokenizer of ours at `path`.
    """
    codec = load_tokenizer(path)
    facts = _facts(Path(path), codec)
    if text is not None:
        facts["tokens"] = [[int(i), _shown(codec.token_bytes[i])] for i in codec.encode(text)]
    if json_:
        console.print_json(facts)
        return 0
    by_length = [f"{count:,} of {length}" for length, count in facts["lengths"].items()]
    rows = [
        ("vocabulary", f"{codec.vocab_size:,} tokens"),
        ("digest", codec.digest),
        ("bytes of a token", ", ".join(by_length)),
        ("longest", "  ".join(facts["longest"])),
        ("first learned", "  ".join(facts["first"])),
        ("last learned", "  ".join(facts["last"])),
    ]
    if text is not None:
        rows.append((f"the text, {len(facts['tokens'])} tokens", "  ".join(token for _, token in facts["tokens"])))
    console.stdout.print(console.table(path, ["what", "figure"], rows))
    return 0


def _corpora(data: list[str], heldout: list[str], seed: int, text_field: str, folder: Path) -> tuple[Corpus, Corpus]:
    """The text to learn from and the text to measure, in bytes; of a single document its end is measured."""
    config = DataConfig(paths=data, heldout=heldout or 0.05, text_field=text_field)
    with console.progress("reading text", None, "bytes") as bar:

        def show(done: int, _: int | None) -> None:
            bar.update(done)

        if not heldout:  # of a single document nothing but its end can be held out
            single = Corpus.build(data, folder / "train", text_field=text_field, progress=show).documents == 1
            config = config.model_copy(update={"heldout_tail": single})
        train, held = prepare(config, folder, seed=seed, progress=show)
    assert held is not None, "something is always held out"
    return train, held


def _documents(corpus: Corpus) -> Iterator[Iterator[bytes]]:
    for document in corpus:
        yield (document[start : start + _PIECE].tobytes() for start in range(0, len(document), _PIECE))


def _measured(codec: BpeCodec, corpus: Corpus) -> dict[str, Any]:
    """How the codec encodes (at most `_MEASURED` bytes of) a text in bytes."""
    used = np.zeros(codec.vocab_size, bool)
    size = tokens = 0
    began = time.monotonic()
    for document in corpus:
        ids = codec.encode(document[: _MEASURED - size])
        used[ids] = True
        tokens += len(ids)
        size += min(len(document), _MEASURED - size)
    seconds = max(time.monotonic() - began, 1e-9)
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "tokens_used": int(used.sum()),
        "bytes_per_second": size / seconds,
    }


def _facts(path: Path, codec: BpeCodec) -> dict[str, Any]:
    learned = codec.token_bytes[256:]
    lengths, counts = np.unique(codec.token_lengths, return_counts=True)
    return {
        "tokenizer": str(path),
        "vocab_size": codec.vocab_size,
        "digest": codec.digest,
        "lengths": {str(length): int(count) for length, count in zip(lengths, counts, strict=True)},
        "longest": [_shown(token) for token in sorted(learned, key=len, reverse=True)[:_SHOWN]],
        "first": [_shown(token) for token in learned[:_SHOWN]],
        "last": [_shown(token) for token in learned[-_SHOWN:]],
    }


def _shown(token: bytes) -> str:
    """A token on one line: a blank as an open box, what is no text as escapes."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace(" ", "\u2423")


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
