"""`selective_scan` on a GPU: the choice of blocks and chunks, launches, and sums over programs in a fixed order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from milonga.ops.gpu.triton_parts import dense
from milonga.ops.gpu.triton_parts import rows as _rows
from milonga.ops.selective_scan import gluon, triton_kernels, triton_steps
from milonga.ops.selective_scan.checkpoints import CHUNK, PAD, checkpoint_shape, first_checkpoints

# Programs (warps) that keep a large GPU busy: two turns of the eight for which each multiprocessor of an H100 has
# registers in the backward pass. Fixed, so that results do not depend on the GPU. A sequence is cut into chunks, which
# costs a second pass over its inputs, only where there would be fewer than ENOUGH programs without; a chunk is never
# shorter than SHORTEST steps.
PROGRAMS = 2112
ENOUGH = 700
SHORTEST = 128
# At most so many steps a sequence go one by one where nothing is kept for the backward pass.
FEW = 8
# Steps whose loads are issued together, in the forward and in the backward pass.
_AHEAD, _AHEAD_BACKWARD = 4, 2


def _states(states: int) -> int:
    """The power of two to which the number of states is padded."""
    return max(4, 1 << (states - 1).bit_length())


def _block(states: int) -> int:
    """Channels of a program: a warp's, unless the states of one channel are too many for a lane's registers."""
    return 32 if states <= 16 else 16


def _chunk(rows: int, sequences: int, packed: bool, blocks: int) -> int:
    """Steps of a chunk, a multiple of the spacing of checkpoints.

    How long packed sequences are is known on the GPU alone: they are taken for one.
    """
    longest = rows if packed else rows // max(sequences, 1)
    parallel = blocks * (1 if packed else sequences)
    pieces = 1 if parallel >= ENOUGH else -(-PROGRAMS // max(parallel, 1))
    steps = max(-(-longest // pieces), SHORTEST if pieces > 1 else 1)
    return -(-steps // CHUNK) * CHUNK


def _wide(tensor: Tensor, padded: int) -> Tensor:
    """`[..., N]` in fp32, padded with zeros to `[..., padded]`."""
    return F.pad(tensor.float(), (0, padded - tensor.shape[-1])).contiguous()


def _turned(tensor: Tensor | None, padded: int) -> Tensor | None:
    """`[..., E, N]` -> `[..., padded, E]`, the layout of states in the kernels."""
    if tensor is None:
        return None
    return F.pad(tensor.transpose(-1, -2), (0, 0, 0, padded - tensor.shape[-1])).contiguous()


def _turned_back(tensor: Tensor, states: int) -> Tensor:
    """The inverse of `_turned`, as a tensor of its own."""
    return tensor[..., :states, :].transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _copy(values: Tensor, like: Tensor) -> Tensor:
    """`values` in the dtype and shape of `like`, in memory of their own."""
    return values.to(like.dtype, copy=True, memory_format=torch.contiguous_format).view(like.shape)


class _Plan:
    """Sizes that a pass and its launches share."""

    def __init__(self, x: Tensor, A: Tensor, offsets: Tensor | None) -> None:
        self.batch, self.time, self.width = x.shape
        self.states = A.shape[1]
        self.padded = _states(self.states)
        self.packed = offsets is not None
        self.sequences = self.batch if offsets is None else offsets.numel() - 1
        self.rows = self.batch * self.time
        self.block = _block(self.padded)
        self.blocks = -(-self.width // self.block)
        self.length = _chunk(self.rows, self.sequences, self.packed, self.blocks)
        # every sequence has a slot more than it may need where sequences are packed
        pieces = max(-(-self.time // self.length), 1)
        self.slots = self.rows // self.length + self.sequences if self.packed else self.sequences * pieces
        longest = self.rows if self.packed else self.time
        self.chunked = longest > self.length
        self.slot_width = checkpoint_shape(0, 0, self.width, 1, False)[1]
        assert self.slot_width % PAD == 0 and self.length % CHUNK == 0

    @property
    def programs(self) -> int:
        return self.slots * self.blocks

    def carry(
        self, ends: Tensor, sums: Tensor, A: Tensor, outer: Tensor | None, bounds: Tensor, reverse: bool, exact: bool
    ) -> None:
        triton_kernels.carry[(self.sequences * self.blocks,)](
            ends, sums, A, A if outer is None else outer, bounds, self.time, self.width, self.sequences, self.length,
            N=self.padded, CH=self.block, PACKED=self.packed, OUTER=outer is not None, REVERSE=reverse, EXACT=exact,
            num_warps=1,
        )  # fmt: skip


def _steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` for few steps, nothing kept: one launch."""
    width, states = A.shape
    sequences = x.shape[0] if offsets is None else offsets.numel() - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = A.new_empty(sequences, width, states)
    kept = A.new_empty(checkpoint_shape(0, 0, width, states, False))
    (x, x_step), (dt, dt_step), (z, z_step) = (_rows(value, width) for value in (x, dt, z))
    (B, B_step), (C, C_step) = _rows(B, states), _rows(C, states)
    A = A.contiguous()
    if final.numel() > 0:
        with torch.cuda.device_of(x):
            triton_steps.scan_steps[(sequences * -(-width // 16),)](
                x, dt, x if z is None else z, B, C, A, dense(D, A), dense(dt_bias, A),
                A if initial is None else initial.contiguous(), A if offsets is None else offsets, y, final,
                x.shape[1], width, x_step, dt_step, z_step, B_step, C_step, STATES=states, N=_states(states), CH=16,
                PACKED=offsets is not None, INITIAL=initial is not None, Z=z is not None, D_=D is not None,
                BIAS=dt_bias is not None, EXACT=x.dtype == torch.float32, num_warps=1,
            )  # fmt: skip
    return y, final, kept


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    offsets: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `milonga::selective_scan` on a GPU: which of the kernels runs is decided here and in `backward`."""
    few = x.shape[1] if offsets is None else x.shape[1] // max(offsets.numel() - 1, 1)
    if not save and few <= FEW:
        return _steps(x, dt, A, B, C, D, z, dt_bias, initial, offsets)
    if gluon.suits(x, A):
        return gluon.forward(x, dt, A, B, C, D, z, dt_bias, initial, offsets, save)
    plan = _Plan(x, A, offsets)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = A.new_empty(plan.sequences, plan.padded, plan.width)
    kept = A.new_empty(checkpoint_shape(plan.rows, plan.sequences, plan.width, plan.states, save))
    if plan.programs == 0:
        return y, _turned_back(final, plan.states), kept
    (x, x_step), (dt, dt_step), (z, z_step) = (_rows(value, plan.width) for value in (x, dt, z))
    B, C, A = _wide(B, plan.padded), _wide(C, plan.padded), _turned(A, plan.padded)
    initial = _turned(initial, plan.padded)
    bounds = A if offsets is None else offsets
    starts = sums = A
    fixed = {
        "N": plan.padded, "STATES": plan.states, "SLOT": plan.slot_width, "CH": plan.block, "K": _AHEAD,
        "SPACING": CHUNK, "PACKED": plan.packed, "D_": D is not None, "BIAS": dt_bias is not None,
        "EXACT": x.dtype == torch.float32, "num_warps": 1, "num_stages": 1,
    }  # fmt: skip
    sizes = (plan.time, plan.width, plan.sequences, plan.length, x_step, dt_step, z_step)
    inputs = (x, dt, x if z is None else z, B, C, A, dense(D, A), dense(dt_bias, A))
    with torch.cuda.device_of(x):
        if plan.chunked:
            starts, sums = A.new_empty(plan.slots, plan.padded, plan.width), A.new_empty(plan.slots, plan.width)
            triton_kernels.scan_forward[(plan.programs,)](
                *inputs, A, A, bounds, y, starts, kept, sums, *sizes, **fixed,
                STARTS=False, INITIAL=False, SAVE=False, ENDS=True, Z=False,
            )  # fmt: skip
            plan.carry(starts, sums, A, initial, bounds, False, fixed["EXACT"])
        triton_kernels.scan_forward[(plan.programs,)](
            *inputs, starts, A if initial is None else initial, bounds, y, final, kept, sums, *sizes, **fixed,
            STARTS=plan.chunked, INITIAL=initial is not None, SAVE=save, ENDS=False, Z=z is not None,
        )  # fmt: skip
    return y, _turned_back(final, plan.states), kept


def backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: bool,
    offsets: Tensor | None,
    kept: Tensor,
    gated: bool = False,
    into: gluon.Into | None = None,
) -> tuple[Tensor, ...]:
    """Kernel of `milonga::selective_scan_backward` on a GPU: as on the CPU.

    `into` is for where `gluon.suits` alone.
    """
    if gluon.suits(x, A):
        return gluon.backward(grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, initial, offsets, kept, gated, into)
    assert into is None
    plan = _Plan(x, A, offsets)
    padded, width = plan.padded, plan.width
    grad_x, grad_dt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    grad_z = torch.empty(x.shape if z is not None else (0,), dtype=x.dtype, device=x.device)
    grad_BC = A.new_empty(plan.blocks, plan.rows, 2, padded)
    grad_A = A.new_empty(plan.slots, padded, width)
    grad_D, grad_bias = (A.new_empty((0,) if v is None else (plan.slots, width)) for v in (D, dt_bias))
    grad_initial = A.new_empty((plan.sequences, padded, width) if initial else (0,))
    if plan.programs > 0:
        _launch_backward(
            plan, grad_y, _turned(grad_final, padded), x, dt, _turned(A, padded), _wide(B, padded), _wide(C, padded),
            D, z, dt_bias, initial, offsets, kept,
            (grad_x, grad_dt, grad_z, grad_BC, grad_A, grad_D, grad_bias, grad_initial),
        )  # fmt: skip
    y = x.new_empty(0)
    if gated:
        # checkpoints are `[N E]`
        tiles = first_checkpoints(kept, plan.batch, plan.time, offsets)[:, : plan.states * width] if initial else None
        start = None if tiles is None else tiles.unflatten(1, (plan.states, width)).transpose(1, 2)
        y = forward(x, dt, A, B, C, D, z, dt_bias, start, offsets, False)[0]
    # fixed order: PyTorch's sum over the first dimension of a contiguous tensor uses no atomics
    total = grad_BC.sum(0)
    return (
        grad_x,
        grad_dt,
        _turned_back(grad_A.sum(0), plan.states),
        _copy(total[:, 0, : plan.states], B),
        _copy(total[:, 1, : plan.states], C),
        grad_D if D is None else grad_D.sum(0),
        grad_z,
        grad_bias if dt_bias is None else grad_bias.sum(0),
        _turned_back(grad_initial, plan.states) if initial else grad_initial,
        y,
    )


def _launch_backward(
    plan: _Plan,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: bool,
    offsets: Tensor | None,
    kept: Tensor,
    outputs: tuple[Tensor, ...],
) -> None:
    """A and `grad_final` come as `[N E]`, B and C padded."""
    rows = (_rows(value, plan.width) for value in (grad_y, x, dt, z))
    (grad_y, gy_step), (x, x_step), (dt, dt_step), (z, z_step) = rows
    bounds = A if offsets is None else offsets
    bias, weight = dense(dt_bias, A), dense(D, A)
    upstream, gate = x if grad_y is None else grad_y, x if z is None else z
    ends = A
    scratch = A.new_empty(plan.programs * (CHUNK // _AHEAD_BACKWARD) * plan.padded * plan.block)
    sizes = (plan.time, plan.width, plan.sequences, plan.length)
    fixed = {
        "N": plan.padded, "CH": plan.block, "K": _AHEAD_BACKWARD, "PACKED": plan.packed, "Z": z is not None,
        "BIAS": dt_bias is not None, "EXACT": x.dtype == torch.float32, "num_warps": 1, "num_stages": 1,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if plan.chunked:
            ends, sums = A.new_empty(plan.slots, plan.padded, plan.width), A.new_empty(plan.slots, plan.width)
            triton_kernels.scan_back_ends[(plan.programs,)](
                upstream, dt, gate, C, A, bias, bounds, ends, sums, *sizes, gy_step, dt_step, z_step,
                Y=grad_y is not None, **fixed,
            )  # fmt: skip
            plan.carry(ends, sums, A, grad_final, bounds, True, fixed["EXACT"])
        triton_kernels.scan_backward[(plan.programs,)](
            upstream, x, dt, gate, B, C, A, weight, bias, ends, A if grad_final is None else grad_final, bounds,
            kept, scratch, *outputs, plan.time, plan.width, plan.rows, plan.sequences, plan.length,
            gy_step, x_step, dt_step, z_step, plan.block, **fixed,
            STATES=plan.states, SLOT=plan.slot_width, SPACING=CHUNK, STARTS=plan.chunked,
            FINAL=grad_final is not None, INITIAL=initial, Y=grad_y is not None, D_=D is not None,
            PRECISION="tf32" if x.dtype == torch.bfloat16 else "tf32x3",
        )  # fmt: skip
