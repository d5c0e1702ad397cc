"""What every benchmark gives: figures with what is demanded of them, as a table or as JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from milonga.bench import Figure, lines

__all__ = ["Figure", "lines", "main"]


def main(measure: Callable[[], Sequence[Figure]]) -> None:
    """What a benchmark's file does when it is run: measure, print a table, or JSON with `--json`."""
    figures = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
    else:
        print("\n".join(lines(figures)))
