"""How long the first answer takes: help of the commands, and importing the library beyond torch alone.

    python benchmarks/startup.py [--json]

Processes of both kinds take turns, so that a busy machine slows both; the minimum of the repeats counts.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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


def rows() -> list[dict[str, object]]:
    """What was demanded and what was measured, in seconds."""
    best = measure()
    beyond = best["import milonga; milonga.load"] - best["import torch"]
    figures = [
        ("milonga --help", best["milonga --help"], 0.5),
        ("milonga train --help", best["milonga train --help"], 0.5),
        ("import milonga; milonga.load, beyond import torch", beyond, 0.4),
        ("packages loaded by milonga.load without need", float(len(loaded_by_load())), 0.0),
    ]
    return [
        {
            "what": what,
            "measured": measured,
            "demanded": demanded,
            "unit": "s" if "packages" not in what else "",
            "met": measured <= demanded,
        }
        for what, measured, demanded in figures
    ]


def main() -> None:
    """Print the table, or JSON."""
    measured = rows()
    if "--json" in sys.argv[1:]:
        print(json.dumps(measured, indent=2))
        return
    for row in measured:
        verdict = "ok" if row["met"] else "MISSED"
        print(f"{row['what']:<52} {row['measured']:6.3f} {row['unit']:<2} at most {row['demanded']:<5} {verdict}")


if __name__ == "__main__":
    main()
