"""The demo's figures, from the report of `runs/demo`; the demo is run, or finished, where there is no report yet.

python benchmarks/demo.py [--json]
"""

import json
import subprocess
import sys
from pathlib import Path

from figures import Figure, main

MILONGA = str(Path(sys.executable).parent / "milonga")


def figures() -> list[Figure]:
    """Bits per byte of the held-out book, and how long training took."""
    done = subprocess.run([MILONGA, "demo", "--json"], check=True, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    bits, xz = report["bits_per_byte"], report["xz_bits_per_byte"]
    return [
        Figure("demo: held-out document", bits, 2.15, "bits/byte", at_least=False, aim=2.00),
        Figure("demo: held-out document, above xz -9", bits - xz, 0.0, "bits/byte", at_least=False),
        Figure("demo: training", report["train_seconds"] / 60, 3.0, "min", at_least=False),
    ]


if __name__ == "__main__":
    main(figures)
