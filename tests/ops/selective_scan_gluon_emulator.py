"""Runs the Gluon kernels of `selective_scan` on CPU tensors, a program at a time, as plain Python over PyTorch.

Gluon has no interpreter. What a kernel computes does not depend on its layouts, so a stand-in for the language without
them is enough to check arithmetic, masks and addresses: every access that is not masked must lie inside its tensor.
Barriers, bank conflicts and rounding in the matrix units are not checked here but on a GPU.
"""

import types
from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental.gluon import language
from triton.experimental.gluon._runtime import GluonJITFunction


class Pointer:
    """A tensor's memory from its first element on, and offsets into it."""

    def __init__(self, memory: Tensor, offsets) -> None:
        self.memory = memory
        self.offsets = offsets
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to_first_of(cls, tensor: Tensor) -> "Pointer":
        room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.detach().as_strided((room,), (1,), tensor.storage_offset()), torch.as_tensor(0))

    def __add__(self, offsets) -> "Pointer":
        return Pointer(self.memory, self.offsets + offsets)

    def __sub__(self, offsets) -> "Pointer":
        return Pointer(self.memory, self.offsets - offsets)

    def places(self, mask, shape: torch.Size) -> tuple[Tensor, Tensor]:
        mask = torch.as_tensor(True if mask is None else mask).expand(shape)
        offsets = self.offsets.expand(shape)[mask]
        assert bool(((offsets >= 0) & (offsets < len(self.memory))).all()), "out of bounds"
        return mask, offsets


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.memory.shape)

    def load(self, layout) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        assert self.memory.shape == value.shape
        self.memory.copy_(value)

    def index(self, i) -> "Shared":
        return Shared(self.memory[int(i)])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order) -> "Shared":
        return Shared(self.memory.permute(*order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout) -> "Shared":
        return Shared(self.memory.view(shape))

    reinterpret = _reinterpret


def load(pointer: Pointer, mask=None, other=0) -> Tensor:
    shape = (
        pointer.offsets.shape
        if mask is None
        else torch.broadcast_shapes(pointer.offsets.shape, torch.as_tensor(mask).shape)
    )
    mask, places = pointer.places(mask, shape)
    result = torch.full(shape, other, dtype=pointer.memory.dtype)
    result[mask] = pointer.memory[places]
    return result


def store(pointer: Pointer, value, mask=None) -> None:
    shape = torch.broadcast_shapes(pointer.offsets.shape, value.shape)
    mask, places = pointer.places(mask, shape)
    pointer.memory[places] = value.expand(shape)[mask].to(pointer.memory.dtype)


def inline_asm(
    text: str, constraints: str, values: list[Tensor], dtype: torch.dtype, is_pure: bool, pack: int
) -> Tensor:
    if "prefetch" in text:
        pointer, mask = values
        return torch.zeros(torch.broadcast_shapes(pointer.offsets.shape, mask.shape), dtype=dtype)
    (value,) = values
    if text.startswith("rcp"):
        return 1.0 / value
    if text.startswith("shl"):
        return (value.view(torch.int32) << int(text.split()[-1].rstrip(";"))).view(dtype)
    if text.startswith("and"):
        return (value.view(torch.int32) & int(text.split()[-1].rstrip(";"), 16) - 2**32).view(dtype)
    assert text.startswith(("mov", "{ shl"))
    return value.to(dtype)


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout) -> Shared:
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def _holds(condition: bool) -> None:
    assert condition


LANGUAGE = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64,
    "load": load, "store": store, "inline_asm_elementwise": inline_asm, "static_range": range,
    "allocate_shared_memory": allocate_shared_memory, "SliceLayout": lambda *_: None, "BlockedLayout": lambda *_: None,
    "arange": lambda start, stop, layout: torch.as_tensor(torch.arange(start, stop, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout: torch.as_tensor(torch.zeros(shape, dtype=dtype)),
    "full_like": torch.full_like, "zeros_like": torch.zeros_like, "exp2": torch.exp2, "abs": torch.abs,
    "fma": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    "maximum": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "where": lambda condition, a, b: torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)),
    "sum": lambda value, axis: value.sum(axis), "join": lambda a, b: torch.stack([a, b], -1),
    "convert_layout": lambda value, layout, assert_trivial=False: value,
    "split": lambda value: value.unbind(-1), "static_assert": _holds,
}  # fmt: skip


def _mma(left: Tensor, right: Tensor, total: Tensor, input_precision: str) -> Tensor:
    return total + left @ right


# Copies past the registers are done at once.
ASYNC_COPY = types.SimpleNamespace(
    commit_group=lambda: None,
    wait_group=lambda outstanding: None,
)


def _plain(function: GluonJITFunction, gl: types.SimpleNamespace, done: dict) -> Callable:
    """The Python function under a kernel, with the stand-in for the language and for what else it calls."""
    if function in done:
        return done[function]
    scope = dict(function.fn.__globals__)
    result = types.FunctionType(function.fn.__code__, scope, function.fn.__name__, function.fn.__defaults__)
    done[function] = result
    for name, value in scope.items():
        if isinstance(value, GluonJITFunction):
            scope[name] = _plain(value, gl, done)
        elif isinstance(value, language.constexpr):
            scope[name] = value.value
    scope["gl"] = gl
    scope["mma_v2"] = _mma
    scope["async_copy"] = ASYNC_COPY
    scope["load_to_shared"] = lambda shared, pointer, mask: shared.store(load(pointer, mask))
    return result


def plain(function: GluonJITFunction) -> Callable:
    """A function that kernels call, on PyTorch's tensors."""
    return _plain(function, types.SimpleNamespace(**LANGUAGE), {})


class Emulated:
    """Stands in for a kernel: `Emulated(kernel)[(programs,)](*arguments, **options)`."""

    def __init__(self, kernel: GluonJITFunction) -> None:
        self.gl = types.SimpleNamespace(**LANGUAGE)
        self.names = kernel.arg_names
        self.function = _plain(kernel, self.gl, {})

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments, **options) -> None:
            values = {**dict(zip(self.names, arguments, strict=False)), **options}
            values = {name: values[name] for name in self.names}
            values = {k: Pointer.to_first_of(v) if isinstance(v, Tensor) else v for k, v in values.items()}
            for program in range(grid[0]):
                self.gl.program_id = lambda axis, i=program: torch.as_tensor(i)
                self.function(**values)

        return launch
