"""The selective scan on the CPU against a per-step PyTorch loop and against mambapy's parallel scan.

    python benchmarks/scan.py [--json]

All compute the same: softplus of the step, the recurrence, D and the gate, in fp32. They take turns, so that a busy
machine slows all; the minimum of the repeats counts. mambapy is in the `bench` extra.
"""

import sys

import torch
import torch.nn.functional as F
from figures import Figure, main
from torch import Tensor

from milonga.bench.cases import OPS, Contender
from milonga.bench.ops import one_pass
from milonga.bench.peers.mambapy_peer import scan as mambapy
from milonga.bench.timing import Timing, measure

REPEATS = 5
CPU = torch.device("cpu")


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """One step at a time, as one writes it in PyTorch."""
    step = F.softplus(dt + dt_bias)
    drive = step * x
    h = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(step[:, t, :, None] * A) * h + drive[:, t, :, None] * B[:, t, None, :]
        y.append((h @ C[:, t, :, None]).squeeze(-1))
    return (torch.stack(y, 1) + D * x) * F.silu(z)


def fastest() -> dict[str, float]:
    """Least wall time of each in milliseconds, in turns."""
    op = OPS["scan"]
    ours = op.build(op.shape((1, 1024, 1536)), CPU, torch.float32).ours
    demo = op.build(op.shape((8, 512, 384)), CPU, torch.float32).ours
    others = {name: Contender(name, ours.leaves, run) for name, run in (("loop", loop), ("mambapy", mambapy))}
    with torch.no_grad():
        expected = ours.run(*ours.leaves)
        for name, other in others.items():
            same = torch.allclose(other.run(*other.leaves), expected, rtol=1e-3, atol=1e-3)
            assert same, f"{name} computes something else"
    calls = {
        "ours": one_pass(ours, both=False),
        "loop": one_pass(others["loop"], both=False),
        "mambapy": one_pass(others["mambapy"], both=False),
        "ours, both passes": one_pass(ours, both=True),
        "mambapy, both passes": one_pass(others["mambapy"], both=True),
        "demo, both passes": one_pass(demo, both=True),
    }
    least = {}
    timings = measure(
        calls, CPU, least=REPEATS, most=REPEATS, report=lambda name: print(f"scan: {name}", file=sys.stderr)
    )
    for name, timing in timings.items():
        assert isinstance(timing, Timing), f"{name}: {timing}"
        least[name] = timing.best * 1e3
        print(f"scan: {name} {least[name]:.1f} ms", file=sys.stderr)
    return least


def figures() -> list[Figure]:
    """The three ratios, and the times behind them."""
    least = fastest()
    shape = "scan B1 T1024 E1536 N16"
    train = least["mambapy, both passes"] / least["ours, both passes"]
    return [
        Figure(f"{shape}, forward, against a PyTorch loop", least["loop"] / least["ours"], 5, "x", aim=7),
        Figure(f"{shape}, forward, against mambapy", least["mambapy"] / least["ours"], 20, "x", aim=30),
        Figure(f"{shape}, forward + backward, against mambapy", train, 12, "x", aim=20),
        Figure(f"{shape}, forward", least["ours"], None, "ms", at_least=False),
        Figure(f"{shape}, forward + backward", least["ours, both passes"], None, "ms", at_least=False),
        Figure("scan B8 T512 E384 N16, forward + backward", least["demo, both passes"], None, "ms", at_least=False),
    ]


if __name__ == "__main__":
    main(figures)
