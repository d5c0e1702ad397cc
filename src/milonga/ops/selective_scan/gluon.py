"""`selective_scan` in Gluon: where it applies, the choice of chunks, launches, and sums in a fixed order."""

from typing import NamedTuple

import torch
from torch import Tensor

from milonga.ops.gpu.triton_parts import GLUON, dense, rows, runs_gluon
from milonga.ops.selective_scan import triton_sums
from milonga.ops.selective_scan.checkpoints import CHUNK, checkpoint_shape

if GLUON:
    from milonga.ops.selective_scan import gluon_backward, gluon_forward

STATES, CHANNELS, HALF = 16, 64, 32
# Programs for which an H100 has room at a time by registers, three a multiprocessor. Fixed, so that results do not
# depend on the GPU. A sequence is cut into chunks, which costs a second pass over its inputs, only where there would be
# fewer than ENOUGH programs without; a chunk is never shorter than SHORTEST steps.
PROGRAMS = 396
ENOUGH, ENOUGH_BACKWARD = 96, 250
SHORTEST = 128
# What the first pass over a step costs, the second pass being 1.
_FIRST, _FIRST_BACKWARD = 0.8, 0.2
# Where chunks are long, the first pass takes shorter ones, of FINE steps or more, or almost: all multiprocessors end
# together.
FINE = 384
# Where they can: chunks that are longer by more than this only to be divided evenly cost more than they bring.
_LONGER = 1.01
# What a program costs beside its steps, in steps.
_SETUP = 64
# fp32 numbers that the sums of dB and dC over blocks of channels may take. Beyond, time is walked in parts.
WORKSPACE = 96 * 2**20
# Channels of a program that sums what programs leave for A, D and dt_bias.
_SUMMED = 16
# Registers a lane, for three programs a multiprocessor; four for the first pass.
_REGISTERS, _REGISTERS_FIRST = 168, 128


def suits(x: Tensor, A: Tensor) -> bool:
    """Whether these kernels take it: 16 states a channel, an Ampere or later data-centre GPU."""
    return A.shape[1] == STATES and x.shape[2] > 0 and runs_gluon(x)


