"""The selective scan on the CPU against a per-step PyTorch loop and against mambapy's parallel scan.

    python benchmarks/scan.py [--json]

All compute the same: softplus of the step, the recurrence, D and the gate, in fp32. They take turns, so that a busy
machine slows all; the minimum of the repeats counts. mambapy is in the `bench` extra.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from figures import Figure, main
from mambapy.pscan import pscan
from torch import Tensor

from milonga.ops.selective_scan import selective_scan

REPEATS = 5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, time_: int, width: int, states: int) -> Inputs:
    """x, dt, A, B, C, D, z, dt_bias, all asking for gradients."""
    torch.manual_seed(0)
    made = (
        torch.randn(batch, time_, width),
        torch.randn(batch, time_, width),
        -torch.rand(width, states) - 0.5,
        torch.randn(batch, time_, states),
        torch.randn(batch, time_, states),
        torch.randn(width),
        torch.randn(batch, time_, width),
        torch.randn(width) - 2,
    )
    return tuple(value.requires_grad_() for value in made)


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    return selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, backend="cpu")[0]


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


def mambapy(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """What mambapy's MambaBlock does around its parallel scan."""
    step = F.softplus(dt + dt_bias)
    decay = torch.exp(step.unsqueeze(-1) * A)
    h = pscan(decay, step.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1))
    return ((h @ C.unsqueeze(-1)).squeeze(3) + D * x) * F.silu(z)


def forward(scan: Callable[..., Tensor], values: Inputs) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            scan(*values)

    return run


def both(scan: Callable[..., Tensor], values: Inputs) -> Callable[[], None]:
    upstream = torch.randn_like(values[0])

    def run() -> None:
        torch.autograd.grad(scan(*values), values, upstream)

    return run


def fastest(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Least wall time of each in milliseconds, in turns, after one call of each to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken = (time.perf_counter() - began) * 1e3
            if repeat:
                best[name] = min(best[name], taken)
            print(f"scan: {name} {taken:.1f} ms", file=sys.stderr)
    return best


def figures() -> list[Figure]:
    """The three ratios, and the times behind them."""
    values = inputs(1, 1024, 1536, 16)
    with torch.no_grad():
        expected = ours(*values)
        assert torch.allclose(loop(*values), expected, rtol=1e-3, atol=1e-3), "the loop computes something else"
        assert torch.allclose(mambapy(*values), expected, rtol=1e-3, atol=1e-3), "mambapy computes something else"
    demo = inputs(8, 512, 384, 16)
    least = fastest(
        {
            "ours": forward(ours, values),
            "loop": forward(loop, values),
            "mambapy": forward(mambapy, values),
            "ours, both passes": both(ours, values),
            "mambapy, both passes": both(mambapy, values),
            "demo, both passes": both(ours, demo),
        }
    )
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
