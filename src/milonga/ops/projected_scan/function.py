"""`projected_scan` as one node of the graph, and its derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_to
from milonga.ops.backend import direct, kernels
from milonga.ops.linear import linear
from milonga.ops.selective_scan.library import selective_scan_backward_op, selective_scan_op
from milonga.ops.selective_scan.reference import selective_scan_reference
from milonga.segments import Segments


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T`, the very product that `linear` takes where gradients are on: that of few rows has its own."""
    with torch.enable_grad():
        return linear(x.detach(), weight.detach())


def add_product_(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """`total += x @ weight` in one pass; fp32 on a CPU by the product of `linear`, which is worth a pass more."""
    if total.device.type == "cpu" and total.dtype == torch.float32:
        total.add_(product(x, weight.t()))
    else:
        total.addmm_(x, weight)


class ProjectedScan(torch.autograd.Function):
    """Keeps u, z, the narrow product with x_weight and the scan's checkpoints: neither dt nor the scan's output.

    Kept tensors go through `save_for_backward`, so that one of them may in turn be made again (`layers.recompute`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        z: Tensor,
        x_weight: Tensor,
        dt_weight: Tensor,
        A: Tensor,
        out_weight: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial: Tensor | None,
        segments: Segments | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rank, states = dt_weight.shape[1], A.shape[1]
        joint = product(u, x_weight)
        low, B, C = joint.split((rank, states, states), -1)
        dt = product(low, dt_weight)
        inputs = (u, dt, A, B, C, D, z, dt_bias, initial)
        kept = None
        if backend == "reference":
            y, final = selective_scan_reference(*inputs, segments)
        else:
            offsets = None if segments is None else segments.on(u.device)
            scan = kernels("selective_scan", backend).forward if direct(u, backend) else selective_scan_op
            y, final, kept = scan(*inputs, offsets, True)
        ctx.set_materialize_grads(False)
        ctx.initial, ctx.segments, ctx.backend, ctx.device = initial is not None, segments, backend, u.device.type
        start = initial if kept is None else None  # with checkpoints it is among them
        ctx.save_for_backward(u, z, joint, x_weight, dt_weight, A, out_weight, D, dt_bias, start, kept)
        return product(y, out_weight), final, dt, B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `create_graph`: `once_differentiable` would let a constant upstream pass
            raise RuntimeError(
                "projected_scan: its gradients cannot be differentiated again; go without create_graph, or keep the "
                "scan's output (no `scan` in training.recompute)"
            )
        with autocast_to(ctx.device, None):
            return _gradients(ctx, *gradients)


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, more_dt: Tensor | None, more_B: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of all that `ProjectedScan` takes. `more_dt` and `more_B` come from uses of dt and B beside the scan."""
    u, z, joint, x_weight, dt_weight, A, out_weight, D, dt_bias, start, kept = ctx.saved_tensors
    need_u, _, need_x_weight, need_dt_weight, _, need_out_weight = ctx.needs_input_grad[:6]
    width, sizes = u.shape[-1], (dt_weight.shape[1], A.shape[1], A.shape[1])
    low, B, C = joint.split(sizes, -1)
    inputs = (u, product(low, dt_weight), A, B, C, D, z, dt_bias)
    upstream = None if grad_out is None else grad_out.reshape(-1, out_weight.shape[0])
    grad_y = None if upstream is None else product(upstream, out_weight.t()).view(u.shape)
    if grad_y is None and grad_final is None:
        grad_y = torch.zeros_like(u)
    gated = upstream is not None and need_out_weight
    found = _scan_gradients(ctx, grad_y, grad_final, inputs, start, kept, gated)
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial, y = found
    del grad_y, inputs, found  # dt among them: large, and wanted no more
    grad_out_weight = None
    if upstream is not None and need_out_weight:
        grad_out_weight = product(upstream.t(), y.view(-1, width).t())
    del y
    if more_dt is not None:
        grad_dt.add_(more_dt)
    # One narrow tensor for the gradients of low, B and C: a product with each of them where it lies would read and
    # write the gradient of u three times, which is twenty times as wide.
    grad_dt = grad_dt.view(-1, width)
    grad_joint = torch.empty_like(joint).view(-1, sum(sizes))
    grad_low, part_B, part_C = grad_joint.split(sizes, -1)
    torch.mm(grad_dt, dt_weight, out=grad_low)
    part_B.copy_(grad_B.view(part_B.shape))
    part_C.copy_(grad_C.view(part_C.shape))
    if more_B is not None:
        part_B.add_(more_B.reshape(part_B.shape))
    rows = low.reshape(-1, sizes[0])
    grad_dt_weight = product(grad_dt.t(), rows.t()) if need_dt_weight else None
    grad_x_weight = product(grad_joint.t(), u.reshape(-1, width).t()) if need_x_weight else None
    if need_u:
        add_product_(grad_u.view(-1, width), grad_joint, x_weight)
    gradients = (grad_u, grad_z, grad_x_weight, grad_dt_weight, grad_A, grad_out_weight)
    optional = ((grad_D, D is not None), (grad_bias, dt_bias is not None), (grad_initial, ctx.initial))
    return *gradients, *(gradient if there else None for gradient, there in optional), None, None


def _scan_gradients(
    ctx: Any,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    start: Tensor | None,
    kept: Tensor | None,
    gated: bool,
) -> tuple[Tensor, ...]:
    """As `milonga::selective_scan_backward` gives them, in memory of their own."""
    if kept is None:
        return _by_the_definition(grad_y, grad_final, (*inputs, start), ctx.segments)
    offsets = None if ctx.segments is None else ctx.segments.on(kept.device)
    own = direct(kept, ctx.backend)
    backward = kernels("selective_scan", ctx.backend).backward if own else selective_scan_backward_op
    return backward(grad_y, grad_final, *inputs, ctx.initial, offsets, kept, gated)


def _by_the_definition(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: Sequence[Tensor | None], segments: Segments | None
) -> tuple[Tensor, ...]:
    """`_scan_gradients` where the scan has no kernels: its definition is run once more."""
    # what is absent has no gradient: an empty leaf stands for it
    leaves = [torch.empty(0) if value is None else value.detach().requires_grad_() for value in inputs]
    x, dt, A, B, C = leaves[:5]
    D, z, dt_bias, start = (leaf if leaf.requires_grad else None for leaf in leaves[5:])
    with torch.enable_grad():
        y, final = selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, start, segments)
    pairs = [(o, g) for o, g in ((y, grad_y), (final, grad_final)) if g is not None and o.requires_grad]
    if pairs:  # at T = 0 nothing may depend on anything
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    found = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return *(gradient.clone(memory_format=torch.contiguous_format) for gradient in found), y.detach()
