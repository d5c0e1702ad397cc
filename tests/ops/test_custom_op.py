"""Operators of the library's own."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import milonga.ops
from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig
from milonga.ops import swiglu
from milonga.ops.custom_op import CustomOp

BOTH = "y = ops.swiglu(x, x); y.sum().backward(); both = y.detach(), x.grad; x.grad = None; "


def run(code: str) -> None:
    """In a process of its own, in which nothing has been called or compiled yet."""
    start = "import sys, torch, milonga.ops as ops; x = torch.randn(2, 3, requires_grad=True); "
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_first_call_does_not_load_the_compiler() -> None:
    run(BOTH + "assert 'torch._dynamo' not in sys.modules")


def test_beside_the_compiler_it_computes_the_same() -> None:
    run(
        BOTH + "before = both; import torch._dynamo; " + BOTH + "assert all(map(torch.equal, both, before)); "
        "ops.swiglu = torch.compile(ops.swiglu, fullgraph=True, backend='aot_eager'); "
        + BOTH
        + "assert all(map(torch.equal, both, before))"
    )


def test_a_first_call_may_be_compiled() -> None:
    run(
        "plain = ops.swiglu; ops.swiglu = torch.compile(plain, fullgraph=True, backend='aot_eager'); "
        + BOTH
        + "before = both; ops.swiglu = plain; "
        + BOTH
        + "assert all(map(torch.equal, both, before))"
    )


def test_modules_may_be_loaded_again() -> None:
    """As notebooks do: what was imported before goes on, and what was defined again is another kernel."""
    run(
        BOTH + "before = both; import importlib; "
        "[importlib.reload(sys.modules['milonga.ops.' + name]) for name in ('swiglu.library', 'custom_op')]; "
        + BOTH
        + "assert all(map(torch.equal, both, before)); "
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('milonga')]; del ops; "
        "import gc; gc.collect(); import milonga.ops as ops; " + BOTH + "assert all(map(torch.equal, both, before))"
    )


def test_gradients_of_gradients_are_refused() -> None:
    """Not zeros with a warning."""
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(swiglu(x, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"milonga[.:]+swiglu_backward"):
        gradient.sum().backward()


class OwnMemory(TorchDispatchMode):
    """Fails where a result of an operator of ours lies in the memory of an input, or of another result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "milonga":
            self.seen.add(func.name())
            taken = {_place(value) for value in tree_leaves(args) if isinstance(value, Tensor)}
            for value in tree_leaves(out):
                assert _place(value) not in taken, f"{func}: a result is an input, or another result"
                taken.add(_place(value))
        return out


def _place(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def operators_on_a_cpu() -> set[str]:
    found = set()
    for path in Path(milonga.ops.__file__).parent.glob("*/library.py"):
        for value in vars(importlib.import_module(f"milonga.ops.{path.parent.name}.library")).values():
            if isinstance(value, CustomOp) and torch._C._dispatch_has_kernel_for_dispatch_key(value.name, "CPU"):
                found.add(value.name)
    return found


def test_results_have_memory_of_their_own() -> None:
    """PyTorch may reuse or write what a layer before made: a result that is an input would change with it."""
    layers = {"mamba": MambaConfig(), "swa": AttentionConfig(heads=2, window=3), "mlp": SwiGLUConfig(d_hidden=24)}
    network = ModelConfig(vocab_size=11, d_model=16, pattern="mamba swa mlp", layers=layers).build()
    with OwnMemory() as mode:
        for time in (0, 1, 5):
            tokens = torch.zeros(2, time, dtype=torch.long)
            network(tokens, targets=tokens).losses.sum().backward()
    assert mode.seen == operators_on_a_cpu()
