"""Speculative decoding of a pair trained for it: a byte model and a subword drafter, trained and measured in one go.

    python benchmarks/speculation_gpu.py --data FOLDER [--minutes N] [--verifier-size 512x28] [--drafter-size 768x2]
                                         [--prompts 32] [--bytes 1000] [--out FOLDER] [--json FILE]

FOLDER holds texts or archives whose names contain `train`, and others whose names contain `valid`. A tokenizer is
learned, then both models are trained on the same text (bf16 on a GPU), by default stacks of Mamba and SwiGLU of 105 and
23 million parameters, in what `--minutes` leave beside the measurement. Prompts are equally spaced pieces of the valid
texts. Rules greedy and exact (temperature 0.8) write behind each of them, beside plain decoding of the same model: on a
GPU all are captured in CUDA graphs, and plain decoding is that which draws on the device, the fastest there is; a
session, which draws on the host, is timed on a few prompts. How much is drafted follows from the price of a round and
of a drafted token in plain steps, measured once before. The predicted speed-up is the bytes of a verification over the
price of a round in plain steps; the one from acceptance takes every byte of a draft to stand with the same chance.
A second call with the same --out measures what the first one trained.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from figures import Figure, lines
from speculation_models import PROMPT, learned_tokenizer, prompts, settings, trained, write_texts

import milonga
from milonga.inference import LanguageModel, Sampling, Session
from milonga.inference.captured import RUN, Decoder, runner_for
from milonga.inference.device_sampling import device_mode
from milonga.inference.draft_length import AdaptiveDraft, DraftLength, expected_bytes
from milonga.inference.drafters import Drafter, NgramDrafter
from milonga.inference.language_model import choose_device
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.runner import Runner
from milonga.inference.sampling import Uniforms
from milonga.inference.speculative import SpeculativeDecoder

SEVERAL = 4  # tokens of a draft up to which prices are measured
FEW = 4  # prompts that a session writes behind
RESERVE = 10.0  # seconds for loading and for the unforeseen
SETUP = 20.0  # seconds that a run on a new GPU takes beside its steps: reading texts, compiling, scoring
RULES = (("greedy", Sampling(temperature=0.0)), ("exact", Sampling(temperature=0.8)))


def ready(lm: LanguageModel, prompt: bytes) -> Session:
    """A session behind a prompt, nothing left to do on the device."""
    session = lm.session()
    session.feed(prompt)
    finished(lm)
    return session


def finished(lm: LanguageModel) -> None:
    """Wait until the device has nothing left to do."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)


@dataclass
class Timing:
    """Texts of one way of writing, and the seconds of each."""

    texts: list[bytes]
    seconds: list[float]

    def over(self, other: "Timing") -> float:
        """How many times as fast, over the prompts of both."""
        both = min(len(self.seconds), len(other.seconds))
        return sum(other.seconds[:both]) / sum(self.seconds[:both])


Write = Callable[[Session, bytes], bytes]


def timed(lm: LanguageModel, texts: list[bytes], write: Write, until: float = float("inf")) -> Timing:
    """Write behind every prompt, at least the first, until that time. The clock runs from behind the prompt to the last
    byte."""
    timing = Timing([], [])
    for prompt in texts:
        if timing.texts and time.monotonic() > until:
            break
        session = ready(lm, prompt)
        began = time.perf_counter()
        timing.texts.append(write(session, prompt))
        finished(lm)
        timing.seconds.append(time.perf_counter() - began)
    return timing


def by_session(count: int, sampling: Sampling) -> Write:
    """Plain decoding as a session does it, drawing on the host."""
    return lambda session, prompt: b"".join(session.generate_bytes(count, sampling))


def on_device(decoder: Decoder, count: int, sampling: Sampling) -> Write:
    """Plain decoding that draws on the device, and looks at what was drawn every `RUN` bytes."""
    mode = device_mode([sampling])
    assert mode is not None and sampling.seed is not None
    uniforms = Uniforms(sampling.seed)

    def write(session: Session, prompt: bytes) -> bytes:
        mark, text = session.mark(), b""
        decoder.load(0, mark.state, mark.logits)
        decoder.temperature.fill_(sampling.temperature)
        while len(text) < count:
            steps = min(RUN, count - len(text))
            numbers = torch.from_numpy(uniforms.span(session.position + len(text), steps))
            decoder.uniforms[:steps, 0].copy_(numbers)
            text += bytes(decoder.run(1, steps, mode)[:, 0].tolist())
        return text

    return write


def by(decoder: SpeculativeDecoder, count: int, sampling: Sampling) -> Write:
    """Speculative decoding."""
    return lambda session, prompt: b"".join(decoder.generate_bytes(session, count, sampling, context=prompt))


def drafting(tokens: int) -> AdaptiveDraft:
    """So many tokens every time."""
    return AdaptiveDraft(round=1.0, token=1e-9, longest=tokens)


