"""Tensors that the backward pass makes again instead of keeping them: selective activation checkpointing.

A layer says which of its intermediate results are cheap to make again (`cheap`); a network says which of them are not
to be kept (`forgetting`). What the derivative of another op would have saved of such a result is then replaced by the
recipe for it. Only the named result is made again, not the layer: norms, gates, short convolutions and rotations cost a
few per cent of a step and are half of its memory.

Two results are made again by the backward pass of an op rather than before it: `scan`, the output of a Mamba layer's
scan, is a by-product of the scan's own backward pass, and dt comes with it; `sum`, the residual stream before a norm,
is told from the norm's output, or from the normalised row that a layer norm leaves for it. A layer asks whether it is
to be (`forgotten`).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from milonga.ops.autocast import autocast_dtype, autocast_to

Cheap = Literal["norm", "sum", "gate", "conv", "dt", "rotary", "cast", "scan"]
CHEAP: tuple[Cheap, ...] = get_args(Cheap)


class _Recipe:
    """How one tensor is made again; what was made is kept until everyone who saved the tensor has had it."""

    def __init__(self, value: Tensor, make: Callable[..., Tensor], sources: tuple[Tensor, ...]):
        self.value: Tensor | None = value  # holds the memory, so that its address names this tensor and no other
        self.make = make
        self.sources = tuple(source.detach() for source in sources)
        self.versions = tuple(source._version for source in sources)
        self.device = value.device.type
        self.autocast = autocast_dtype(self.device)
        self.wanted = 0
        self.layout = (value.shape, value.stride(), value.dtype)

    def again(self) -> Tensor:
        """The tensor, made again if it is not at hand."""
        if self.value is None:
            if self.versions != tuple(source._version for source in self.sources):
                raise RuntimeError(
                    "recompute: a tensor that a result is to be made from again was written in place between the "
                    "forward and the backward pass; do so afterwards, or keep the result (training.recompute)"
                )
            with torch.no_grad(), autocast_to(self.device, self.autocast):
                self.value = self.make(*self.sources)
            assert (self.value.shape, self.value.stride(), self.value.dtype) == self.layout
        value = self.value
        self.wanted -= 1
        if self.wanted <= 0:
            self.value = None
        return value


class _Kept(NamedTuple):
    """A tensor that is kept, and how often it had been written by then."""

    tensor: Tensor
    version: int


class _Again(NamedTuple):
    """A view of a tensor that is made again."""

    recipe: _Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Forgetting:
    """The results that are not kept, by the address of their memory, while a forward pass is under way."""

    def __init__(self, names: Collection[str]):
        self.names = frozenset(names)
        self.recipes: dict[int, _Recipe] = {}

    def pack(self, tensor: Tensor) -> "_Kept | _Again":
        recipe = self.recipes.get(tensor.untyped_storage().data_ptr()) if self.recipes else None
        if recipe is None or tensor.dtype != recipe.layout[2]:
            return _Kept(tensor, tensor._version)
        recipe.wanted += 1
        return _Again(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(packed: "_Kept | _Again") -> Tensor:
        if isinstance(packed, _Again):
            return packed.recipe.again().as_strided(packed.shape, packed.stride, packed.offset)
        if packed.tensor._version != packed.version:  # PyTorch does not look where there are hooks
            raise RuntimeError(
                f"recompute: a tensor {list(packed.tensor.shape)} that the backward pass needs was written in place "
                "after the forward pass had kept it; write to a copy"
            )
        return packed.tensor


_active: ContextVar[_Forgetting | None] = ContextVar("forgetting", default=None)


@contextmanager
def forgetting(names: Collection[str]) -> Iterator[None]:
    """Within it, results that layers call cheap under one of `names` are not kept for the backward pass.

    It is for one sub-layer at a time: the results themselves live until it ends. Without a gradient to compute, with no
    names, and in code that is being compiled (where the compiler decides what to keep), it does nothing.
    """
    if not names or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    here = _Forgetting(names)
    token = _active.set(here)
    try:
        with torch.autograd.graph.saved_tensors_hooks(here.pack, here.unpack):
            yield
    finally:
        _active.reset(token)
        for recipe in here.recipes.values():
            recipe.value = None


def forgotten(name: Cheap) -> bool:
    """Whether results of this kind are not to be kept, here and now: what `forgetting` around this call says."""
    here = None if torch.compiler.is_compiling() else _active.get()
    return here is not None and name in here.names


def cheap(name: Cheap, value: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Say that `value` equals `make(*sources)`, and that making it again costs little beside keeping it.

    What was said of a value first counts.

    Args:
        name: what kind of result it is.
        value: the result, as it was just computed; returned as it is.
        make: makes it again, of the same layout, from `sources` and from parameters.
        sources: tensors that are kept anyway.
    """
    here = None if torch.compiler.is_compiling() else _active.get()
    # a subclass, a fake tensor for one, has no address to be known by
    if here is not None and name in here.names and type(value) is Tensor and value.is_contiguous():
        storage = value.untyped_storage()
        if storage.nbytes() == value.nbytes:  # a view of something larger would not free it
            here.recipes.setdefault(storage.data_ptr(), _Recipe(value, make, sources))
    return value
