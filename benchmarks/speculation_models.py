"""Texts and models of `speculation_gpu.py`: what is trained on and held out, the tokenizer, both runs, the prompts."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, lines

from milonga.data.bpe_training import train_bpe
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.errors import UserError
from milonga.inference.language_model import choose_device
from milonga.training import Progress, RunConfig, list_checkpoints, train

PROMPT = 200  # bytes of a prompt
BPE_BYTES = 20_000_000  # of the text, that the tokenizer is learned from


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
    """The run of a stack, WIDTHxREPEATS of the pattern.

    Raises:
        UserError: if the size is none.
    """
    try:
        width, repeats = map(int, size.split("x"))
    except ValueError as error:
        raise UserError(f"size {size!r}: expected WIDTHxREPEATS, such as 1024x4") from error
    cuda = choose_device(given.device).type == "cuda"
    window = given.window if tokenizer is None else max(given.window // 4, 16)  # about as much text
    layers = {
        "mamba": {"kind": "mamba"},
        "swa": {"kind": "attention", "heads": max(width // 64, 1), "window": min(512, window)},
        "mlp": {"kind": "swiglu", "d_hidden": max(width * 8 // 3 // 64 * 64, 32)},
    }
    return RunConfig.parse(
        {
            "name": name,
            "model": {
                **({"vocab_size": 256} if tokenizer is None else {}),
                "d_model": width,
                "pattern": given.pattern,
                "repeats": repeats,
                "layers": {name: layer for name, layer in layers.items() if name in given.pattern.split()},
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
