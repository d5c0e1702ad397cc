"""How long the first answer takes: help of the commands, and importing the library beyond torch alone.

    python benchmarks/startup.py [--json]

Processes of both kinds take turns, so that a busy machine slows both; the minimum of the repeats counts.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from figures import Figure, main

MILONGA = str(Path(sys.executable).parent / "milonga")
REPEATS = 5
COMMANDS = {
    "milonga --help": [MILONGA, "--help"],
    "milonga train --help": [MILONGA, "train", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import milonga; milonga.load": [sys.executable, "-c", "import milonga; milonga.load"],
}


def seconds(command: Sequence[str]) -> float:
    """Wall time of one process."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(repeats: int = REPEATS) -> dict[str, float]:
    """The least wall time of each command, after one run of each that fills the disk's cache."""
    best = dict.fromkeys(COMMANDS, float("inf"))
    for round_ in range(repeats + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if round_:
                best[name] = min(best[name], taken)
    return best


def loaded_by_load() -> list[str]:
    """Which of the packages that `milonga.load` has no use for it imports all the same."""
    code = (
        "import sys, milonga; milonga.load; print([n for n in ('numba', 'triton', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip("[]\n").replace("'", "").split(", ") if done.stdout.strip() != "[]" else []


def figures() -> list[Figure]:
    """The least times, and what is loaded without need."""
    best = measure()
    beyond = best["import milonga; milonga.load"] - best["import torch"]
    return [
        Figure("milonga --help", best["milonga --help"], 0.5, "s", at_least=False),
        Figure("milonga train --help", best["milonga train --help"], 0.5, "s", at_least=False),
        Figure("import milonga; milonga.load, beyond import torch", beyond, 0.4, "s", at_least=False),
        Figure("numba, triton, matplotlib loaded by it", float(len(loaded_by_load())), 0, "", at_least=False),
    ]


if __name__ == "__main__":
    main(figures)
