"""`mamba_mixer` as one node of the graph, and its derivative."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_to
from milonga.ops.backend import choice, kernels
from milonga.ops.projected_scan.function import add_product_, product
from milonga.segments import Segments

# Whether this PyTorch multiplies 16-bit matrices into fp32.
WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype")


class _Weights(NamedTuple):
    """Of the four products, in their dtype."""

    into: Tensor  # [2E D]
    x: Tensor  # [R+2N E]
    dt: Tensor  # [E R]
    out: Tensor  # [D E]


def _weight_gradient(upstream: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`upstream^T @ rows` in `dtype`; on a GPU straight from the product's fp32 sums where that is fp32."""
    if upstream.is_cuda and WIDE_PRODUCTS and dtype == torch.float32 != upstream.dtype:
        return torch.mm(upstream.t(), rows, out_dtype=dtype)
    return product(upstream.t(), rows.t()).to(dtype)


class MambaMixer(torch.autograd.Function):
    """Keeps x, the wide and the narrow product, and the scan's checkpoints; makes dt and y again, and u on request.

    Kept tensors go through `save_for_backward`, so that x may in turn be made again (`layers.recompute`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        in_weight: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        x_weight: Tensor,
        dt_weight: Tensor,
        A: Tensor,
        out_weight: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        conv_initial: Tensor | None,
        initial: Tensor | None,
        segments: Segments | None,
        recast: bool,
        keep_u: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        width, sizes = A.shape[0], (dt_weight.shape[1], A.shape[1], A.shape[1])
        masters = in_weight, x_weight, dt_weight, out_weight
        weights = _Weights(*(weight.to(x.dtype) for weight in masters))
        backend = choice("selective_scan", "auto", x.device.type, x.dtype)
        offsets = None if segments is None else segments.on(x.device)
        wide = product(x, weights.into)
        columns, z = wide.split(width, -1)
        convolve = kernels("causal_conv", backend).forward
        u, conv_final = convolve(columns, conv_weight, conv_bias, conv_initial, offsets, True)
        narrow = product(u, weights.x)
        low, B, C = narrow.split(sizes, -1)
        dt = product(low, weights.dt)
        scan = kernels("selective_scan", backend).forward
        y, final, kept = scan(u, dt, A, B, C, D, z, dt_bias, initial, offsets, True)
        ctx.set_materialize_grads(False)
        ctx.segments, ctx.backend, ctx.initial, ctx.device = segments, backend, initial is not None, x.device.type
        ctx.dtypes = tuple(weight.dtype for weight in masters)
        saved = (x, wide, narrow, kept, conv_weight, conv_bias, A, D, dt_bias, conv_initial, u if keep_u else None)
        ctx.save_for_backward(*saved, *(masters if recast else weights))
        return product(y, weights.out), columns, conv_final, u, final, dt, B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `create_graph`: `once_differentiable` would let a constant upstream pass
            raise RuntimeError(
                "mamba_mixer: its gradients cannot be differentiated again; go without create_graph, or keep the "
                "scan's output (no `scan` in training.recompute)"
            )
        with autocast_to(ctx.device, None):
            return _gradients(ctx, *gradients)


class _Scanned(NamedTuple):
    """What the scan's backward pass and the products after it leave for the convolution."""

    beside: Tensor | None  # [B T 2E], room for the gradient of columns, and that of z in its second half
    grad_z: Tensor
    grad_u: Tensor  # [R E], but for what comes through x_weight
    grad_narrow: Tensor  # [R F]
    weights: tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients of x_weight, dt_weight, out_weight
    parameters: tuple[Tensor, Tensor, Tensor, Tensor]  # of A, D, dt_bias and the initial state


