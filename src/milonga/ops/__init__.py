"""Mathematics on tensors: no nn.Module, no config, no global."""

from milonga.ops.causal_conv import causal_conv
from milonga.ops.linear import linear
from milonga.ops.linear_cross_entropy import linear_cross_entropy
from milonga.ops.rms_norm import rms_norm
from milonga.ops.rotary import rotary
from milonga.ops.selective_scan import selective_scan
from milonga.ops.swiglu import swiglu
from milonga.ops.window_attention import window_attention

__all__ = [
    "causal_conv",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "selective_scan",
    "swiglu",
    "window_attention",
]
