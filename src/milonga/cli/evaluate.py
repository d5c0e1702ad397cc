"""`milonga evaluate perplexity`: bits per byte of texts, by position and beside compressors."""

import time
from collections.abc import Iterator, Sequence

from rich.table import Table

from milonga.cli import console
from milonga.data.readers import Document, Reading, Source, find_sources, read_documents
from milonga.data.streams import split_suffix
from milonga.evaluation import COMMANDS, Perplexity, evaluate_perplexity
from milonga.inference import load

# Documents listed one by one, at most.
_LISTED = 20


def run_evaluate_perplexity(run: str, files: Sequence[str], device: str | None, json_: bool) -> int:
    """Score the texts and print the tables, or one JSON object.

    Raises:
        UserError: if there is no model at `run`, or a text is missing, unreadable, empty or no text.
    """
    sources = find_sources(files)
    lm = load(run, device=device)
    began = time.monotonic()
    with console.progress("scoring", total=_text_bytes(sources), unit="bytes") as bar:

        def show(done: int, bits_per_byte: float) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(done, f"{bits_per_byte:.3f} bits per byte, {rate:,.0f} bytes/s")

        scores = evaluate_perplexity(lm, _documents(sources), progress=show)
    if json_:
        console.print_json({"model": str(lm.path), **scores.to_json()})
        return 0
    for table in _tables(scores):
        console.stdout.print(table)
    return 0


def _text_bytes(sources: Sequence[Source]) -> int | None:
    """Bytes of text in all sources, where that can be told without reading them: plain files."""
    if any(compression or kind in (".tar", ".parquet", ".jsonl", ".ndjson") for kind, compression in _kinds(sources)):
        return None
    return sum(source.path.stat().st_size for source in sources)


def _kinds(sources: Sequence[Source]) -> list[tuple[str, str]]:
    return [split_suffix(source.path.name) for source in sources]


def _documents(sources: Sequence[Source]) -> Iterator[Document]:
    def skip(name: str) -> None:
        console.say(f"left out, for it holds no text: {name}")

    return read_documents(sources, Reading("text", lambda count: None, skip))


def _tables(scores: Perplexity) -> Iterator[Table]:
    what = scores.documents[0].name if len(scores.documents) == 1 else f"{len(scores.documents)} documents"
    rows: list[tuple[str, str]] = [("model", f"{scores.bits_per_byte:.4f}")]
    rows += [(command, f"{scores.compressor_bits_per_byte(name):.4f}") for name, command in COMMANDS.items()]
    title = f"{what}, {console.count(scores.bytes)} bytes"
    yield console.table(title, ["predicted by", "bits per byte"], rows, right=[1])
    ranges = [
        (
            console.count(bucket.start) if bucket.end is not None else f"{console.count(bucket.start)} and more",
            console.count(bucket.bytes),
            f"{bucket.bits_per_byte:.4f}",
        )
        for bucket in scores.buckets
    ]
    yield console.table("by position", ["bytes before, at least", "bytes", "bits per byte"], ranges, right=[0, 1, 2])
    if len(scores.documents) > 1:
        listed = [
            (
                document.name,
                console.count(document.bytes),
                f"{document.bits_per_byte:.4f}",
                f"{document.compressor_bits_per_byte('xz'):.4f}",
            )
            for document in scores.documents[:_LISTED]
        ]
        left = len(scores.documents) - len(listed)
        title = f"the first {_LISTED} of {_LISTED + left} documents" if left else "by document"
        yield console.table(title, ["document", "bytes", "bits per byte", COMMANDS["xz"]], listed, right=[1, 2, 3])
