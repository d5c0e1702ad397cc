"""Speculative decoding of a pair trained for it: a byte model and a subword drafter, trained and measured in one go.

    python benchmarks/speculation_gpu.py --data FOLDER [--minutes N] [--verifier-size 1024x4] [--drafter-size 512x1]
                                         [--prompts 32] [--bytes 1000] [--out FOLDER] [--json FILE]

FOLDER holds texts or archives whose names contain `train`, and others whose names contain `valid`. A tokenizer is
learned, then both models are trained on the same text (bf16 on a GPU), by default Samba stacks of 109 and 11 million
parameters. Prompts are equally spaced pieces of the valid texts. Rules greedy and exact (temperature 0.8) write behind
each of them, beside plain decoding of the same model; on a GPU both are captured in CUDA graphs. The predicted speed-up
is the bytes of a verification over the price of a round in plain steps; the one from acceptance takes every byte of a
draft to stand with the same chance. A second call with the same --out measures what the first one trained.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from figures import Figure, lines

import milonga
from milonga.data.bpe_training import train_bpe
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.errors import UserError
from milonga.inference import LanguageModel, Sampling, Session
from milonga.inference.captured import runner_for
from milonga.inference.drafters import Drafter, NgramDrafter
from milonga.inference.language_model import choose_device
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.runner import Runner
from milonga.inference.speculative import SpeculativeDecoder
from milonga.training import Progress, RunConfig, list_checkpoints, train

PROMPT = 200  # bytes of a prompt
BPE_BYTES = 20_000_000  # of the text, that the tokenizer is learned from
RULES = (("greedy", Sampling(temperature=0.0)), ("exact", Sampling(temperature=0.8)))


def documents(folder: Path, split: str, limit: int) -> Iterator[tuple[str, bytes]]:
    """Documents of the files of a folder whose names contain `split`: at most `limit` bytes, from every file alike."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and split in path.name)
    if not files:
        raise UserError(f"--data {folder}: no file there has '{split}' in its name")
    for path in files:
        left = limit // len(files)
        for document in read_documents(find_sources([path]), Reading("text", lambda _: None, lambda _: None)):
            text = b"".join(document.pieces)[:left]
            left -= len(text)
            if text:
                yield document.name, text
            if left <= 0:
                break


def write_texts(data: Path, out: Path, megabytes: float) -> tuple[Path, Path]:
    """Copy what is trained on and what is held out as plain files: -> their folders."""
    folders = out / "train", out / "valid"
    for folder, share in zip(folders, (1.0, 0.1), strict=True):
        if (folder / ".whole").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for number, (_, text) in enumerate(documents(data, folder.name, int(megabytes * share * 1e6))):
            (folder / f"{number:06}.txt").write_bytes(text)
        (folder / ".whole").touch()
    return folders


