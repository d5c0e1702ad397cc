"""Numba kernels of `swiglu`. A job is a block of rows."""

from typing import Any

import numba as nb
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from milonga.ops import cpu_pool
from milonga.ops.cpu_arrays import flat, rows

ROWS = 16
_WORK = 2  # operations per element for the pool's estimate, of which vectors take sixteen at a time
# No nnan or ninf: a NaN that goes in comes out. No reassoc: it would fold the rounding inside `_exp2` away.
_MATH = {"nsz", "arcp", "contract", "afn"}
# The error model: a check for division by zero in every step would keep the loops from vectorising.
_LOG2E = np.float32(1.4426950408889634)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, which then lies in the low bits


@intrinsic
def _bits(_: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""
    return nb.int32(nb.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(_: Any, value: Any) -> Any:
    """The float32 with these bits."""
    return nb.float32(nb.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@nb.njit(nogil=True, fastmath=_MATH, inline="always")
def _exp2(value):
    """2^value: 0 below -126.5, infinite above 127.5, NaN for NaN; else within 2e-7 of the value."""
    # Both comparisons are false for NaN, which so passes on.
    value = np.float32(-127.0) if value < np.float32(-127.0) else value
    value = np.float32(128.0) if value > np.float32(128.0) else value
    shifted = value + _MAGIC
    f = value - (shifted - _MAGIC)
    p = np.float32(1.535336206e-4) * f + np.float32(1.339887456e-3)
    p = p * f + np.float32(9.618437358e-3)
    p = p * f + np.float32(5.550332471e-2)
    p = p * f + np.float32(2.402264791e-1)
    p = p * f + np.float32(6.931472029e-1)
    p = p * f + np.float32(1.0)
    return p * _from_bits((_bits(shifted) + np.int32(127)) << np.int32(23))


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _forward(gate, gate_stride, up, up_stride, width, count, y, first, last):
    for job in range(first, last):
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            gates = gate[row * gate_stride : row * gate_stride + width]
            ups = up[row * up_stride : row * up_stride + width]
            target = y[row * width : (row + 1) * width]
            for d in range(width):
                target[d] = gates[d] * ups[d] / (np.float32(1.0) + _exp2(-gates[d] * _LOG2E))


@nb.njit(nogil=True, cache=True, fastmath=_MATH, error_model="numpy")
def _backward(grad, grad_stride, gate, gate_stride, up, up_stride, width, count, grad_gate, grad_up, first, last):
    for job in range(first, last):
        for row in range(job * ROWS, min(count, (job + 1) * ROWS)):
            upstream = grad[row * grad_stride : row * grad_stride + width]
            gates = gate[row * gate_stride : row * gate_stride + width]
            ups = up[row * up_stride : row * up_stride + width]
            gate_target = grad_gate[row * width : (row + 1) * width]
            up_target = grad_up[row * width : (row + 1) * width]
            for d in range(width):
                share = np.float32(1.0) / (np.float32(1.0) + _exp2(-gates[d] * _LOG2E))
                silu = gates[d] * share
                up_target[d] = upstream[d] * silu
                gate_target[d] = upstream[d] * ups[d] * (share + silu * (np.float32(1.0) - share))


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Kernel of `milonga::swiglu` on the CPU."""
    width = gate.shape[-1]
    count = gate.numel() // width if width else 0
    y = torch.empty(gate.shape, dtype=torch.float32)
    inputs = (*rows(gate, width), *rows(up, width))
    cpu_pool.run(_forward, -(-count // ROWS), gate.numel() * _WORK, *inputs, width, count, flat(y))
    return y.to(gate.dtype)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::swiglu_backward` on the CPU."""
    width = gate.shape[-1]
    count = gate.numel() // width if width else 0
    grad_gate = torch.empty(gate.shape, dtype=torch.float32)
    grad_up = torch.empty(gate.shape, dtype=torch.float32)
    inputs = (*rows(grad, width), *rows(gate, width), *rows(up, width))
    outputs = (flat(grad_gate), flat(grad_up))
    cpu_pool.run(_backward, -(-count // ROWS), gate.numel() * _WORK * 2, *inputs, width, count, *outputs)
    return grad_gate.to(gate.dtype), grad_up.to(gate.dtype)


def compile_kernels() -> None:
    """Compile both passes, for the cache."""
    values = torch.zeros(1, 2)
    forward(values, values)
    backward(values, values, values)
