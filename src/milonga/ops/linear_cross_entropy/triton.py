"""`linear_cross_entropy` on a GPU: the library's matrix products by chunks of rows, Triton for what follows each.

Products of bf16 and fp16 are summed and returned in fp32. The gradient of the weight is summed over chunks in order, in
fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_to
from milonga.ops.gpu.triton_parts import dense
from milonga.ops.linear_cross_entropy import triton_kernels

TILE = 4096  # logits that a program holds
# Whether `addmm` adds products of halves to an fp32 matrix; PyTorch 2.9 does not.
_ADDS_WIDE = torch.__version__ >= "2.10"


def _tile(width: int) -> tuple[int, int]:
    """-> (rows, classes) of a program's tile, powers of two."""
    classes = min(TILE, max(16, 1 << (width - 1).bit_length()))
    return TILE // classes, classes


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a @ b` into `out`, which is fp32 or has the dtype of both."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _common(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which products are taken: that of both, fp32 where they differ."""
    return x.dtype if x.dtype == weight.dtype else torch.float32


def _chunks(rows: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """-> (which rows, those rows in the dtype of weight, their logits in fp32) by turns; logits share one buffer."""
    count = rows.shape[0]
    buffer = torch.empty(min(chunk, count), weight.shape[0], dtype=torch.float32, device=rows.device)
    for start in range(0, count, chunk):
        part = rows[start : start + chunk].to(weight.dtype)
        logits = buffer[: part.shape[0]]
        _product(part, weight.T, logits)
        yield slice(start, start + part.shape[0]), part, logits


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Kernel of `milonga::linear_cross_entropy` on a GPU."""
    rows, ids = x.reshape(-1, x.shape[-1]), targets.contiguous().view(-1)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    totals = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    flat_losses, flat_totals = losses.view(-1), totals.view(-1)
    width = weight.shape[0]
    lanes, classes = _tile(width)
    # autocast would round the products of fp32
    with torch.cuda.device_of(x), autocast_to(x.device.type, None):
        for part, _, logits in _chunks(rows, weight.to(_common(x, weight)), chunk):
            triton_kernels.loss_forward[(-(-logits.shape[0] // lanes),)](
                logits, dense(bias, logits), ids[part], flat_losses[part], flat_totals[part],
                logits.shape[0], width, logits.stride(0), ignore_index,
                R=lanes, BV=classes, BIAS=bias is not None, num_warps=8,
            )  # fmt: skip
    return losses, totals


def forward_sloped(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward`, and from the same logits the gradients of the sum of all losses, of x, weight and bias."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    totals = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    ones = torch.ones((), dtype=torch.float32, device=x.device).expand(targets.shape)
    slopes = _slopes(ones, x, weight, targets, bias, totals, ignore_index, chunk, losses)
    return losses, totals, slopes[0], slopes[1], slopes[2] if bias is not None else slopes[2][:0]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of `milonga::linear_cross_entropy_backward` on a GPU."""
    grad_x, grad_weight, grad_bias = _slopes(grad, x, weight, targets, bias, totals, ignore_index, chunk, None)
    bias_dtype = torch.float32 if bias is None else bias.dtype
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def _slopes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    totals: Tensor,
    ignore_index: int,
    chunk: int,
    losses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and in fp32 of weight and bias; with `losses`, they and `totals` are computed too."""
    rows, ids = x.reshape(-1, x.shape[-1]), targets.contiguous().view(-1)
    common = _common(x, weight)
    given = weight.to(common)
    grad_x = torch.empty(rows.shape, dtype=common, device=x.device)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device)
    upstream, flat_totals = grad.contiguous().view(-1), totals.view(-1)
    width = weight.shape[0]
    lanes, classes = _tile(width)
    buffer = torch.empty(min(chunk, rows.shape[0]), width, dtype=common, device=x.device)
    with torch.cuda.device_of(x), autocast_to(x.device.type, None):
        for part, values, logits in _chunks(rows, given, chunk):
            slopes = buffer[: logits.shape[0]]
            if losses is not None:
                triton_kernels.loss_forward[(-(-logits.shape[0] // lanes),)](
                    logits, dense(bias, logits), ids[part], losses.view(-1)[part], flat_totals[part],
                    logits.shape[0], width, logits.stride(0), ignore_index,
                    R=lanes, BV=classes, BIAS=bias is not None, num_warps=8,
                )  # fmt: skip
            triton_kernels.loss_backward[(-(-logits.shape[0] // lanes), -(-width // classes))](
                logits, dense(bias, logits), ids[part], upstream[part], flat_totals[part], slopes,
                logits.shape[0], width, logits.stride(0), ignore_index,
                R=lanes, BV=classes, BIAS=bias is not None, num_warps=8,
            )  # fmt: skip
            torch.mm(slopes, given, out=grad_x[part])
            _add_product(grad_weight, slopes.T, values)
            if bias is not None:
                grad_bias += slopes.sum(0, dtype=torch.float32)
    return grad_x.to(x.dtype).view(x.shape), grad_weight, grad_bias


def scaled(slope: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`slope * factor`, a number on the device, multiplied in fp32 and rounded to `dtype` once."""
    out = torch.empty(slope.shape, dtype=dtype, device=slope.device)
    with torch.cuda.device_of(slope):
        triton_kernels.scale[(-(-slope.numel() // TILE),)](slope, factor, out, slope.numel(), BLOCK=TILE, num_warps=8)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif _ADDS_WIDE:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        product = torch.empty_like(total)
        _product(a, b, product)
        total += product
