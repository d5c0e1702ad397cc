"""All benchmarks, one after the other, and one closing table: `make bench`.

    python benchmarks/run.py [--json] [NAME ...]

A benchmark is a file of this folder that prints a list of `figures.Figure` as JSON when it is run with `--json`, and
its progress on stderr. Each runs in a process of its own. The exit code is 1 if a demanded figure was missed.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from figures import Figure, lines

FOLDER = Path(__file__).parent
SHARED = {"run", "figures", "speculation_models"}
ASKED = {"soak", "speculation", "speculation_gpu", "scan_gpu"}  # only by name: half an hour, or a GPU


def main() -> int:
    """Run them, print the table; the exit code."""
    arguments = sys.argv[1:]
    wanted = [argument for argument in arguments if argument != "--json"]
    present = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
    unknown = sorted(set(wanted) - set(present))
    if unknown:
        print(f"benchmarks: no {', '.join(unknown)}; there are {', '.join(present)}", file=sys.stderr)
        return 2
    figures: list[Figure] = []
    for name in wanted or [name for name in present if name not in ASKED]:
        print(f"benchmarks: {name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, FOLDER / f"{name}.py", "--json"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"benchmarks: {name} failed with exit code {done.returncode}", file=sys.stderr)
            return done.returncode
        figures += [Figure(**row) for row in json.loads(done.stdout)]
    print(
        json.dumps([asdict(figure) for figure in figures], indent=2)
        if "--json" in arguments
        else "\n".join(lines(figures))
    )
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
