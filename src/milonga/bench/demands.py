"""What one H100 is asked to reach: times in milliseconds, rates in tokens a second, memory in GiB."""

from dataclasses import dataclass

CHIP = "H100"


@dataclass(frozen=True)
class Demand:
    """A bound and what is hoped for beyond it; None where nothing is."""

    demanded: float
    aim: float | None = None


# (op, numbers of its shape, both passes) -> milliseconds at most, in bf16
OP_MILLISECONDS: dict[tuple[str, tuple[int, ...], bool], Demand] = {
    ("scan", (8, 4096, 3072, 16), False): Demand(0.75, 0.6),
    ("scan", (8, 4096, 3072, 16), True): Demand(3.2, 2.4),
    ("scan", (1, 4096, 4608, 16), True): Demand(0.9, 0.65),
    ("scan", (1, 131072, 4608, 16), False): Demand(6.5, 4.5),
    ("scan", (1, 131072, 4608, 16), True): Demand(24, 18),
    ("conv", (8, 4096, 3072, 4), False): Demand(0.16),
    ("conv", (8, 4096, 3072, 4), True): Demand(0.40),
}
# ops that must be as fast as the fastest beside them
AS_FAST_AS_PEERS = ("attention",)


def demand(op: str, shape: tuple[int, ...], both: bool, dtype: str, gpu: str | None) -> Demand | None:
    """What is asked of an op there; None where nothing is."""
    if gpu is None or CHIP not in gpu or dtype != "bf16":
        return None
    return OP_MILLISECONDS.get((op, shape, both))
