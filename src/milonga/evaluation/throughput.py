"""How fast a model reads and writes, and what it holds while it does, beside a Transformer's cache."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from milonga.errors import UserError
from milonga.inference import LanguageModel, Session
from milonga.models import ModelConfig

if sys.platform != "win32":
    import resource

_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Throughput:
    """Bytes of text a second, the best of the repeats."""

    feed_bytes_per_second: float
    generate_bytes_per_second: float
    threads: int
    device: str

    def to_json(self) -> dict[str, object]:
        """The fields, JSON-ready."""
        return asdict(self)


def measure_throughput(
    lm: LanguageModel, text: bytes, *, generated: int = 256, repeats: int = 3, warmup: int = 2048
) -> Throughput:
    """Time reading `text` in one `feed`, and writing `generated` bytes after it, `repeats` times each.

    Raises:
        UserError: if the text is empty or a number is below 1.
    """
    if not text or generated < 1 or repeats < 1:
        raise UserError("throughput: give a text, and at least one byte to generate and one repeat")
    warm = lm.session()
    warm.feed(text[:warmup])
    for _ in warm.generate_bytes(8):
        pass
    feeding, writing = [], []
    for _ in range(repeats):
        session = lm.session()
        feeding.append(_seconds(lm.device, lambda session=session: session.feed(text)))
        writing.append(_seconds(lm.device, lambda session=session: _write(session, generated)))
    return Throughput(len(text) / min(feeding), generated / min(writing), torch.get_num_threads(), str(lm.device))


def _write(session: Session, count: int) -> None:
    for _ in session.generate_bytes(count, temperature=0.8):
        pass


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def transformer_cache_bytes(config: ModelConfig, length: int, *, dtype: torch.dtype = torch.float32) -> int:
    """What a Transformer of the same width and depth holds after `length` tokens: the keys and values of each layer.

    Its stack is `attention mlp` repeated to as many sub-layers, with as many key heads as query heads, so each
    attention layer keeps 2 * d_model numbers a token.
    """
    attention_layers = (len(config.stack) + 1) // 2
    return 2 * attention_layers * config.d_model * dtype.itemsize * length


def resident_bytes() -> int:
    """Resident memory of this process now (macOS says only the most it ever was).

    Raises:
        UserError: where the system does not say (Windows).
    """
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        raise UserError("throughput: resident memory is not known on Windows")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MemoryGrowth:
    """Resident memory of the process while one session reads."""

    first_bytes: int  # text read before the first look
    bytes: int  # text read in all
    growth: int  # the most by which resident memory then exceeded that at the first look, in bytes


def memory_growth(session: Session, text: bytes, *, first: int, total: int) -> MemoryGrowth:
    """Feed `text` again and again until `total` bytes are read, watching resident memory after the first `first`.

    Raises:
        UserError: if the text is empty, or the system does not tell resident memory.
    """
    if not text:
        raise UserError("throughput: give a text to read")
    base, growth, start = None, 0, session.position
    while session.position - start < total:
        session.feed(text[: total - (session.position - start)])
        if session.position - start >= first:
            now = resident_bytes()
            base = now if base is None else base
            growth = max(growth, now - base)
    return MemoryGrowth(first, session.position - start, growth)
