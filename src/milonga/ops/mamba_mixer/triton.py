"""`mamba_mixer` on a GPU: where its own kernel applies, and launches."""

from functools import lru_cache

import torch
from torch import Tensor

from milonga.ops.causal_conv import triton_kernels
from milonga.ops.cpu_arrays import row_stride
from milonga.ops.gpu.triton_parts import GLUON, rows, runs_gluon

if GLUON:
    from milonga.ops.mamba_mixer import gluon_convolution

CHANNELS, WARPS, TURN, TAPS, DEPTH = 128, 4, 16, 4, 32
# Warps that an H100 runs at once, 12 on each multiprocessor. Fixed, so that results do not depend on the GPU.
WAVE = 1584
_REGISTERS = 168
# Columns of the narrow gradient that shared memory has room for.
WIDEST = 128


def suits(grad_u: Tensor, narrow: Tensor, taps: int) -> bool:
    """Whether `conv_backward` takes the gradients of u `[B T E]` and of the narrow product `[R F]`."""
    shape = grad_u.shape[-1] % CHANNELS == 0 and narrow.shape[-1] <= WIDEST and narrow.shape[-1] % 8 == 0
    # rows of the narrow gradient are copied to shared memory 16 bytes at a time
    shape = shape and narrow.stride(0) % 8 == 0 and narrow.data_ptr() % 16 == 0
    return shape and taps == TAPS and grad_u.element_size() == 2 and runs_gluon(grad_u)


@lru_cache(maxsize=256)
def chunk_length(batch: int, time: int, blocks: int) -> int:
    """Steps of a warp's chunk: with the three beyond it whole turns; all warps run at once, or in few waves."""

    def cost(turns: int) -> int:
        warps = batch * -(-time // (turns * TURN - (TAPS - 1))) * blocks
        return -(-warps // WAVE) * (turns + 1)

    return min(range(4, 33), key=cost) * TURN - (TAPS - 1)


def conv_backward(
    grad_u: Tensor, narrow: Tensor, into: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x `[B T E]`, the input of a convolution with SiLU, to `grad_x`: -> those of its weight and bias.

    The gradient of its output is `grad_u` `[B T E]` + `narrow` `[R F]` @ `into` `[F E]`. Rows are evenly spaced.
    """
    batch, time, width = x.shape
    into, taps, bias = into.contiguous(), weight.contiguous(), bias.contiguous()
    blocks = width // CHANNELS
    length = chunk_length(batch, time, blocks)
    (grad_u, g_step), (x, x_step), out_step = rows(grad_u, width), rows(x, width), row_stride(grad_x)
    slots = batch * -(-time // length)
    partial = torch.empty((slots, TAPS + 1, width), dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias))
    with torch.cuda.device_of(x):
        if slots > 0:
            assert out_step is not None
            gluon_convolution.conv_backward[(-(-slots // WARPS) * blocks,)](
                grad_u, narrow, into, x, taps, bias, grad_x, partial, time, slots, length,
                E=width, F=narrow.shape[-1], g_step=g_step, x_step=x_step, out_step=out_step,
                narrow_step=narrow.stride(0), BLOCKS=-(-narrow.shape[-1] // DEPTH),
                num_warps=WARPS, maxnreg=_REGISTERS,
            )  # fmt: skip
        triton_kernels.conv_sums[(-(-width // 32), TAPS + 1)](
            partial, grad_weight, grad_bias, slots, width, W=TAPS, CH=32, ROWS=32, BIAS=True, num_warps=4,
        )  # fmt: skip
    return grad_weight, grad_bias
