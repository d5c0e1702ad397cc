"""The selective scan's kernels on a GPU: forward, forward with checkpoints, backward, and both, in milliseconds.

    python benchmarks/scan_gpu.py

bf16, 16 states, with z, D and dt_bias; x and z are halves of one projection. Medians of what the device took
(`milonga.bench.timing.measure`: cold cache, Python's part hidden), half the distance between the quartiles beside them.
"""

import torch

from milonga.bench.timing import Call, Failure, Timing, measure
from milonga.ops.selective_scan import triton as kernels

SHAPES = ((8, 4096, 3072), (1, 4096, 4608), (1, 131072, 4608), (4, 8192, 2048))
STATES = 16
CUDA = torch.device("cuda")


def calls(batch: int, time: int, width: int) -> dict[str, Call]:
    """The passes of one shape, on random inputs."""
    torch.manual_seed(0)

    def low(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA).to(torch.bfloat16)

    x, z = low(batch, time, 2 * width).chunk(2, -1)
    dt, B, C = low(batch, time, width) * 0.5 - 2, low(batch, time, STATES), low(batch, time, STATES)
    A = -torch.arange(1.0, STATES + 1, device=CUDA) * (0.5 + torch.rand(width, 1, device=CUDA))
    D, bias = torch.randn(width, device=CUDA), torch.randn(width, device=CUDA) * 0.1
    upstream = low(batch, time, width)

    def forward(save: bool) -> torch.Tensor:
        return kernels.forward(x, dt, A, B, C, D, z, bias, None, None, save)[2]

    def backward(kept: torch.Tensor) -> None:
        kernels.backward(upstream, None, x, dt, A, B, C, D, z, bias, False, None, kept)

    kept = forward(True)
    return {
        "forward": lambda: forward(False),
        "with checkpoints": lambda: forward(True),
        "backward": lambda: backward(kept),
        "both": lambda: backward(forward(True)),
    }


def shown(timing: Timing | Failure) -> str:
    """One cell."""
    if isinstance(timing, Failure):
        return timing.reason
    return f"{timing.median * 1e3:.3f} (+-{timing.spread:.1%})"


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}; B, T, E: forward, forward with checkpoints, backward, both (ms)")
    for shape in SHAPES:
        print(*shape, *(shown(timing) for timing in measure(calls(*shape), CUDA).values()), flush=True)
