"""A long text through one session: does memory grow, and does rounding add up in the state.

    python benchmarks/soak.py [RUN] [--text PATH ...] [--fed N] [--generated N] [--first N] [--drift N]
        [--out FOLDER] [--json]

RUN: runs/demo where none is given. `--text`: files, folders or `bundled:train` (the default), begun again at their end.

One session on the CPU reads `--fed` bytes (20 million) in pieces and then writes `--generated` bytes (200,000).
Resident memory of the process is compared with what it was when the first million (`--first`) had been read. Meanwhile
a second process reads the first `--drift` bytes (10 million) with the same network in float64. At 1, 2 and 5 times
every power of ten from 1000 on, the states of the two are compared: the relative RMS difference of every tensor, over 8
places 100 bytes apart.

The float64 run is the library's own network, all of it in float64, with one op exchanged: the plain definition of the
scan is a loop in Python, so the same sums are compiled here. On the first 2000 bytes both are run, and the benchmark
stops unless their states agree to 1e-12. `--out` writes the curves as `soak.json` and two SVG pictures.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import matplotlib as mpl
import numba
import numpy as np
import torch
import torch.nn.functional as F
from figures import Figure, main
from torch import Tensor

import milonga
import milonga.layers.mamba as mamba_layer
from milonga.data.readers import Reading, find_sources, read_documents
from milonga.errors import UserError
from milonga.evaluation.drawing import PAPER, new_figure, save_picture, style
from milonga.evaluation.throughput import resident_bytes
from milonga.inference import Session
from milonga.state import to_flat

FEED, LOOK = 1 << 16, 2000  # bytes between looks at memory: read, written
CHECKED, AGREEMENT = 2000, 1e-12
TREND = 1.2  # errors that added up would grow 3.2 times as large over ten times the text, or ten times
SAMPLES, SPACING = 8, 100
FIRST_MARK = 1000
SCAN_STEPS = 64  # decays that are in memory at once: 1 MiB of them at 128 channels
MIB = 1 << 20


class Progress:
    """Lines on stderr, at most one in ten seconds: how far, how fast, how long still."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.began = self.told = time.perf_counter()

    def tell(self, done: int) -> None:
        """`done` of the bytes are behind us."""
        now = time.perf_counter()
        if done and (now - self.told > 10 or done == self.total):
            self.told = now
            rate = done / (now - self.began)
            left = (self.total - done) / rate / 60
            line = f"soak: {self.what} {done:,} of {self.total:,} bytes, {rate:,.0f} bytes/s, {left:.1f} min left"
            print(line, file=sys.stderr, flush=True)


