"""Muon whose matrices of one shape move together: deep stacks have hundreds, and a GPU would wait for launches."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = tuple[float, float, float]

# Numbers of a stack at most: some copies of it in fp32 and bf16 are all that a step takes beside what Muon keeps.
STACK = 1 << 26


def unhooked(step: Any) -> Callable[..., Any]:
    """A step of an optimizer's class without the hooks that its first object wrapped it in: one of ours that calls it
    has its own, which would be called twice."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, its state and its update, with one launch an operation for all matrices of a shape.

    On a GPU, with rates that match AdamW's; elsewhere, and for parameters that are no plain tensors, the step is
    PyTorch's own, matrix by matrix. Both differ by rounding alone: products of a batch may add up in another order.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient along it."""
        parameters = [p for group in self.param_groups for p in group["params"]]  # a closure may give gradients
        known = all(group["adjust_lr_fn"] == "match_rms_adamw" for group in self.param_groups)
        if not known or not all(p.is_cuda and type(p.data) is Tensor for p in parameters):
            return unhooked(torch.optim.Muon.step)(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_stacked()
        return loss

    @torch.no_grad()
    def step_stacked(self) -> None:
        """The step, stack by stack, on whatever device."""
        for group in self.param_groups:
            for matrices in _stacks([p for p in group["params"] if p.grad is not None]):
                self._move(matrices, group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalised(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
        lr = float(group["lr"])
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        # the root mean square of AdamW's updates
        rate = lr * 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_add_(
            matrices, [update.to(p.dtype) for update, p in zip(updates, matrices, strict=True)], alpha=-rate
        )


def orthogonalised(
    matrices: Float[Tensor, "S M N"], coefficients: Coefficients, steps: int, eps: float
) -> Float[Tensor, "S M N"]:
    """Every matrix with its singular values brought near 1 by so many Newton-Schulz steps, in bf16 as Muon does."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape and dtype, on one device, as many as `STACK` allows."""
    alike = defaultdict(list)
    for matrix in matrices:
        alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
    for same in alike.values():
        count = max(1, STACK // max(1, same[0].numel()))
        for start in range(0, len(same), count):
            yield same[start : start + count]
