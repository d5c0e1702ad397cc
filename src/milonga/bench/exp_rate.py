"""A Triton kernel that does nothing but exponentials: what the chip's special-function units can give.

Imported by `milonga.bench.ceilings` alone, and only where Triton is installed and a GPU is there.
"""

import torch
import triton
import triton.language as tl

_BLOCK, _PROGRAMS_EACH = 1024, 16


@triton.jit
def _exponentials(out, turns, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) * 1e-9
    for _ in range(turns):
        # 2^-x stays between 1/2 and 1; eight in a row, so that the loop itself does not count
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
        x = tl.exp2(-x)
    tl.store(out + offsets, x)


def launch(device: torch.device, turns: int = 64) -> int:
    """Run it once: -> how many exponentials were asked for."""
    programs = _PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * _BLOCK, device=device)
    _exponentials[(programs,)](out, turns, BLOCK=_BLOCK, num_warps=4)
    return programs * _BLOCK * turns * 8