def _pieces(parallel: int, first: float) -> int:
    """Of how many chunks a sequence is best: programs fill the GPU once, or twice where that is 5 % better."""

    def cost(turns: int) -> float:
        count = max(turns * PROGRAMS // parallel, 1)
        return turns * PROGRAMS / (count * parallel) + first * (1 - 1 / count)

    turns = 2 if cost(2) < 0.95 * cost(1) else 1
    return max(turns * PROGRAMS // parallel, 1)


def _length(
    rows: int, sequences: int, packed: bool, blocks: int, enough: int, first: float, rest: bool
) -> tuple[int, int]:
    """Steps of a chunk, and how many chunks the first pass makes of it: multiples of the spacing of checkpoints.

    How long packed sequences are is known on the GPU alone: they are taken for one. With `rest` the last chunk of a
    sequence may be a short one beside those for which there is room.
    """
    longest = rows if packed else rows // max(sequences, 1)
    parallel = blocks * (1 if packed else sequences)
    pieces = 1 if parallel >= enough else _pieces(max(parallel, 1), first)
    steps = max(-(-longest // pieces), SHORTEST if pieces > 1 else 1)

    def rounded(count: int) -> int:
        return -(-steps // (CHUNK * count)) * CHUNK * count

    counts = [count for count in (8, 4, 2) if pieces > 1 and steps >= count * FINE]
    even = (count for count in counts if rounded(count) <= _LONGER * rounded(1))
    finer = next(even, counts[-1] if counts else 1)
    length = rounded(finer)
    if rest and pieces > 1 and not packed:
        length = _with_a_rest(longest, parallel, pieces, length, CHUNK * finer)
    return length, finer


def _with_a_rest(steps: int, parallel: int, pieces: int, length: int, unit: int) -> int:
    """`length`, or fewer steps by whole units: where `pieces` chunks of each sequence leave places free, these take
    what is left of all sequences, a short chunk each, one after the other, while the others walk theirs."""
    free = -(pieces * parallel) % PROGRAMS
    if free == 0:
        return length
    turns = -(-parallel // free)

    def fits(shorter: int) -> bool:
        return shorter >= SHORTEST and turns * (max(steps - pieces * shorter, 0) + _SETUP) <= shorter

    while fits(length - unit):
        length -= unit
    return length


class Into(NamedTuple):
    """Where a backward pass writes. Rows of the first four, `[B T E]`, are E or 2E apart, those of the others as far
    from each other in both."""

    grad_x: Tensor
    grad_dt: Tensor
    grad_z: Tensor
    y: Tensor
    grad_B: Tensor  # [B T N]
    grad_C: Tensor


class _Plan:
    """Sizes that a pass and its launches share."""

    def __init__(self, x: Tensor, offsets: Tensor | None, enough: int, first: float, rest: bool) -> None:
        self.batch, self.time, self.width = x.shape
        self.packed = offsets is not None
        self.sequences = self.batch if offsets is None else offsets.numel() - 1
        self.rows = self.batch * self.time
        self.blocks = -(-self.width // CHANNELS)
        # a rest has room for a whole chunk in the sums of dB and dC where time is walked in parts
        rest = rest and self.sums <= WORKSPACE
        self.length, self.finer = _length(self.rows, self.sequences, self.packed, self.blocks, enough, first, rest)
        pieces = max(-(-self.time // self.length), 1)
        # every sequence has a slot more than it may need where sequences are packed
        self.slots = self.rows // self.length + self.sequences if self.packed else self.sequences * pieces
        # of the first pass
        fine = self.length // self.finer
        pieces = max(-(-self.time // fine), 1)
        self.fine_slots = self.rows // fine + self.sequences if self.packed else self.sequences * pieces
        self.chunked = (self.rows if self.packed else self.time) > self.length
        # programs of half as many channels where each multiprocessor has room for all of them
        parallel = self.blocks * (1 if self.packed else self.sequences)
        self.half = not self.chunked and 2 * parallel <= PROGRAMS
        self.kept_step = checkpoint_shape(0, 0, self.width, STATES, False)[1]

    @property
    def sums(self) -> int:
        """Numbers in the sums of dB and dC over a block of channels, of all blocks and rows."""
        return self.rows * self.blocks * 2 * STATES

    @property
    def programs(self) -> int:
        return self.slots * self.blocks

    def ends(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """Room for what the first pass finds of each chunk."""
        return A.new_empty(self.fine_slots, self.width, STATES), A.new_empty(self.fine_slots, self.width)


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
    """Kernel of `milonga::selective_scan`."""
    plan = _Plan(x, offsets, ENOUGH, _FIRST, rest=False)  # its first pass would have to go over more steps
    width = plan.width
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = A.new_empty(plan.sequences, width, STATES)
    kept = A.new_empty(checkpoint_shape(plan.rows, plan.sequences, width, STATES, save))
    if plan.programs == 0:
        return y, final, kept
    (x, x_step), (dt, dt_step), (z, z_step) = (rows(value, width) for value in (x, dt, z))
    (B, B_step), (C, C_step) = rows(B, STATES), rows(C, STATES)
    A = A.contiguous()
    ends = sums = A
    inputs = (x, dt, x if z is None else z, B, C, A, dense(D, A), dense(dt_bias, A))
    start = A if initial is None else initial.contiguous()
    outputs = (start, A if offsets is None else offsets, y, final, kept)
    sizes = (
        plan.time, width, plan.sequences, plan.length, plan.finer, x_step, dt_step, z_step, B_step, C_step,
        plan.kept_step,
    )  # fmt: skip
    fixed = {
        "PACKED": plan.packed, "INITIAL": initial is not None, "D_": D is not None, "BIAS": dt_bias is not None,
        "EXACT": x.dtype == torch.float32, "num_warps": 4,
    }  # fmt: skip
    channels = HALF if plan.half else CHANNELS
    with torch.cuda.device_of(x):
        if plan.chunked:
            ends, sums = plan.ends(A)
            gluon_forward.scan_forward[(plan.fine_slots * plan.blocks,)](
                *inputs, ends, sums, *outputs, *sizes, **fixed,
                STARTS=False, SAVE=False, ENDS=True, Z=False, CH=CHANNELS, maxnreg=_REGISTERS_FIRST,
            )  # fmt: skip
        gluon_forward.scan_forward[(plan.slots * -(-width // channels),)](
            *inputs, ends, sums, *outputs, *sizes, **fixed,
            STARTS=plan.chunked, SAVE=save, ENDS=False, Z=z is not None, CH=channels, maxnreg=_REGISTERS,
        )  # fmt: skip
    return y, final, kept


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
    into: Into | None = None,
) -> tuple[Tensor, ...]:
    """Kernel of `milonga::selective_scan_backward`; its y, like that of the forward pass, is summed in fp32.

    With `into` the gradients of x, dt, z, B and C and y, which z and `gated` ask for, are written there.
    """
    plan = _Plan(x, offsets, ENOUGH_BACKWARD, _FIRST_BACKWARD, rest=True)
    width, slots = plan.width, plan.slots
    if into is None:
        grad_x, grad_dt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        grad_z = torch.empty(x.shape if z is not None else (0,), dtype=x.dtype, device=x.device)
        y = torch.empty(x.shape if gated else (0,), dtype=x.dtype, device=x.device)
        grad_B, grad_C = (torch.empty(B.shape, dtype=B.dtype, device=B.device) for _ in range(2))
    else:
        grad_x, grad_dt, grad_z, y, grad_B, grad_C = into
    grad_initial = A.new_empty((plan.sequences, width, STATES) if initial else (0,))
    # packed sequences share the rows of partial sums, so that short ones do not cost a chunk each
    count = 1 if plan.packed else max(-(-plan.sums // WORKSPACE), 1)
    part = -(-plan.length // (count * CHUNK)) * CHUNK
    count = -(-plan.length // part)
    kinds = (STATES, 0 if D is None else 1, 0 if dt_bias is None else 1)
    parts_A, parts_D, parts_bias = (A.new_empty(count * slots, width * kind) for kind in kinds)
    if plan.programs > 0:
        partial_rows = slots * part if count > 1 else plan.rows
        partials = A.new_empty(plan.blocks * partial_rows, 2 * STATES)
        launch = _Launch(plan, grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, offsets)
        for index in reversed(range(count)):
            here = slice(index * slots, (index + 1) * slots)
            launch(
                kept, (index * part, (index + 1) * part if count > 1 else plan.length), partial_rows, count > 1,
                (grad_x, grad_dt, grad_z, y, partials, parts_A[here], parts_D[here], parts_bias[here], grad_initial),
                initial, gated, grad_x.stride(1) // width,
            )  # fmt: skip
            if partial_rows > 0:
                triton_sums.sum_blocks[(-(-partial_rows // 8),)](
                    partials, grad_B, grad_C, partial_rows, plan.blocks, plan.time, plan.length, part, index * part,
                    grad_B.stride(-2),
                    ROWS=8, PARTS=count > 1, num_warps=2,
                )  # fmt: skip
    grad_A, grad_D, grad_bias = (A.new_empty(width * kind) for kind in kinds)
    triton_sums.sum_parts[(-(-width // _SUMMED),)](
        parts_A, parts_D, parts_bias, grad_A, grad_D, grad_bias, count * slots, width,
        CH=_SUMMED, N=STATES, D_=D is not None, BIAS=dt_bias is not None, num_warps=4,
    )  # fmt: skip
    return grad_x, grad_dt, grad_A.view(width, STATES), grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial, y


class _Launch:
    """The backward kernel with everything that its launches share; finds first what enters every chunk."""

    def __init__(
        self,
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
        offsets: Tensor | None,
    ) -> None:
        width = plan.width
        self.plan = plan
        (grad_y, gy_step), (x, x_step), (dt, dt_step), (z, z_step) = (rows(v, width) for v in (grad_y, x, dt, z))
        (B, B_step), (C, C_step) = rows(B, STATES), rows(C, STATES)
        A = A.contiguous()
        upstream, gate, bounds = (
            x if grad_y is None else grad_y,
            x if z is None else z,
            A if offsets is None else offsets,
        )
        weight, bias = dense(D, A), dense(dt_bias, A)
        ends = sums = A
        self.device = torch.cuda.device_of(x)
        sizes = (plan.time, width, plan.sequences, plan.length, plan.finer)
        if plan.chunked:
            ends, sums = plan.ends(A)
            with self.device:
                gluon_backward.scan_back_ends[(plan.fine_slots * plan.blocks,)](
                    upstream, dt, gate, C, A, bias, ends, sums, bounds, *sizes, gy_step, dt_step, z_step, C_step,
                    PACKED=plan.packed, Y=grad_y is not None, Z=z is not None, BIAS=dt_bias is not None,
                    EXACT=x.dtype == torch.float32, num_warps=4, maxnreg=_REGISTERS_FIRST,
                )  # fmt: skip
        entering = A if grad_final is None else grad_final.contiguous()
        self.inputs = (upstream, x, dt, gate, B, C, A, weight, bias, ends, sums, entering)
        self.bounds = bounds
        self.sizes = sizes
        self.steps = (gy_step, x_step, dt_step, z_step, B_step, C_step, plan.kept_step)
        self.carried = A
        self.fixed = {
            "PACKED": plan.packed, "STARTS": plan.chunked, "FINAL": grad_final is not None, "Y": grad_y is not None,
            "Z": z is not None, "D_": D is not None, "BIAS": dt_bias is not None,
            # tf32 is exact enough for bfloat16 alone
            "EXACT": x.dtype != torch.bfloat16, "KEEP": x.element_size() == 2, "num_warps": 4, "maxnreg": _REGISTERS,
        }  # fmt: skip

    def __call__(
        self,
        kept: Tensor,
        span: tuple[int, int],
        partial_rows: int,
        parts: bool,
        outputs: tuple[Tensor, ...],
        initial: bool,
        gated: bool,
        spread: int,
    ) -> None:
        if parts and self.carried is self.inputs[6]:
            self.carried = kept.new_empty(self.plan.slots, self.plan.width, STATES)
        with self.device:
            gluon_backward.scan_backward[(self.plan.programs,)](
                *self.inputs, self.carried, self.bounds, kept, *outputs, *self.sizes, *span, partial_rows, *self.steps,
                **self.fixed, INITIAL=initial, GATED=gated, PARTS=parts, SPREAD=spread,
            )  # fmt: skip
