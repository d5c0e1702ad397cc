"""PyTorch operators of the library's own: a schema from annotations, a kernel per device, shapes, a derivative.

What `torch.library.custom_op` does, but that an operator's first call does not import PyTorch's compiler: 0.9 seconds
and more in every process, for programs that compile nothing.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar

import torch

Device = Literal["cpu", "cuda"]
Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("milonga", "FRAGMENT")
_KEYS: dict[Device, str] = {"cpu": "CPU", "cuda": "CUDA"}
_COMPILER = "torch._dynamo"


def _untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, into which the compiler does not look. While it is not loaded nothing looks."""
    hidden: list[Callable[..., Any]] = []

    @wraps(kernel)
    def run(*arguments: Any) -> Any:
        if _COMPILER not in sys.modules:
            return kernel(*arguments)
        if not hidden:
            hidden.append(torch.compiler.disable(kernel))
        return hidden[0](*arguments)

    return run


class CustomOp:
    """`milonga::NAME`, called like the function that it was made of."""

    def __init__(self, name: str, device: Device, kernel: Callable[..., Any]):
        self.name = f"milonga::{name}"
        _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()))
        packet: torch._ops.OpOverloadPacket = torch.ops.milonga.__getattr__(name)
        self.overload = packet.default
        self._setup: Callable[..., Any] | None = None
        self._backward: Callable[..., Any] | None = None
        # at once: an operator without a derivative would else let gradients through as zeros, with a warning
        torch.library.register_autograd(self.name, self._gradients, setup_context=self._remember, lib=_LIBRARY)
        self.register_kernel(device)(kernel)

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_kernel(self, device: Device) -> Callable[[Function], Function]:
        """Decorator of what computes it on `device`."""

        def register(kernel: Function) -> Function:
            _LIBRARY.impl(self.name, _untraced(kernel), _KEYS[device])
            return kernel

        return register

    def register_fake(self, fake: Function) -> Function:
        """Decorator of what gives results of the right shapes and dtypes, for compilers."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """How gradients flow back, as `torch.library.register_autograd` takes it."""
        self._backward, self._setup = backward, setup_context

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup is not None:
            self._setup(ctx, inputs, output)

    def _gradients(self, ctx: Any, *upstream: Any) -> Any:
        if self._backward is None:
            raise RuntimeError(f"{self.name}: nothing flows back through it; gradients cannot be differentiated again")
        return self._backward(ctx, *upstream)


def custom_op(name: str, device: Device) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator that makes `milonga::name` of a function that computes it on `device` and changes no input."""
    return lambda kernel: CustomOp(name, device, kernel)
