"""Speculative decoding of a trained run: is greedy text plain greedy text, and what does a draft bring.

    python benchmarks/speculation.py [RUN] [--drafter RUN] [--prompts N] [--bytes N] [--json]     RUN: runs/demo

Prompts are equally spaced pieces of 200 bytes of the bundled held-out book. For each drafter (the RUN given, the text
itself) rule `greedy` writes behind every prompt and is compared byte by byte with plain decoding at temperature 0; then
`greedy` and `exact` (temperature 0.8) are timed against plain decoding in turns, on the first prompts. On the CPU.
"""

import argparse
import time

from figures import Figure, main
from streaming import heldout_text

import milonga
from milonga.inference import LanguageModel, Sampling, Session
from milonga.inference.drafters import Drafter, NgramDrafter
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.speculative import SpeculativeDecoder

PROMPT, TIMED = 200, 4


def prompts(count: int) -> list[bytes]:
    """Equally spaced pieces of the held-out book."""
    text = heldout_text()
    step = (len(text) - PROMPT) // count
    return [text[index * step : index * step + PROMPT] for index in range(count)]


def ready(lm: LanguageModel, prompt: bytes) -> Session:
    """A session behind a prompt."""
    session = lm.session()
    session.feed(prompt)
    return session


def identical(lm: LanguageModel, drafters: dict[str, Drafter], texts: list[bytes], count: int) -> list[Figure]:
    """How many texts are those of plain greedy decoding, for each drafter."""
    decoders = {name: SpeculativeDecoder(lm, drafter, rule="greedy") for name, drafter in drafters.items()}
    same = dict.fromkeys(drafters, 0)
    for number, prompt in enumerate(texts):
        plain = b"".join(ready(lm, prompt).generate_bytes(count, temperature=0))
        for name, decoder in decoders.items():
            same[name] += b"".join(decoder.generate_bytes(ready(lm, prompt), count, context=prompt)) == plain
        if number % 10 == 9:
            told = ", ".join(f"{name} {same[name]} (redone {d.stats.redone})" for name, d in decoders.items())
            print(f"  {number + 1} prompts: identical {told}", flush=True)
    figures = []
    for name, decoder in decoders.items():
        what = f"greedy, {name}: identical to plain, of {len(texts)} prompts of {count} bytes"
        figures.append(Figure(what, same[name], len(texts), "texts"))
        figures.append(Figure(f"greedy, {name}: bytes redone by single steps", decoder.stats.redone, 0, "bytes"))
    return figures


def speeds(lm: LanguageModel, drafters: dict[str, Drafter], texts: list[bytes], count: int) -> list[Figure]:
    """Acceptance, bytes for each verification, and speed beside plain decoding, measured and predicted."""
    figures = []
    for rule, sampling in (("greedy", Sampling(temperature=0.0)), ("exact", Sampling(temperature=0.8))):
        for name, drafter in drafters.items():
            decoder = SpeculativeDecoder(lm, drafter, rule=rule)
            plain = fast = 0.0
            for prompt in texts:
                session = ready(lm, prompt)
                began = time.perf_counter()
                b"".join(session.generate_bytes(count, sampling))
                plain += time.perf_counter() - began
                session = ready(lm, prompt)
                began = time.perf_counter()
                b"".join(decoder.generate_bytes(session, count, sampling, context=prompt))
                fast += time.perf_counter() - began
            stats, what = decoder.stats, f"{rule}, {name}"
            figures += [
                Figure(f"{what}: acceptance", 100 * stats.acceptance, 0, "%"),
                Figure(f"{what}: bytes for each verification", stats.bytes_per_verification, 1, "bytes"),
                Figure(f"{what}: speed-up", plain / fast, 0, "x"),
                Figure(f"{what}: speed-up predicted", stats.predicted_speedup(plain / count / len(texts)), 0, "x"),
            ]
    return figures


def figures(arguments: argparse.Namespace) -> list[Figure]:
    """All of them."""
    lm = milonga.load(arguments.run, device="cpu")
    drafters: dict[str, Drafter] = {"n-gram": NgramDrafter()}
    if arguments.drafter:
        drafters["model"] = ModelDrafter(milonga.load(arguments.drafter, device="cpu"))
    texts = prompts(arguments.prompts)
    return speeds(lm, drafters, texts[:TIMED], arguments.bytes) + identical(lm, drafters, texts, arguments.bytes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs/demo")
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    main(lambda: figures(given))
