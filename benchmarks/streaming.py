"""What a trained run does while it streams: speed, memory, and whether the way a text is cut shows.

    python benchmarks/streaming.py [RUN] [--json]        RUN: runs/demo where none is given

Read and generated are the best of 5 repeats, which take turns. Memory is the resident memory of this process while one
session reads 4 MB, beyond what it was after the first 1 MB. The split law compares the bits of 4096 bytes scored in 200
random splittings, and byte by byte, with those of the text scored at once.
"""

import sys
from itertools import pairwise

import numpy as np
from figures import Figure, main

import milonga
from milonga.data.bundled import bundled_heldout
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.evaluation import measure_throughput, memory_growth
from milonga.inference import LanguageModel

FEED, GENERATED, REPEATS = 65536, 400, 5
FIRST, TOTAL = 1 << 20, 4 << 20
SPLIT_BYTES, SPLITTINGS = 4096, 200


def heldout_text() -> bytes:
    """The bundled held-out book."""
    reading = Reading("text", lambda _: None, lambda _: None)
    documents = read_documents(find_sources([str(bundled_heldout())]), reading)
    return b"".join(piece for document in documents for piece in document.pieces)


def split_law(lm: LanguageModel, text: bytes, splittings: int = SPLITTINGS) -> tuple[float, float]:
    """-> (relative RMS difference of the bits, the worst of a single byte), the larger of random and bytewise cuts."""
    expected = lm.session().score(text)
    random = np.random.default_rng(0)
    relative, worst = 0.0, 0.0
    for number in range(splittings + 1):
        if number < splittings:
            count = int(random.integers(1, 65))
            cuts = np.sort(random.integers(0, len(text) + 1, count)).tolist()
        else:
            cuts = list(range(1, len(text)))
        session = lm.session()
        edges = [0, *cuts, len(text)]
        bits = np.concatenate([session.score(text[i:j]) for i, j in pairwise(edges)])
        error = bits - expected
        relative = max(relative, float(np.sqrt((error**2).mean() / (expected**2).mean())))
        worst = max(worst, float(np.abs(error).max()))
    return relative, worst


def figures(run: str) -> list[Figure]:
    """All of them, on the CPU."""
    lm = milonga.load(run, device="cpu")
    text = heldout_text()
    rates = measure_throughput(lm, text[:FEED], generated=GENERATED, repeats=REPEATS)
    growth = memory_growth(lm.session(), text[:FEED], first=FIRST, total=TOTAL)
    relative, worst = split_law(lm, text[:SPLIT_BYTES])
    cuts = f"{SPLITTINGS} splittings and byte by byte"
    grown = growth.growth / (1 << 20)
    return [
        Figure("demo model: feed", rates.feed_bytes_per_second, 15000, "bytes/s"),
        Figure("demo model: generate", rates.generate_bytes_per_second, 300, "bytes/s"),
        Figure("streaming 4 MB: growth of resident memory after 1 MB", grown, 8, "MiB", at_least=False),
        Figure(f"{cuts}: relative RMS", relative, 2e-6, "", at_least=False),
        Figure(f"{cuts}: worst byte", worst, 1e-4, "bits", at_least=False),
    ]


if __name__ == "__main__":
    runs = [argument for argument in sys.argv[1:] if argument != "--json"]
    main(lambda: figures(runs[0] if runs else "runs/demo"))
