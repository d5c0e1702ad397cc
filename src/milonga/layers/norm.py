"""Normalisation before each layer and before the head. No state."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from milonga.layers.base import KeepFp32
from milonga.ops.rms_norm import rms_norm

NormKind = Literal["rms_norm", "layer_norm"]


class RMSNorm(KeepFp32):
    """`x / rms(x) * weight`: weight `[D]` fp32, initially 1."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """-> like x; sums at least fp32."""
        return rms_norm(x, self.weight, eps=self.eps)


class LayerNorm(KeepFp32):
    """`(x - mean) / std * weight + bias`: weight and bias `[D]` fp32, initially 1 and 0."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """-> like x; sums at least fp32."""
        wide = x.to(self.weight.dtype)
        return F.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


def build_norm(kind: NormKind, width: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm named `kind`."""
    return RMSNorm(width, eps) if kind == "rms_norm" else LayerNorm(width, eps)


def norm_parameter_count(kind: NormKind, width: int) -> int:
    """Parameters of one norm."""
    return width if kind == "rms_norm" else 2 * width
