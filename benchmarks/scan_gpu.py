"""The selective scan's kernels on a GPU: forward, forward with checkpoints, backward, and both, in milliseconds.

    python benchmarks/scan_gpu.py

bf16, 16 states, with z, D and dt_bias; x and z are halves of one projection. Medians of `triton.testing.do_bench`.
"""

import torch
from triton.testing import do_bench

from milonga.ops.selective_scan import triton as kernels

SHAPES = ((8, 4096, 3072), (1, 4096, 4608), (1, 131072, 4608), (4, 8192, 2048))
STATES = 16


def measure(batch: int, time: int, width: int) -> list[float]:
    torch.manual_seed(0)

    def low(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    x, z = low(batch, time, 2 * width).chunk(2, -1)
    dt, B, C = low(batch, time, width) * 0.5 - 2, low(batch, time, STATES), low(batch, time, STATES)
    A = -torch.arange(1.0, STATES + 1, device="cuda") * (0.5 + torch.rand(width, 1, device="cuda"))
    D, bias = torch.randn(width, device="cuda"), torch.randn(width, device="cuda") * 0.1
    upstream = low(batch, time, width)

    def forward(save: bool) -> torch.Tensor:
        return kernels.forward(x, dt, A, B, C, D, z, bias, None, None, save)[2]

    def backward(kept: torch.Tensor) -> None:
        kernels.backward(upstream, None, x, dt, A, B, C, D, z, bias, False, None, kept)

    kept = forward(True)
    calls = (lambda: forward(False), lambda: forward(True), lambda: backward(kept), lambda: backward(forward(True)))
    return [do_bench(call, return_mode="median") for call in calls]


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}; B, T, E: forward, forward with checkpoints, backward, both (ms)")
    for shape in SHAPES:
        print(*shape, *(f"{value:.3f}" for value in measure(*shape)), flush=True)