def learned_tokenizer(texts: Path, vocabulary: int, path: Path) -> Path:
    """A tokenizer of the first bytes of every text."""
    if not path.exists():
        files = sorted(texts.glob("*.txt"))
        share = max(BPE_BYTES // len(files), 1)
        train_bpe(((file.read_bytes()[:share],) for file in files), vocabulary).save(path)
    return path


def settings(name: str, size: str, minutes: float, given: argparse.Namespace, tokenizer: Path | None) -> RunConfig:
    """The run of a Samba stack, WIDTHxREPEATS of `mamba mlp swa mlp`.

    Raises:
        UserError: if the size is none.
    """
    try:
        width, repeats = map(int, size.split("x"))
    except ValueError as error:
        raise UserError(f"size {size!r}: expected WIDTHxREPEATS, such as 1024x4") from error
    cuda = choose_device(given.device).type == "cuda"
    window = given.window if tokenizer is None else max(given.window // 4, 16)  # about as much text
    return RunConfig.parse(
        {
            "name": name,
            "model": {
                **({"vocab_size": 256} if tokenizer is None else {}),
                "d_model": width,
                "pattern": "mamba mlp swa mlp",
                "repeats": repeats,
                "layers": {
                    "mamba": {"kind": "mamba"},
                    "swa": {"kind": "attention", "heads": max(width // 64, 1), "window": min(512, window)},
                    "mlp": {"kind": "swiglu", "d_hidden": max(width * 8 // 3 // 64 * 64, 32)},
                },
            },
            "data": {
                "paths": [str(given.out / "train")],
                "heldout": [str(given.out / "valid")],
                **({} if tokenizer is None else {"tokenizer": str(tokenizer)}),
            },
            "training": {
                "minutes": minutes,
                "batch": given.batch,
                "window": window,
                "precision": "bf16" if cuda else "fp32",
                "residual": "bf16" if cuda else "fp32",
                "device": str(choose_device(given.device)),
                "optimizer": {"name": given.optimizer, "lr": given.lr, "weight_decay": 0.1},
                "schedule": {"warmup_fraction": 0.03, "decay": "linear", "final_fraction": 0.0},
                "evaluate_every": 0,
                "save_every": 0,
                "log_every": 20,
            },
            "evaluation": {"tokens": given.evaluate},
        },
        name,
    )


def trained(config: RunConfig, out: Path) -> list[Figure]:
    """Train a run, if it is not there: -> what came of it."""
    if list_checkpoints(out):
        print(f"{out}: is there already", flush=True)
        return []
    told = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= 15:
            told = time.monotonic()
            score = "" if progress.bits_per_byte is None else f", {progress.bits_per_byte:.3f} bits per byte"
            print(f"  {config.name}: {progress.phase} {progress.done} of {progress.total}{score}", flush=True)

    result = train(config, out, progress=tell)
    figures = [Figure(f"{config.name}: parameters", result.parameters / 1e6, None, "M")]
    if result.bits_per_byte is not None:
        figures.append(Figure(f"{config.name}: held-out text", result.bits_per_byte, None, "bits/byte", False))
    figures.append(Figure(f"{config.name}: read in training", result.bytes / 1e6, None, "MB"))
    figures.append(Figure(f"{config.name}: training", result.bytes_per_second / 1e6, None, "MB/s"))
    print("\n".join(lines(figures)), flush=True)
    return figures


def prompts(valid: Path, count: int) -> list[bytes]:
    """Equally spaced pieces of the held-out texts, laid end to end.

    Raises:
        UserError: if they are too short.
    """
    text = b"".join(path.read_bytes() for path in sorted(valid.glob("*.txt")))
    step = (len(text) - PROMPT) // count
    if step < 1:
        raise UserError(f"{valid}: {len(text)} bytes are too few for {count} prompts")
    return [text[index * step : index * step + PROMPT] for index in range(count)]


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


def written(lm: LanguageModel, texts: list[bytes], count: int, sampling: Sampling, decoder: object = None) -> Timing:
    """Write behind every prompt, plainly or with a decoder. The clock runs from behind the prompt to the last byte."""
    timing = Timing([], [])
    for prompt in texts:
        session = ready(lm, prompt)
        began = time.perf_counter()
        if isinstance(decoder, SpeculativeDecoder):
            text = b"".join(decoder.generate_bytes(session, count, sampling, context=prompt))
        else:
            text = b"".join(session.generate_bytes(count, sampling))
        finished(lm)
        timing.seconds.append(time.perf_counter() - began)
        timing.texts.append(text)
    return timing


def expected_bytes(acceptance: float, draft: float) -> float:
    """Bytes of a verification of `draft` bytes, each of which stands with the same chance if those before it do."""
    return draft + 1 if acceptance == 1 else (1 - acceptance ** (draft + 1)) / (1 - acceptance)


def measured(
    lm: LanguageModel, name: str, drafter: Drafter, runner: Runner, plain: dict[str, Timing], given: argparse.Namespace
) -> list[Figure]:
    """Both rules with one drafter beside plain decoding."""
    figures, texts = [], prompts(given.out / "valid", given.prompts)
    for rule, sampling in RULES:
        decoder = SpeculativeDecoder(lm, drafter, rule=rule, draft=given.draft, runner=runner)
        written(lm, texts[:1], given.bytes, sampling, decoder)  # compiles and captures
        decoder.stats = type(decoder.stats)()
        fast, stats = written(lm, texts, given.bytes, sampling, decoder), decoder.stats
        step = sum(plain[rule].seconds) / (given.bytes * len(texts))
        price = (stats.draft_seconds + stats.verify_seconds) / max(stats.rounds, 1) / step
        ratios = [a / b for a, b in zip(plain[rule].seconds, fast.seconds, strict=True)]
        what = f"{rule}, {name}"
        figures += [
            Figure(f"{what}: acceptance", 100 * stats.acceptance, None, "%"),
            Figure(f"{what}: bytes for each verification", stats.bytes_per_verification, None, "bytes"),
            Figure(f"{what}: price of a round, in plain steps", price, None, "steps", False),
            Figure(
                f"{what}: of this the draft", stats.draft_seconds / max(stats.rounds, 1) / step, None, "steps", False
            ),
            Figure(f"{what}: speed", given.bytes * len(texts) / sum(fast.seconds), None, "bytes/s"),
            Figure(f"{what}: speed-up", sum(plain[rule].seconds) / sum(fast.seconds), None, "x"),
            Figure(f"{what}: speed-up, median of the prompts", statistics.median(ratios), None, "x"),
            Figure(f"{what}: speed-up predicted", stats.predicted_speedup(step), None, "x"),
            Figure(
                f"{what}: speed-up predicted from acceptance",
                expected_bytes(stats.acceptance, stats.drafted / max(stats.verifications, 1)) / price,
                None,
                "x",
            ),
        ]
        if rule == "greedy":
            same = sum(a == b for a, b in zip(plain[rule].texts, fast.texts, strict=True))
            figures.append(Figure(f"{what}: texts identical to plain, of {len(texts)}", same, None, "texts"))
        print("\n".join(lines(figures[-10 if rule == "greedy" else -9 :])), flush=True)
    return figures


def measure(given: argparse.Namespace) -> list[Figure]:
    """Train what is not there, and measure."""
    began = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    texts, _ = write_texts(given.data, given.out, given.megabytes)
    tokenizer = learned_tokenizer(texts, given.vocabulary, given.out / "tokenizer.json")
    print(f"texts and tokenizer: {time.monotonic() - began:.0f} s", flush=True)
    share = given.minutes * given.drafter_share
    figures = trained(settings("verifier", given.verifier_size, given.minutes - share, given, None), given.out / "v")
    figures += trained(settings("drafter", given.drafter_size, share, given, tokenizer), given.out / "d")
    dtype = given.dtype or ("bfloat16" if choose_device(given.device).type == "cuda" else "float32")
    lm, small = (milonga.load(given.out / run, device=given.device, dtype=dtype) for run in ("v", "d"))
    print(f"trained: {time.monotonic() - began:.0f} s; measuring on {lm.device} in {dtype}", flush=True)
    pieces, plain = prompts(given.out / "valid", given.prompts), {}
    for rule, sampling in RULES:
        written(lm, pieces[:1], min(given.bytes, 64), sampling)  # compiles and captures
        plain[rule] = written(lm, pieces, given.bytes, sampling)
        speed = given.bytes * len(pieces) / sum(plain[rule].seconds)
        figures.append(
            Figure(f"{rule}: plain decoding, {given.prompts} prompts, {given.bytes} bytes", speed, None, "bytes/s")
        )
        print("\n".join(lines(figures[-1:])), flush=True)
    runner = runner_for(lm.network)
    drafters: dict[str, Drafter] = {
        "subwords": ModelDrafter(small, runner_for(small.network)),
        "n-gram": NgramDrafter(),
    }
    for name, drafter in drafters.items():
        figures += measured(lm, name, drafter, runner, plain, given)
    return figures


def arguments() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of texts or archives, train and valid")
    parser.add_argument("--out", type=Path, default=Path("runs/speculation"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, both models together")
    parser.add_argument("--drafter-share", type=float, default=0.25, help="of these minutes")
    parser.add_argument("--verifier-size", default="1024x4", help="WIDTHxREPEATS of mamba mlp swa mlp")
    parser.add_argument("--drafter-size", default="512x1")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the drafter")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text to train on, at most")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024, help="bytes of a row; the drafter has a quarter as tokens")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--evaluate", type=int, default=262144, help="held-out tokens that are scored")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--bytes", type=int, default=1000, help="to write behind each prompt")
    parser.add_argument("--draft", type=int, default=8, help="bytes drafted for a round")
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
