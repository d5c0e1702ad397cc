"""What every op's test does: compare outputs and all gradients with the reference in float64."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from milonga.segments import Segments


def relative_rms(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference (0 where both are empty or zero)."""
    value, reference = value.detach(), reference.detach().double()
    difference = (value.double() - reference).square().mean() if reference.numel() else torch.zeros(())
    size = reference.square().mean() if reference.numel() else torch.zeros(())
    if float(difference) == 0.0:
        return 0.0
    return float((difference / size.clamp_min(1e-300)).sqrt())


def outputs_and_gradients(
    op: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """-> (outputs, upstream gradients used, gradient of every input)."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = list(op(*leaves))
    if upstream is None:
        upstream = [torch.randn(out.shape, dtype=torch.float64) for out in outputs]
    # At T = 0 an output, or all of them, may depend on nothing.
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    if not used:
        return [o.detach() for o in outputs], list(upstream), [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(
        [o for o, _ in used], leaves, [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return [o.detach() for o in outputs], list(upstream), list(gradients)


def assert_compiles_to_the_same(
    op: Callable[..., tuple[Tensor, Tensor]], cases: Iterable[tuple[dict[str, Tensor], Segments | None]]
) -> None:
    """Compiled in one graph with dynamic shapes, an op that gives (y, final) has the same gradients to the last bit."""

    def loss(values: dict[str, Tensor], segments: Segments | None) -> Tensor:
        y, final = op(**values, segments=segments)
        return y.sin().sum() + final.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for inputs, segments in cases:
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        expected = torch.autograd.grad(loss(leaves, segments), list(leaves.values()))
        got = torch.autograd.grad(compiled(leaves, segments), list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_matches(
    fast: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    bound: float,
) -> None:
    """`fast` on fp32 `inputs` agrees with `reference` on the same values in float64: outputs and every gradient."""
    outputs, upstream, gradients = outputs_and_gradients(reference, [v.double() for v in inputs])
    fast_outputs, _, fast_gradients = outputs_and_gradients(fast, [v.float() for v in inputs], upstream)
    for index, (got, expected) in enumerate(zip(fast_outputs, outputs, strict=True)):
        assert relative_rms(got, expected) <= bound, f"output {index}: {relative_rms(got, expected):.2e} > {bound:.0e}"
    for index, (got, expected) in enumerate(zip(fast_gradients, gradients, strict=True)):
        assert relative_rms(got, expected) <= bound, (
            f"gradient of input {index}: {relative_rms(got, expected):.2e} > {bound:.0e}"
        )


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, each with another behind it in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def assert_strides_change_nothing(op: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Outputs and gradients, to the last bit, where no argument lies in one piece."""
    results = []
    for values in (inputs, [spread(value) for value in inputs]):
        leaves = [value.detach().requires_grad_(value.is_floating_point()) for value in values]
        outputs = op(*leaves)
        torch.manual_seed(5)
        upstream = [torch.randn(output.shape).to(output.dtype) for output in outputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, upstream)])
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)


def assert_only_the_gradients_asked_for(op: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """The gradient of `out` by one input alone is, to the last bit, that beside all others."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    everything = torch.autograd.grad(op(**leaves).out.square().sum(), list(leaves.values()))
    for name, expected in zip(inputs, everything, strict=True):
        leaf = inputs[name].clone().requires_grad_()
        op(**{**inputs, name: leaf}).out.square().sum().backward()
        assert torch.equal(leaf.grad, expected), name
