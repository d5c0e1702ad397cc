"""Normalisation before each layer and before the head. No state."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from milonga.layers.base import KeepFp32, bare
from milonga.layers.linear import products
from milonga.layers.recompute import cheap, forgotten
from milonga.ops.autocast import autocast_dtype
from milonga.ops.decode_step import Norm
from milonga.ops.layer_norm import from_rows, layer_norm_and_rows
from milonga.ops.rms_norm import rms_norm

NormKind = Literal["rms_norm", "layer_norm"]


def _wanted(x: Tensor) -> torch.dtype:
    """The dtype in which a norm of `x` goes into the next product: that of autocast where it is on, else that of x."""
    return autocast_dtype(x.device.type) or x.dtype


class RMSNorm(KeepFp32):
    """`x / rms(x) * weight`: weight `[D]` fp32, initially 1."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Float[Tensor, "*rows D"], branch: Float[Tensor, "*rows D"] | None = None
    ) -> Float[Tensor, "*rows D"] | tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
        """-> like x, in autocast's dtype where that is on; sums at least fp32. With `branch`: (norm of sum, sum)."""
        if branch is None:
            return rms_norm(x, self.weight, eps=self.eps, dtype=_wanted(x))
        keep_sum = forgotten("norm") or not forgotten("sum")  # the norm is made again from the sum
        return rms_norm(branch, self.weight, eps=self.eps, residual=x, dtype=_wanted(x), keep_sum=keep_sum)


class LayerNorm(KeepFp32):
    """`(x - mean) / std * weight + bias`: weight and bias `[D]` fp32, initially 1 and 0."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, x: Float[Tensor, "*rows D"], branch: Float[Tensor, "*rows D"] | None = None
    ) -> Float[Tensor, "*rows D"] | tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]]:
        """As `RMSNorm.forward`."""
        first = x if branch is None else branch
        y, total, rows = layer_norm_and_rows(
            first,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=None if branch is None else x,
            dtype=_wanted(x),
            keep_sum=not forgotten("sum"),
        )
        if rows is not None:
            y = cheap("norm", y, lambda rows: from_rows(rows, self.weight, self.bias), rows)
        return y if branch is None else (y, total)


def norm_of(module: nn.Module, *projections: nn.Module) -> Norm | None:
    """The norm as the kernels of a decoded step take it, and with it these projections behind it; None for a module
    that is no norm of this library or is looked at by a hook, and where a projection is more than a product."""
    if not products(*projections):
        return None
    if isinstance(module, RMSNorm) and bare(module, RMSNorm):
        return Norm(module.weight, None, module.eps)
    if isinstance(module, LayerNorm) and bare(module, LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    return None


def build_norm(kind: NormKind, width: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm named `kind`."""
    return RMSNorm(width, eps) if kind == "rms_norm" else LayerNorm(width, eps)


def norm_parameter_count(kind: NormKind, width: int) -> int:
    """Parameters of one norm."""
    return width if kind == "rms_norm" else 2 * width
