"""Operators of the library's own."""

import subprocess
import sys

import pytest
import torch

from milonga.ops import swiglu


def test_a_first_call_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch, milonga.ops as ops; x = torch.ones(2, 3, requires_grad=True); "
        "ops.swiglu(x, x).sum().backward(); assert x.grad is not None; sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_beside_the_compiler_it_computes_the_same() -> None:
    x = torch.randn(2, 3)
    before = swiglu(x.requires_grad_(), x)
    assert torch.equal(torch.compile(swiglu, fullgraph=True)(x, x), before)
    assert torch.equal(swiglu(x, x), before)


def test_gradients_of_gradients_are_refused() -> None:
    """Not zeros with a warning."""
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(swiglu(x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="milonga::swiglu_backward: nothing flows back through it"):
        gradient.sum().backward()
