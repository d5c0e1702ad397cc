"""What holding a text costs: saving, loading and forking the state of a model of 1.7B parameters.

    python benchmarks/states.py [--json]

The state is that of `samba-1.7b` in bf16 behind 100,000 tokens, its numbers random; the weights are not needed. Saving
and loading go through a file on the disk, checksums included. With a GPU the state lives there.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Figure, main

from milonga.data.text import ByteCodec
from milonga.evaluation.decoding import fill_state
from milonga.inference.marks import Mark
from milonga.inference.session_file import read_session, write_session
from milonga.models.presets import preset
from milonga.state import clone, nbytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITION = 100_000


def place() -> Mark:
    """A place in a text, its state filled with random numbers."""
    network = preset("samba-1.7b").build(device="meta").bfloat16()
    state = network.init_state(1, device=DEVICE)
    fill_state(state, POSITION)
    return Mark(network, state, torch.randn(50304, device=DEVICE), POSITION, b"", POSITION)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time, the device's work included."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def figures() -> list[Figure]:
    """Save and load together, and a fork."""
    here, codec = place(), ByteCodec()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.state"

        def save_and_load() -> None:
            write_session(path, here, None, "0" * 64, codec)
            read_session(path, "0" * 64, codec, here)

        stored = seconds(save_and_load, 5)
    fork = seconds(lambda: clone(here.state), 20)
    size = nbytes(here.state) / 2**20
    print_at = f"{size:.0f} MiB, {DEVICE}"
    return [
        Figure(f"save and load a state of samba-1.7b ({print_at})", stored, 0.3, "s", at_least=False),
        Figure(f"fork it ({print_at})", fork * 1e3, 5.0 if DEVICE == "cuda" else 50.0, "ms", at_least=False),
    ]


if __name__ == "__main__":
    main(figures)