def warmed(lm: LanguageModel, decoder: SpeculativeDecoder, sampling: Sampling, text: bytes, count: int) -> None:
    """Compile and capture what drafts of every length need, and forget what came of it."""
    length = decoder.draft
    for tokens in range(1, SEVERAL + 1):
        decoder.draft = drafting(tokens)
        timed(lm, [text], by(decoder, min(count, 64), sampling))
    decoder.draft = length
    timed(lm, [text], by(decoder, count, sampling))
    decoder.stats = type(decoder.stats)()


def prices(
    lm: LanguageModel, decoder: SpeculativeDecoder, sampling: Sampling, text: bytes, step: float, count: int
) -> AdaptiveDraft:
    """What a round and a drafted token take, in plain steps: from rounds of one token each, and of several.

    In between every length is drafted once, so that nothing is compiled or captured later on."""
    seconds = []
    for tokens in range(1, SEVERAL + 1):
        decoder.draft = drafting(tokens)
        for written in (count // 4, count // 2):  # the first compiles and captures
            decoder.stats = type(decoder.stats)()
            timed(lm, [text], by(decoder, written + 2, sampling))
        stats = decoder.stats
        seconds.append((stats.draft_seconds + stats.verify_seconds) / max(stats.rounds, 1) / step)
    token = max((seconds[-1] - seconds[0]) / (SEVERAL - 1), 0.001)
    return AdaptiveDraft(round=round(max(seconds[0] - token, 0.1), 2), token=round(token, 3))


def measured(
    lm: LanguageModel,
    name: str,
    drafter: Drafter,
    runner: Runner,
    plain: dict[str, Timing],
    given: argparse.Namespace,
    until: float,
) -> list[Figure]:
    """Both rules with one drafter beside plain decoding."""
    figures, texts = [], prompts(given.out / "valid", given.prompts)
    step = sum(plain["exact"].seconds) / (given.bytes * len(plain["exact"].seconds))
    decoders = {
        rule: SpeculativeDecoder(lm, drafter, rule=rule, draft=given.draft or AdaptiveDraft(), runner=runner)
        for rule, _ in RULES
    }
    length: DraftLength = given.draft or prices(lm, decoders["exact"], RULES[1][1], texts[0], step, given.bytes)
    if isinstance(length, AdaptiveDraft):
        figures += [
            Figure(f"{name}: price of a round without tokens, in plain steps", length.round, None, "steps", False),
            Figure(f"{name}: price of a drafted token, in plain steps", length.token, None, "steps", False),
        ]
    print("\n".join(lines(figures)), flush=True)
    for index, (rule, sampling) in enumerate(RULES):
        decoder = decoders[rule]
        decoder.draft = length
        warmed(lm, decoder, sampling, texts[0], given.bytes)
        left = until - time.monotonic()
        end = time.monotonic() + left / (len(RULES) - index)
        fast, stats = timed(lm, texts, by(decoder, given.bytes, sampling), end), decoder.stats
        step = sum(plain[rule].seconds) / (given.bytes * len(plain[rule].seconds))
        price = (stats.draft_seconds + stats.verify_seconds) / max(stats.rounds, 1) / step
        ratios = [a / b for a, b in zip(plain[rule].seconds, fast.seconds, strict=False)]
        what, drafted = f"{rule}, {name}", stats.drafted / max(stats.verifications, 1)
        new = [
            Figure(f"{what}: acceptance", 100 * stats.acceptance, None, "%"),
            Figure(f"{what}: bytes drafted for a verification", drafted, None, "bytes"),
            Figure(f"{what}: bytes for each verification", stats.bytes_per_verification, None, "bytes"),
            Figure(f"{what}: price of a round, in plain steps", price, None, "steps", False),
            Figure(
                f"{what}: of this the draft", stats.draft_seconds / max(stats.rounds, 1) / step, None, "steps", False
            ),
            Figure(f"{what}: speed", given.bytes * len(fast.texts) / sum(fast.seconds), None, "bytes/s"),
            Figure(f"{what}: speed-up", fast.over(plain[rule]), None, "x"),
            Figure(f"{what}: speed-up over a session", fast.over(plain[f"{rule}, session"]), None, "x"),
            Figure(f"{what}: speed-up, median of the prompts", statistics.median(ratios), None, "x"),
            Figure(f"{what}: speed-up predicted", stats.predicted_speedup(step), None, "x"),
            Figure(
                f"{what}: speed-up predicted from acceptance",
                expected_bytes(stats.acceptance, drafted) / price,
                None,
                "x",
            ),
            Figure(f"{what}: prompts", len(fast.texts), None, "prompts"),
        ]
        if rule == "greedy":
            pairs = list(zip(plain[rule].texts, fast.texts, strict=False))
            same = sum(a == b for a, b in pairs)
            new.append(Figure(f"{what}: texts identical to plain, of {len(pairs)}", same, None, "texts"))
        print("\n".join(lines(new)), flush=True)
        figures += new
    return figures


def plainly(
    lm: LanguageModel, pieces: list[bytes], given: argparse.Namespace, until: float
) -> tuple[dict[str, Timing], list[Figure]]:
    """Plain decoding of both kinds: the texts and times of each, and what they say."""
    plain, figures = {}, []
    decoder = Decoder(lm.network, 1, capacity=PROMPT + given.bytes + RUN)
    for index, (rule, sampling) in enumerate(RULES):
        writes = {f"{rule}, session": by_session(given.bytes, sampling)}
        if lm.device.type == "cuda":
            writes[rule] = on_device(decoder, given.bytes, sampling)
        for name, write in writes.items():
            few = pieces[:FEW] if len(writes) > 1 and name != rule else pieces
            timed(lm, pieces[:1], write)  # compiles and captures
            left = until - time.monotonic()
            plain[name] = timed(lm, few, write, time.monotonic() + left / (len(RULES) - index))
        plain.setdefault(rule, plain[f"{rule}, session"])
        for name, what in ((rule, "plain decoding"), (f"{rule}, session", "plain decoding by a session")):
            speed = given.bytes * len(plain[name].seconds) / sum(plain[name].seconds)
            what = f"{rule}: {what}, {len(plain[name].seconds)} prompts, {given.bytes} bytes"
            figures.append(Figure(what, speed, None, "bytes/s"))
        print("\n".join(lines(figures[-2:])), flush=True)
    return plain, figures


def measure(given: argparse.Namespace) -> list[Figure]:
    """Train what is not there, and measure; done in the minutes that are given."""
    began = time.monotonic()
    end = began + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    texts, _ = write_texts(given.data, given.out, given.megabytes)
    tokenizer = learned_tokenizer(texts, given.vocabulary, given.out / "tokenizer.json")
    print(f"texts and tokenizer: {time.monotonic() - began:.0f} s", flush=True)
    trained_by = end - given.measure_seconds - RESERVE
    figures, shares = [], {"verifier": 1 - given.drafter_share, "drafter": 1.0}
    for number, (name, share) in enumerate(shares.items()):
        left = trained_by - time.monotonic() - (len(shares) - number) * SETUP
        minutes = max(share * left / 60, 0.01)
        size = given.verifier_size if name == "verifier" else given.drafter_size
        config = settings(name, size, minutes, given, None if name == "verifier" else tokenizer)
        figures += trained(config, given.out / name[0])
    dtype = given.dtype or ("bfloat16" if choose_device(given.device).type == "cuda" else "float32")
    lm, small = (milonga.load(given.out / run, device=given.device, dtype=dtype) for run in ("v", "d"))
    print(f"trained: {time.monotonic() - began:.0f} s; measuring on {lm.device} in {dtype}", flush=True)
    pieces = prompts(given.out / "valid", given.prompts)
    whole = max(end - time.monotonic(), 10.0)
    plain, found = plainly(lm, pieces, given, time.monotonic() + 0.55 * whole)
    figures += found
    runner = runner_for(lm.network)
    drafters: dict[str, Drafter] = {
        "subwords": ModelDrafter(small, runner_for(small.network)),
        "n-gram": NgramDrafter(),
    }
    for index, (name, drafter) in enumerate((name, drafters[name]) for name in given.drafters):
        left = max(end - time.monotonic(), 4.0)
        until = time.monotonic() + left * (0.65 if index + 1 < len(given.drafters) else 0.9)
        figures += measured(lm, name, drafter, runner, plain, given, until)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)
    return figures


def arguments() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts or archives, train and valid")
    parser.add_argument("--out", type=Path, default=Path("runs/speculation"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--measure-seconds", type=float, default=75.0, help="of these, for what is not training")
    parser.add_argument("--drafter-share", type=float, default=0.3, help="of the time of training")
    parser.add_argument("--pattern", default="mamba mlp", help="words mamba, mlp and swa")
    parser.add_argument("--verifier-size", default="512x28", help="WIDTHxREPEATS of the pattern")
    parser.add_argument("--drafter-size", default="768x2")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the drafter")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text to train on, at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024, help="bytes of a row; the drafter has a quarter as tokens")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--evaluate", type=int, default=262144, help="held-out tokens that are scored")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=1000, help="to write behind each prompt")
    parser.add_argument("--drafters", nargs="+", choices=("subwords", "n-gram"), default=["subwords", "n-gram"])
    parser.add_argument("--draft", type=int, help="bytes drafted for a round; without it as many as pay")
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="of the weights while writing; bfloat16 on a GPU")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser


if __name__ == "__main__":
    given = arguments().parse_args()
    results = measure(given)
    print("\n".join(["", *lines(results)]))
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in results], indent=2) + "\n")
