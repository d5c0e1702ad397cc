"""What every measurement comes down to: rows that say what was measured and what was demanded."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        what: a few words.
        measured: the figure.
        demanded: what it must reach (`at_least`) or stay under (not `at_least`); None where nothing is demanded.
        unit: such as `x`, `s`, `bytes/s`.
        at_least: whether more is better.
        aim: what is hoped for beyond the demand; None where nothing is.
    """

    what: str
    measured: float
    demanded: float | None
    unit: str
    at_least: bool = True
    aim: float | None = None

    @property
    def met(self) -> bool:
        """Whether the demand is met."""
        if self.demanded is None:
            return True
        return self.measured >= self.demanded if self.at_least else self.measured <= self.demanded


def number(value: float) -> str:
    """Three significant digits, thousands set apart: `18,340`, `7.31`, `2e-06`."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lines(figures: Sequence[Figure]) -> list[str]:
    """The rows of a table as text."""
    made = []
    for figure in figures:
        side = "at least" if figure.at_least else "at most"
        demand = "" if figure.demanded is None else f"{side} {number(figure.demanded)}"
        aim = "" if figure.aim is None else f"(aim {number(figure.aim)})"
        verdict = "" if figure.demanded is None else "ok" if figure.met else "MISSED"
        made.append(
            f"{figure.what:<68} {number(figure.measured):>10} {figure.unit:<8} {demand:<16} {aim:<12} {verdict}"
        )
    return [line.rstrip() for line in made]