def read_text(paths: Sequence[str], length: int) -> bytes:
    """`length` bytes of the documents behind `paths`, which begin again where they end."""
    reading = Reading("text", lambda _: None, lambda _: None)
    pieces, have = [], 0
    for document in read_documents(find_sources(paths), reading):
        for piece in document.pieces:
            pieces.append(piece)
            have += len(piece)
            if have >= length:
                break
        if have >= length:
            break
    text = b"".join(pieces)
    if not text:
        raise UserError(f"soak: no text in {', '.join(paths)}")
    return (text * -(-length // len(text)))[:length]


def marks_until(last: int) -> list[int]:
    """1, 2 and 5 times the powers of ten from `FIRST_MARK` to `last`."""
    powers = (10**power for power in range(3, 19))
    return [first * power for power in powers for first in (1, 2, 5) if first * power <= last]


def places(marks: Sequence[int]) -> set[int]:
    """The positions that the marks' states are taken at."""
    return {mark - SPACING * index for mark in marks for index in range(SAMPLES)}


def stored_state(folder: Path, kind: str, position: int) -> Path:
    """The file of a state."""
    return folder / f"{kind}-{position}.npz"


def store_state(folder: Path, kind: str, session: Session) -> None:
    """Write every floating tensor of the session's state, each under its name."""
    tensors = {name: value.numpy() for name, value in floating_state(session).items()}
    np.savez(stored_state(folder, kind, session.position), **tensors)


def floating_state(session: Session) -> dict[str, Tensor]:
    """Every floating tensor of the session's state that holds something, by name."""
    tensors = to_flat(session.mark().state).items()
    return {name: value for name, value in tensors if value.is_floating_point() and value.numel()}


@numba.njit(nogil=True)
def recurrence(decay, inputs, B, C, h, y):
    """h_t = decay_t h_{t-1} + inputs_t B_t, written over `h` `[E N]`, and y_t = C_t h_t, for T steps in float64."""
    for t in range(decay.shape[0]):
        for e in range(decay.shape[1]):
            total = 0.0
            for n in range(decay.shape[2]):
                value = decay[t, e, n] * h[e, n] + inputs[t, e] * B[t, n]
                h[e, n] = value
                total += C[t, n] * value
            y[t, e] = total


class ExactScan:
    """The selective scan of one row in float64, compiled. It also adds up how fast each state forgets.

    Args:
        layers: how many scans the network has; they are called in turn.
    """

    def __init__(self, layers: int):
        self.rates: list[Tensor | None] = [None] * layers
        self.calls = self.steps = 0

    def __call__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        *,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        initial: Tensor,
        segments: None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `milonga.ops.selective_scan`, for `[1 T E]` in float64 after a state."""
        assert x.dtype == torch.float64 and x.shape[0] == 1 and segments is None
        delta = F.softplus(dt + dt_bias)
        inputs, h, y = (delta * x)[0].numpy(), initial[0].numpy().copy(), np.empty(x.shape[1:])
        b, c = B[0].numpy(), C[0].numpy()
        for i in range(0, x.shape[1], SCAN_STEPS):
            part = slice(i, i + SCAN_STEPS)
            decay = torch.exp(delta[0, part, :, None] * A).numpy()
            recurrence(decay, inputs[part], b[part], c[part], h, y[part])
        layer = self.calls % len(self.rates)
        before, added = self.rates[layer], delta[0].sum(0)[:, None] * -A
        self.rates[layer] = added if before is None else before + added
        self.calls += 1
        self.steps += x.shape[1] if layer == 0 else 0
        return (torch.from_numpy(y)[None] + D * x) * F.silu(z), torch.from_numpy(h)[None]

    def slowest_half_life(self) -> float:
        """Bytes after which the state that forgets slowest has, at the mean rate of the text, forgotten half."""
        slowest = min(float(rate.min()) for rate in self.rates if rate is not None)
        return float(np.log(2) * self.steps / slowest)


def relative_rms(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of (measured, exact): the RMS of the difference over the RMS of the exact, all pairs together."""
    error = sum(float(((measured.astype(np.float64) - exact) ** 2).sum()) for measured, exact in pairs)
    return float(np.sqrt(error / sum(float((exact**2).sum()) for _, exact in pairs)))


def exact_run(run: str, text: bytes, marks: Sequence[int], folder: Path) -> None:
    """The process of the float64 run: states into `folder`, and `exact.json` with how it went."""
    torch.set_num_threads(1)
    lm = milonga.load(run, device="cpu")
    lm.network.double()
    layers = sum(isinstance(layer, mamba_layer.Mamba) for layer in lm.network.layers())
    plain = lm.session()
    plain.feed(text[:CHECKED])
    with patch.object(mamba_layer, "selective_scan", ExactScan(layers)):
        session = lm.session()
        session.feed(text[:CHECKED])
    expected, got = floating_state(plain), floating_state(session)
    check = max(relative_rms([(got[name].numpy(), value.numpy())]) for name, value in expected.items())
    if check > AGREEMENT:
        sys.exit(f"soak: the compiled float64 scan differs from the definition by {check:.2g}")
    scan, progress = ExactScan(layers), Progress("float64:", marks[-1])
    wanted = places(marks)
    stops = sorted({0, *wanted, *range(0, marks[-1], FEED)})
    with patch.object(mamba_layer, "selective_scan", scan):
        session = lm.session()
        for start, end in pairwise(stops):
            session.feed(text[start:end])
            if end in wanted:
                store_state(folder, "exact", session)
            progress.tell(end)
    rate = marks[-1] / (time.perf_counter() - progress.began)
    facts = {"check": check, "half_life": scan.slowest_half_life(), "bytes_per_second": rate}
    (folder / "exact.json").write_text(json.dumps(facts))


@dataclass
class Memory:
    """Resident memory as a text goes by: (bytes read or written, bytes resident), after the `first` bytes."""

    first: int
    looks: list[tuple[int, int]] = field(default_factory=list)

    def look(self, position: int) -> None:
        """Once the first bytes are read."""
        if position >= self.first:
            self.looks.append((position, resident_bytes()))

    def growth(self) -> int:
        """The most by which it exceeded that of the first look."""
        return max(size for _, size in self.looks) - self.looks[0][1]


def soak(run: str, text: bytes, generated: int, memory: Memory, marks: Sequence[int], folder: Path) -> dict[str, float]:
    """Read the text and write after it, looking at memory: -> bytes/s of both. States at the marks go into `folder`."""
    session, wanted = milonga.load(run, device="cpu").session(), places(marks)
    stops = sorted({0, len(text), memory.first, *wanted, *range(0, len(text), FEED)})
    progress = Progress("read", len(text))
    for start, end in pairwise(stops):
        session.feed(text[start:end])
        if end in wanted:
            store_state(folder, "session", session)
        memory.look(end)
        progress.tell(end)
    rates = {"feed_bytes_per_second": len(text) / (time.perf_counter() - progress.began)}
    if generated:
        progress = Progress("wrote", generated)
        for count, _ in enumerate(session.generate_bytes(generated, temperature=0.8), 1):
            if count % LOOK == 0 or count == generated:
                memory.look(len(text) + count)
                progress.tell(count)
        rates["generate_bytes_per_second"] = generated / (time.perf_counter() - progress.began)
    return rates


def drift(marks: Sequence[int], folder: Path) -> dict[str, list[float]]:
    """By name of a tensor of the state, as in `0.ssm`: its relative RMS difference from float64 at each mark."""
    errors: dict[str, list[float]] = {}
    for mark in marks:
        at = sorted(places([mark]))
        loaded = [
            (np.load(stored_state(folder, "session", place)), np.load(stored_state(folder, "exact", place)))
            for place in at
        ]
        for name in loaded[0][1].files:
            pairs = [(session[name], exact[name]) for session, exact in loaded]
            errors.setdefault(name, []).append(relative_rms(pairs))
    return errors


def factor_per_decade(marks: Sequence[int], errors: Sequence[float]) -> float:
    """The factor by which errors grow when the text gets ten times as long: a straight line through the logarithms."""
    slope = np.polyfit(np.log10(marks), np.log10(errors), 1)[0]
    return float(10**slope)


def draw(folder: Path, marks: Sequence[int], errors: dict[str, list[float]], memory: Memory) -> None:
    """`soak-drift.svg` and `soak-memory.svg`."""
    colours = (PAPER.model, PAPER.other, PAPER.second, PAPER.ink)
    with mpl.rc_context(style(PAPER)):
        figure, axes = new_figure((7.2, 4.0))
        recurrent = [name for name in errors if name.endswith("ssm")]
        for number, name in enumerate(recurrent):
            layer = f"layer {name.split('.')[0]}: recurrent state"
            axes.loglog(marks, errors[name], color=colours[number % 4], marker="o", markersize=4, label=layer)
        others = [name for name in errors if name not in recurrent]
        for name in others:
            label = "convolutions, keys and values" if name == others[0] else None
            axes.loglog(marks, errors[name], color=PAPER.muted, linewidth=0.8, alpha=0.6, label=label)
        start = errors[recurrent[0]][0]
        walk = [start * (mark / marks[0]) ** 0.5 for mark in marks]
        axes.loglog(marks, walk, color=PAPER.muted, linestyle=(0, (3, 3)), linewidth=1.2, label="if rounding added up")
        axes.set_xlabel("bytes read")
        axes.set_ylabel("relative RMS difference from float64")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        save_picture(figure, folder / "soak-drift.svg")
        figure, axes = new_figure((7.2, 2.8))
        positions, sizes = np.array(memory.looks).T
        axes.plot(positions / 1e6, (sizes - sizes[0]) / MIB, color=PAPER.model, linewidth=1.6)
        axes.axhline(8, color=PAPER.other, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate("demanded: below 8 MiB", (1, 8), xytext=(0, -12), textcoords="offset points", color=PAPER.other)
        axes.set_ylim(min(-1.0, float(sizes.min() - sizes[0]) / MIB - 1), 9)
        axes.set_xlabel("MB read and written")
        axes.set_ylabel("MiB more than after 1 MB")
        save_picture(figure, folder / "soak-memory.svg")


def measure(given: argparse.Namespace) -> list[Figure]:
    """Both processes, and what they come to."""
    marks, memory = marks_until(given.drift), Memory(given.first)
    if given.drift < 2 * FIRST_MARK or given.fed < max(given.drift, given.first):
        raise UserError(f"soak: --drift must be at least {2 * FIRST_MARK}, and --fed no less than --drift and --first")
    text = read_text(given.text, given.fed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (given.run, text[: marks[-1]], marks, folder)
        exact = multiprocessing.get_context("spawn").Process(target=exact_run, args=arguments, daemon=True)
        exact.start()
        rates = soak(given.run, text, given.generated, memory, marks, folder)
        exact.join()
        if exact.exitcode:
            raise UserError(f"soak: the float64 run ended with exit code {exact.exitcode}")
        facts = json.loads((folder / "exact.json").read_text())
        errors = drift(marks, folder)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        curves = {"marks": marks, "drift": errors, "exact": facts, "rates": rates, "memory": memory.looks}
        (given.out / "soak.json").write_text(json.dumps(curves))
        draw(given.out, marks, errors, memory)
    recurrent = [values for name, values in errors.items() if name.endswith("ssm")]
    worst, trend = max(map(max, recurrent)), max(factor_per_decade(marks, values) for values in recurrent)
    what = f"{given.fed:,} bytes read, {given.generated:,} written: growth after {given.first:,}"
    return [
        Figure(what, memory.growth() / MIB, 8, "MiB", at_least=False),
        Figure("float64 run against the definition, 2000 bytes", facts["check"], AGREEMENT, "", at_least=False),
        Figure(f"recurrent state, worst layer, {marks[0]:,} to {marks[-1]:,} bytes", worst, None, ""),
        Figure("recurrent state, worst layer: factor for ten times the text", trend, TREND, "x", at_least=False),
        Figure("the slowest state forgets half in", facts["half_life"], None, "bytes"),
        Figure("float64 run", facts["bytes_per_second"], None, "bytes/s"),
        *(Figure(f"session: {name.split('_')[0]}", rate, None, "bytes/s") for name, rate in rates.items()),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="runs/demo")
    parser.add_argument("--text", nargs="+", default=["bundled:train"])
    parser.add_argument("--fed", type=int, default=20_000_000)
    parser.add_argument("--generated", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=1_000_000)
    parser.add_argument("--drift", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        main(lambda: measure(given))
    except UserError as problem:
        parser.error(str(problem))
