"""`causal_conv` on a GPU: the choice of blocks and chunks, and launches."""

from functools import lru_cache

import torch
from torch import Tensor

from milonga.ops.causal_conv import triton_kernels
from milonga.ops.gpu.triton_parts import dense, power_of_two, rows, slots_of

# Channels of a program: four a lane.
_CHANNELS = 128
# Rows whose loads are issued together, and turns of so many rows in a chunk of the forward pass.
_AHEAD, _TURNS = 8, 4
# The same for the backward pass: between the two numbers of turns, for a chunk leaves W + 1 rows of sums.
_AHEAD_BACKWARD, _TURNS_BACKWARD, _MOST_TURNS = 4, 4, 128
# Registers of a lane to which the backward pass is held where it fits into them, that is for at most so many taps and
# bytes a number; left alone the compiler takes 168 and more.
_REGISTERS, _MOST_TAPS, _MOST_BYTES = 128, 4, 2
# Programs (warps) of it that the 132 multiprocessors of an H100 run at once: 16 each with so many registers, else 12.
# Fixed, so that results do not depend on the GPU.
_WAVE, _WAVE_UNHELD = 2112, 1584


@lru_cache(maxsize=256)
def _backward_length(batch: int, time: int, sequences: int, packed: bool, blocks: int, taps: int, held: bool) -> int:
    """Steps of a chunk of the backward pass: with the W - 1 beyond it whole turns, and few waves of programs."""

    def length(turns: int) -> int:
        return turns * _AHEAD_BACKWARD - (taps - 1)

    def cost(turns: int) -> int:
        programs = slots_of(batch, time, sequences, packed, length(turns)) * blocks
        return -(-programs // (_WAVE if held else _WAVE_UNHELD)) * (turns + 1)

    return length(min(range(_TURNS_BACKWARD, _MOST_TURNS + 1), key=cost))


class _Plan:
    """Sizes that the launches of a pass share."""

    def __init__(self, x: Tensor, weight: Tensor, offsets: Tensor | None) -> None:
        self.batch, self.time, self.width = x.shape
        self.taps = weight.shape[1]
        self.packed = offsets is not None
        self.sequences = self.batch if offsets is None else offsets.numel() - 1
        self.held = self.taps <= _MOST_TAPS and x.element_size() <= _MOST_BYTES
        self.block = min(_CHANNELS, power_of_two(max(self.width, 32)))
        self.blocks = -(-self.width // self.block)

    def slots(self, length: int) -> int:
        return slots_of(self.batch, self.time, self.sequences, self.packed, length)

    def backward_length(self) -> int:
        shape = (self.batch, self.time, self.sequences, self.packed, self.blocks, self.taps)
        return _backward_length(*shape, self.held)

    def constants(self, bias: Tensor | None, initial: Tensor | None, silu: bool) -> dict[str, int | bool]:
        return {
            "W": self.taps, "PADDED": power_of_two(self.taps), "CH": self.block, "PACKED": self.packed,
            "INITIAL": initial is not None, "BIAS": bias is not None, "SILU": silu, "num_warps": 1, "num_stages": 1,
        }  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::causal_conv` on a GPU: one launch."""
    plan = _Plan(x, weight, offsets)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((plan.sequences, plan.taps - 1, plan.width), dtype=x.dtype, device=x.device)
    length = _AHEAD * _TURNS
    programs = plan.slots(length) * plan.blocks
    if programs == 0:
        return y, final
    x, x_step = rows(x, plan.width)
    weight = weight.contiguous()
    before = x if initial is None else initial.contiguous()
    bounds = x if offsets is None else offsets
    with torch.cuda.device_of(x):
        triton_kernels.conv_forward[(programs,)](
            x, weight, dense(bias, weight), before, bounds, y, final,
            plan.time, plan.width, plan.sequences, length, x_step, K=_AHEAD, **plan.constants(bias, initial, silu),
        )  # fmt: skip
    return y, final


def backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of `milonga::causal_conv_backward` on a GPU: as on the CPU; two launches.

    The gradient of x is written to `into` where that is given, `[B T E]`, rows equally far apart.
    """
    plan = _Plan(x, weight, offsets)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    grad_initial = x.new_empty(0 if initial is None else initial.shape)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    grad_bias = x.new_empty(0 if bias is None else bias.shape, dtype=torch.float32 if bias is None else bias.dtype)
    length = plan.backward_length()
    slots = plan.slots(length)
    if slots * plan.blocks == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_initial
    x, x_step = rows(x, plan.width)
    upstream, g_step = (x, x_step) if grad_y is None else rows(grad_y, plan.width)
    weight = weight.contiguous()
    partial = torch.empty((slots, plan.taps + 1, plan.width), dtype=torch.float32, device=x.device)
    before = x if initial is None else initial.contiguous()
    after = x if grad_final is None else grad_final.contiguous()
    bounds = x if offsets is None else offsets
    with torch.cuda.device_of(x):
        triton_kernels.conv_backward[(slots * plan.blocks,)](
            upstream, after, x, weight, dense(bias, weight), before, bounds, grad_x, partial, grad_initial,
            plan.time, plan.width, plan.sequences, length, g_step, x_step, grad_x.stride(1),
            K=_AHEAD_BACKWARD, Y=grad_y is not None, FINAL=grad_final is not None,
            maxnreg=_REGISTERS if plan.held else None, **plan.constants(bias, initial, silu),
        )  # fmt: skip
        triton_kernels.conv_sums[(-(-plan.width // 32), plan.taps + 1)](
            partial, grad_weight, grad_bias, slots, plan.width, W=plan.taps, CH=32, ROWS=32, BIAS=bias is not None,
            num_warps=4,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_initial
