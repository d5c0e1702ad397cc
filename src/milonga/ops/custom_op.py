"""PyTorch operators of the library's own, whose first call does not import PyTorch's compiler.

`torch.library.custom_op` defines them: schema from annotations, shapes for compilers, derivative. Only the kernels are
registered by name, since `CustomOpDef.register_kernel` wraps them in what imports `torch._dynamo` when it first runs,
0.9 seconds and more in every process, for programs that compile nothing as well. What that wrapper checks besides, that
no result lies in the memory of an input, the tests check of every operator.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal, TypeVar

import torch

Device = Literal["cpu", "cuda"]
Function = TypeVar("Function", bound=Callable[..., Any])

_COMPILER = "torch._dynamo"


def _untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, not traced by Dynamo, which cannot trace anything before it is imported."""

    @cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(kernel)

    @wraps(kernel)
    def run(*arguments: Any) -> Any:
        return disabled()(*arguments) if _COMPILER in sys.modules else kernel(*arguments)

    return run


class CustomOp:
    """`milonga::NAME`, called like the function that it was made of.

    Attributes:
        definition: PyTorch's; its `register_fake` and `register_autograd` are decorators here too.
    """

    def __init__(self, name: str, device: Device, kernel: Callable[..., Any]):
        self.name = f"milonga::{name}"
        self.definition = torch.library.custom_op(self.name, kernel, mutates_args=(), device_types=())
        self.register_fake = self.definition.register_fake
        self.register_autograd = self.definition.register_autograd
        # of its own, for kernels last as long as what registered them
        self._library = torch.library.Library("milonga", "FRAGMENT")
        self.register_kernel(device)(kernel)

    def __call__(self, *arguments: Any) -> Any:
        return self.definition(*arguments)

    def register_kernel(self, device: Device) -> Callable[[Function], Function]:
        """Decorator of what computes it on `device`."""

        def register(kernel: Function) -> Function:
            # overriding: a module may be reloaded
            self._library.impl(self.name, _untraced(kernel), device.upper(), allow_override=True)
            return kernel

        return register


def custom_op(name: str, device: Device) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator that makes `milonga::name` of a function that computes it on `device` and changes no input."""
    return lambda kernel: CustomOp(name, device, kernel)
