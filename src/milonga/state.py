"""Tree functions over states.

A state is a tensor, a (named) tuple of states, or a list of them; every tensor has the batch first: row b belongs to
sequence b. A layer's state is a NamedTuple of tensors, a network's state the tuple of its layers' states.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

State = Any  # Tensor | tuple[State, ...] | list[State]; Python has no way to write the recursion for NamedTuples


def _rebuild(template: State, parts: Sequence[State]) -> State:
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*parts)
    return type(template)(parts)


def map_tensors(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """The same tree with `function` applied to each tensor (and to the tensors at the same place in `others`)."""
    if isinstance(state, Tensor):
        return function(state, *others)
    return _rebuild(state, [map_tensors(function, *parts) for parts in zip(state, *others, strict=True)])


def named_tensors(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor; names join field names and indices with dots, as in `3.ssm`."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(state, "_fields", None) or [str(index) for index in range(len(state))]
    for name, part in zip(names, state, strict=True):
        yield from named_tensors(part, f"{prefix}.{name}" if prefix else name)


def to_flat(state: State) -> dict[str, Tensor]:
    """Every tensor under its name: what a state file holds. The inverse is `from_flat`."""
    return dict(named_tensors(state))


def from_flat(flat: Mapping[str, Tensor], *, like: State) -> State:
    """The state with the structure of `like` and the tensors of `flat`, on the devices and dtypes of `like`.

    Shapes must agree, but for a buffer that grows with the text (dimension 1 is 0 in the empty template).

    Raises:
        ValueError: naming the tensor that is missing, left over, or of another shape.
    """
    template = to_flat(like)
    missing, extra = sorted(template.keys() - flat.keys()), sorted(flat.keys() - template.keys())
    if missing or extra:
        raise ValueError(f"state: the tensors do not fit this model: missing {missing[:4]}, unexpected {extra[:4]}")
    for name, expected in template.items():
        got = flat[name]
        grows = expected.ndim > 1 and expected.shape[1] == 0 and got.ndim == expected.ndim
        shape = [*got.shape[:1], 0, *got.shape[2:]] if grows else list(got.shape)
        if shape != list(expected.shape):
            raise ValueError(f"state: {name} must be {list(expected.shape)}, got {list(got.shape)}")
    return _fill(like, flat, "")


def _fill(like: State, flat: Mapping[str, Tensor], prefix: str) -> State:
    if isinstance(like, Tensor):
        return flat[prefix].to(like.device, like.dtype, copy=True)
    names = getattr(like, "_fields", None) or [str(index) for index in range(len(like))]
    parts = [_fill(p, flat, f"{prefix}.{n}" if prefix else n) for n, p in zip(names, like, strict=True)]
    return _rebuild(like, parts)


def clone(state: State) -> State:
    """A copy that shares no memory with the original."""
    return map_tensors(torch.clone, state)


def detach(state: State) -> State:
    """The same values, cut from the autograd graph (truncated backpropagation through time)."""
    return map_tensors(Tensor.detach, state)


def to(state: State, device: torch.device | str) -> State:
    """On another device. Dtypes stay: a change of dtype goes through `from_flat(..., like=template)`, because a
    recurrent state is at least fp32 in every mode while a ring of keys follows the network."""
    return map_tensors(lambda tensor: tensor.to(device), state)


def select(state: State, rows: Sequence[int] | Tensor) -> State:
    """The given rows, in the given order (repeats allowed): the states of some of the sequences."""

    def take(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, torch.as_tensor(rows, dtype=torch.int64, device=tensor.device))

    return map_tensors(take, state)


def _pad_capacity(tensor: Tensor, capacity: int) -> Tensor:
    if tensor.ndim < 2 or tensor.shape[1] == capacity:
        return tensor
    padded = tensor.new_zeros(tensor.shape[0], capacity, *tensor.shape[2:])
    padded[:, : tensor.shape[1]] = tensor
    return padded


def merge(states: Sequence[State]) -> State:
    """One state with the rows of all `states`, in order.

    Buffers that grow with the text may have different capacities (dimension 1): the shorter are padded at the end.
    """
    if not states:
        raise ValueError("merge: expected at least one state, got none")

    def join(*tensors: Tensor) -> Tensor:
        if tensors[0].ndim > 1:
            capacity = max(tensor.shape[1] for tensor in tensors)
            tensors = tuple(_pad_capacity(tensor, capacity) for tensor in tensors)
        return torch.cat(tensors)

    return map_tensors(join, *states)


def nbytes(state: State) -> int:
    """Bytes held by all tensors of the state."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(state))


def batch_size(state: State) -> int:
    """Rows of the state; 0 for a state without tensors."""
    return next((tensor.shape[0] for _, tensor in named_tensors(state)), 0)
