"""The linear map of every layer: PyTorch's module with this library's product."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from milonga.layers.base import bare
from milonga.layers.recompute import cheap
from milonga.ops.autocast import autocast_dtype
from milonga.ops.linear import linear, linear_split, quantize

Storage = Literal["bf16", "int8"]
STORAGES: tuple[str, ...] = get_args(Storage)


class Linear(nn.Linear):
    """`x @ weight^T`, no bias; weight `[F, D]` with PyTorch's default initialisation."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, input: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """-> the product, dtype of the input (of autocast where that is on)."""
        return linear(input, self.taken(input))

    def split(self, input: Float[Tensor, "*rows D"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The product in parts of `sizes` features, see `linear_split`."""
        return linear_split(input, self.taken(input), sizes)

    def from_feature(self, input: Float[Tensor, "*rows D"], first: int) -> Float[Tensor, "*rows G"]:
        """The product's features from `first` on."""
        return linear(input, self.taken(input)[first:])

    def taken(self, input: Tensor) -> Tensor:
        """The weight as the product takes it: under autocast on a GPU a copy in its dtype, cheap to make again."""
        dtype = autocast_dtype("cuda") if input.is_cuda else None
        if dtype is None:
            return self.weight
        return cheap("cast", self.weight.to(dtype), partial(torch.Tensor.to, dtype=dtype), self.weight)


def products(*modules: nn.Module) -> bool:
    """Whether these are products with their weights and nothing else: no hook that would not be called, no
    parametrization, no stored weights."""
    return all(bare(module, Linear) for module in modules)


class StoredLinear(nn.Module):
    """A trained `Linear` whose weights take 2 bytes (bfloat16) or 1 (int8, one factor per feature). Not trainable.

    The product is still taken in the precision of its input.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, trained: nn.Linear, storage: Storage):
        super().__init__()
        self.storage = storage
        weight, scale = trained.weight.detach().bfloat16(), None
        if storage == "int8":
            weight, scale = quantize(trained.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, input: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows F"]:
        """-> the product, dtype of the input."""
        return linear(input, self.weight, self.scale)

    def split(self, input: Float[Tensor, "*rows D"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The product in parts of `sizes` features, see `linear_split`."""
        return linear_split(input, self.weight, sizes, self.scale)

    def from_feature(self, input: Float[Tensor, "*rows D"], first: int) -> Float[Tensor, "*rows G"]:
        """The product's features from `first` on."""
        return linear(input, self.weight[first:], None if self.scale is None else self.scale[first:])

    def extra_repr(self) -> str:
        """Shape and storage."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, storage={self.storage}"


def separable(module: nn.Module) -> bool:
    """Whether parts of this projection's result can be taken alone: not if it is wrapped, or a hook looks on."""
    return bare(module, Linear) or bare(module, StoredLinear)


def in_parts(module: nn.Module, input: Float[Tensor, "*rows D"], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """A projection's result in parts of `sizes` features, each a product of its own where it is `separable`."""
    if separable(module):
        return module.split(input, sizes)  # type: ignore[operator]
    return module(input).split(list(sizes), -1)


def store_weights(module: nn.Module, storage: Storage) -> None:
    """Replace every `Linear` inside `module` by a `StoredLinear`, in place.

    What decoding mostly does is read these weights: in 2 bytes instead of 4 they come twice as fast.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            with torch.inference_mode(False):
                module.set_submodule(name, StoredLinear(child, storage))
        else:
            store_weights(child, storage)
