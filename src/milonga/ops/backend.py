"""Which implementation an op runs on: decided here and nowhere else.

Every op has a `reference` (a plain definition in PyTorch that runs anywhere and in float64). The `cpu` backend is
Numba, the `triton` backend is Triton on a GPU. `auto` takes the fast path of the tensor's device where it exists for
the dtype, else the reference: `choice` says which, and `milonga doctor` prints it. A backend asked for by name that
cannot run is an error, never another backend.
"""

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

OPS = (
    "selective_scan",
    "causal_conv",
    "window_attention",
    "rms_norm",
    "swiglu",
    "rotary",
    "linear_cross_entropy",
)
COMPILED = (*OPS, "linear", "mamba_step")  # what has kernels for the CPU that are compiled at installation
BACKENDS = ("auto", "reference", "cpu", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_OPS: tuple[str, ...] = (
    "selective_scan",
    "decode_step",
    "mamba_piece",
    "speculation",
    "causal_conv",
    "rms_norm",
    "swiglu",
    "rotary",
    "window_attention",
    "linear_cross_entropy",
)


# Whether each can be imported, found without importing it.
INSTALLED = {package: find_spec(package) is not None for package in ("numba", "triton")}


def refusal(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device` (a device type) and `dtype`; None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device != "cpu":
            return f"its tensors are on {device}"
        if dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}"
        return None if INSTALLED["numba"] else "Numba is not installed"
    if backend == "triton":
        if op not in TRITON_OPS:
            return "this op has no Triton kernel"
        if device != "cuda":
            return f"its tensors are on {device}"
        if dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}"
        return None if INSTALLED["triton"] else "Triton is not installed"
    return f"there is no such backend; choose from {', '.join(BACKENDS)}"


def choice(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend that runs: `reference`, `cpu` or `triton`.

    Raises:
        ValueError: if `backend` was asked for by name and cannot run here.
    """
    if backend == "auto":
        fast = "triton" if device == "cuda" else "cpu"
        return "reference" if refusal(op, fast, device, dtype) else fast
    reason = refusal(op, backend, device, dtype)
    if reason:
        raise ValueError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def direct(x: torch.Tensor, backend: str = "cpu") -> bool:
    """Whether an op may call its kernel of `backend` (`cpu` or `triton`) itself: nothing is differentiated or traced.

    A PyTorch operator around the kernel would then only cost time, 7 to 10 us a call, which shows in decoding.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.device.type == ("cuda" if backend == "triton" else "cpu")
    )


@cache
def kernels(op: str, backend: str) -> ModuleType:
    """The module with the kernels of `op`. Numba and Triton load here, on first use, and nowhere else."""
    return importlib.import_module(f"milonga.ops.{op}.{backend}")