def _gradients(
    ctx: Any,
    grad_out: Tensor | None,
    more_columns: Tensor | None,
    grad_conv_final: Tensor | None,
    more_u: Tensor | None,
    grad_final: Tensor | None,
    more_dt: Tensor | None,
    more_B: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of all that `MambaMixer` takes; those named `more_` come from uses of outputs beside the chain."""
    x, wide, narrow, kept, conv_weight, conv_bias, A, D, dt_bias, before, u, *taken = ctx.saved_tensors
    weights = _Weights(*(weight.to(x.dtype) for weight in taken))
    width = A.shape[0]
    offsets = None if ctx.segments is None else ctx.segments.on(x.device)
    columns, z = wide.split(width, -1)
    if u is None:
        u = kernels("causal_conv", ctx.backend).forward(columns, conv_weight, conv_bias, before, offsets, True)[0]
    found = _scan_gradients(
        ctx, grad_out, grad_final, more_dt, more_B, weights, u, z, narrow, kept, (A, D, dt_bias), offsets
    )
    del u
    grad_columns, grad_conv_weight, grad_conv_bias, grad_before = _conv_gradients(
        ctx, found, weights.x, more_u, grad_conv_final, columns, (conv_weight, conv_bias, before, offsets)
    )
    if more_columns is not None:
        grad_columns.add_(more_columns)
    beside = torch.cat((grad_columns, found.grad_z), -1) if found.beside is None else found.beside
    beside = beside.view(-1, 2 * width)
    need_x, need_into = ctx.needs_input_grad[:2]
    grad_into = _weight_gradient(beside, x.reshape(-1, x.shape[-1]), ctx.dtypes[0]) if need_into else None
    grad_x = product(beside, weights.into.t()).view(x.shape) if need_x else None
    grad_A, grad_D, grad_bias, grad_initial = found.parameters
    grad_x_weight, grad_dt_weight, grad_out_weight = found.weights
    return (
        grad_x, grad_into, grad_conv_weight, grad_conv_bias, grad_x_weight, grad_dt_weight, grad_A, grad_out_weight,
        grad_D, grad_bias, None if before is None else grad_before, grad_initial if ctx.initial else None,
        None, None, None,
    )  # fmt: skip


def _scan_gradients(
    ctx: Any,
    grad_out: Tensor | None,
    grad_final: Tensor | None,
    more_dt: Tensor | None,
    more_B: Tensor | None,
    weights: _Weights,
    u: Tensor,
    z: Tensor,
    narrow: Tensor,
    kept: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    offsets: Tensor | None,
) -> _Scanned:
    """From the output back to u, through the scan."""
    (A, D, dt_bias), (batch, time, width) = parameters, u.shape
    sizes = (weights.dt.shape[1], A.shape[1], A.shape[1])
    need_x_weight, need_dt_weight, need_out_weight = (ctx.needs_input_grad[index] for index in (4, 5, 7))
    low, B, C = narrow.split(sizes, -1)
    upstream = None if grad_out is None else grad_out.reshape(-1, weights.out.shape[0])
    grad_y = None if upstream is None else product(upstream, weights.out.t()).view(u.shape)
    if grad_y is None and grad_final is None:
        grad_y = torch.zeros_like(u)
    gated = upstream is not None and need_out_weight
    grad_narrow = torch.empty(narrow.shape, dtype=narrow.dtype, device=narrow.device)
    part_B, part_C = grad_narrow.split(sizes, -1)[1:]
    scan, beside, into = kernels("selective_scan", ctx.backend), None, ()
    if ctx.backend == "triton" and scan.gluon.suits(u, A):
        # y is written where the gradient of columns will be: it is not wanted any more by then
        beside, pair = (u.new_empty(batch, time, 2 * width) for _ in range(2))
        into = (scan.gluon.Into(*pair.split(width, -1), beside[..., width:], beside[..., :width], part_B, part_C),)
    inputs = (u, product(low, weights.dt), A, B, C, D, z, dt_bias)
    found = scan.backward(grad_y, grad_final, *inputs, ctx.initial, offsets, kept, gated, *into)
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial, y = found
    del grad_y, inputs, found  # dt among them: large, and wanted no more
    grad_out_weight = None
    if upstream is not None and need_out_weight:
        grad_out_weight = _weight_gradient(upstream, y.flatten(0, 1), ctx.dtypes[3])
    if more_dt is not None:
        grad_dt.add_(more_dt)
    if not into:
        part_B.copy_(grad_B)
        part_C.copy_(grad_C)
    if more_B is not None:
        part_B.add_(more_B)
    grad_dt, rows = grad_dt.flatten(0, 1), grad_narrow.flatten(0, 1)
    torch.mm(grad_dt, weights.dt, out=rows[:, : sizes[0]])
    grad_dt_weight = _weight_gradient(grad_dt, low.reshape(-1, sizes[0]), ctx.dtypes[2]) if need_dt_weight else None
    grad_x_weight = _weight_gradient(rows, u.flatten(0, 1), ctx.dtypes[1]) if need_x_weight else None
    found_weights = grad_x_weight, grad_dt_weight, grad_out_weight
    return _Scanned(
        beside, grad_z, grad_u.flatten(0, 1), rows, found_weights, (grad_A, grad_D, grad_bias, grad_initial)
    )


def _conv_gradients(
    ctx: Any,
    found: _Scanned,
    x_weight: Tensor,
    more_u: Tensor | None,
    grad_final: Tensor | None,
    columns: Tensor,
    rest: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """From u back to its columns: gradients of these, and of the convolution's weight, bias and initial columns."""
    weight, bias, before, offsets = rest
    grad_u = found.grad_u.unflatten(0, columns.shape[:2])
    room = None if found.beside is None else found.beside[..., : columns.shape[-1]]
    plain = more_u is None and grad_final is None and before is None and offsets is None
    if plain and room is not None:
        own = kernels("mamba_mixer", ctx.backend)
        if own.suits(grad_u, found.grad_narrow, weight.shape[1]):
            return room, *own.conv_backward(grad_u, found.grad_narrow, x_weight, columns, weight, bias, room), None
    add_product_(found.grad_u, found.grad_narrow, x_weight)
    if more_u is not None:
        grad_u.add_(more_u)
    inputs = (grad_u, grad_final, columns, weight, bias, before, offsets, True)
    return kernels("causal_conv", ctx.backend).backward(*inputs, *(() if room is None else (room,)))
