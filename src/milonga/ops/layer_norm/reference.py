"""The definition of `layer_norm`."""

from torch import Tensor

from milonga.ops.checks import wide


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `layer_norm`, by its formula; dtype of x."""
    values = x.to(wide(x.dtype))
    centred = values - values.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (centred / deviation * weight + bias).to(x.dtype)
