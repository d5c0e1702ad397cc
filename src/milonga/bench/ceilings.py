"""What this machine can do at best, measured in the same run as what is judged by it."""

from dataclasses import dataclass, field
from importlib import import_module

import torch

from milonga.bench.timing import Call, Failure, measure
from milonga.ops import linear
from milonga.ops.backend import INSTALLED

_GPU_COPY = 1 << 30  # bytes of the tensor that is copied
_CPU_COPY_MOST = 1 << 28
_TURNS_FOR_EXP = 64
# A CPU has no unit for exponentials: range reduction, a polynomial of degree 5 and the exponent's bits.
CPU_EXP_OPERATIONS = 8


@dataclass
class Ceilings:
    """The best of several measurements each.

    Attributes:
        device: where.
        products: dtype name -> FLOP/s of a large square matrix product.
        exps: exponentials a second of a GPU's unit for them; None on a CPU, where they are arithmetic, and without
            Triton.
        copies: bytes of the copied tensor -> bytes a second, read and written. On a GPU one size, far beyond its cache.
            On a CPU the size of what is judged, since nothing empties its caches between two repeats.
    """

    device: torch.device
    products: dict[str, float] = field(default_factory=dict)
    exps: float | None = None
    copies: dict[int, float] = field(default_factory=dict)

    def copy(self, nbytes: float) -> float:
        """Bytes a second, read and written, of a copy that moves about `nbytes` in all. Measured when first asked."""
        size = _GPU_COPY
        if self.device.type == "cpu":
            size = 1 << 16
            while size < min(nbytes / 2, _CPU_COPY_MOST):
                size *= 2
        if size not in self.copies:
            self.copies[size] = _copy_rate(size, self.device)
        return self.copies[size]

    def product(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in `dtype`. Measured when first asked."""
        name = dtype_name(dtype)
        if name not in self.products:
            self.products[name] = _product_rate(dtype, self.device)
        return self.products[name]

    def vector(self) -> float:
        """fp32 operations a second outside the matrix units, a multiply-add counted as one.

        Half the FLOP/s of an fp32 matrix product (PyTorch leaves TF32 off unless told otherwise).
        """
        return self.product(torch.float32) / 2

    def exp(self) -> float | None:
        """Exponentials a second of a GPU. Measured when first asked."""
        if self.exps is None and self.device.type == "cuda" and INSTALLED["triton"]:
            self.exps = _exp_rate(self.device)
        return self.exps

    def again(self) -> None:
        """Measure the products once more and keep the better: other work on a CPU's cores may have come and gone."""
        for name in self.products:
            self.products[name] = max(self.products[name], _product_rate(DTYPE_OF[name], self.device))

    def to_json(self) -> dict[str, object]:
        """What was measured, JSON-ready: bytes/s, FLOP/s, exponentials/s."""
        return {
            "copy_bytes_per_second": {str(size): rate for size, rate in sorted(self.copies.items())},
            "product_flops_per_second": dict(sorted(self.products.items())),
            "exps_per_second": self.exps,
        }


DTYPE_OF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`."""
    return next(name for name, known in DTYPE_OF.items() if known == dtype)


def _best(call: Call, device: torch.device) -> float:
    budget = 0.3 if device.type == "cuda" else 0.12
    timing = measure({"": call}, device, budget=budget, least=3, most=30, flush=False)[""]
    if isinstance(timing, Failure):
        raise RuntimeError(f"bench: a ceiling could not be measured: {timing.reason}")
    return timing.best


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """On a CPU the better of PyTorch's product and the library's."""
    if device.type == "cuda":
        width = 4096 if dtype == torch.float32 else 8192
    else:
        width = 1024
    a = torch.randn(width, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    best = _best(lambda: a @ b, device)
    if device.type == "cpu":
        best = min(best, _best(lambda: linear(a, b), device))
    return 2 * width**3 / best


def _exp_rate(device: torch.device) -> float:
    launch = import_module("milonga.bench.exp_rate").launch
    count = launch(device, _TURNS_FOR_EXP)
    return count / _best(lambda: launch(device, _TURNS_FOR_EXP), device)
