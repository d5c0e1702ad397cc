"""What one H100 is asked to reach: times in milliseconds, rates in tokens a second, memory in GiB."""

from dataclasses import dataclass

from milonga.bench.figures import Figure

CHIP = "H100"


@dataclass(frozen=True)
class Demand:
    """A bound and what is hoped for beyond it; None where nothing is."""

    demanded: float
    aim: float | None = None


def judged(what: str, measured: float, unit: str, bound: Demand | None, *, at_least: bool = True) -> Figure:
    """A figure with what is asked of it."""
    if bound is None:
        return Figure(what, measured, None, unit, at_least)
    return Figure(what, measured, bound.demanded, unit, at_least, bound.aim)


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


@dataclass(frozen=True)
class TrainDemand:
    """Of a training step: tokens a second at least, GiB at most."""

    rate: Demand
    memory: Demand


# (shape of record, batch, length)
TRAIN = {
    ("samba-421m", 8, 4096): TrainDemand(Demand(155_000, 175_000), Demand(27.8)),
    ("llama-389m", 8, 4096): TrainDemand(Demand(155_000, 170_000), Demand(27.2)),
    ("mambabyte-353m", 4, 8192): TrainDemand(Demand(115_000, 140_000), Demand(36.5)),
    ("byte-samba-30m", 32, 4096): TrainDemand(Demand(1_150_000, 1_400_000), Demand(20.5)),
}
# the throughput study
PREFILL_LENGTH = 131072
PREFILL_MILLISECONDS = Demand(900, 820)
PREFILL_BASELINE_MILLISECONDS = Demand(6137)
PREFILL_RATIO = Demand(4.0, 6.0)
DECODE_LENGTH = 65536
DECODE_RATIO = Demand(3.0, 3.64)
DECODE_RATIO_THERE = Demand(5.0)
DECODE_BASELINE_FRACTION = Demand(0.7)
FIRST_USE_SECONDS = {"cold": Demand(30), "warm": Demand(3)}
