"""What a layer is: a function `(x, state) -> (y, state)` with two primitives, `advance` and `commit`."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from milonga.segments import Segments, sequence_bounds
from milonga.state import State, named_tensors, nbytes

Trace = Any  # what one piece of text added; each layer has its own NamedTuple
Keep = int | Int[Tensor, " S"]  # how many steps of a piece to keep: one number, or one per sequence


class LayerConfig(BaseModel):
    """Settings of one kind of layer. Subclasses add `kind: Literal["name"] = "name"` and build their layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def build(self, d_model: int) -> "Layer":
        """The layer for a residual stream of width `d_model`, with its own initialisation.

        Raises:
            ValueError: if the settings do not fit `d_model`.
        """
        raise NotImplementedError

    def parameter_count(self, d_model: int) -> int:
        """Parameters of the built layer (its norm is counted by the model)."""
        raise NotImplementedError

    def flops_per_token(self, d_model: int, context: float) -> float:
        """Multiply-adds times two of one forward step, when `context` earlier steps can be seen on average."""
        raise NotImplementedError

    def state_bytes(self, d_model: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state after `length` steps, with activations of `dtype`.

        By default measured on the empty state of a layer without memory of its own, which is right for every state that
        does not grow.
        """
        with torch.device("meta"):
            return nbytes(self.build(d_model).to(dtype).init_state(1))


class KeepFp32(nn.Module):
    """A module whose parameters never go below fp32.

    `module.bfloat16()` and `module.to(torch.bfloat16)` move every other parameter and leave these exact. They sit in a
    module of their own because one FSDP group has one dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepFp32":
        def guarded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.element_size() < 4
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(guarded, recurse)


class Layer(nn.Module):
    """One layer of the residual stack: `x = x + layer(norm(x))`; norm and residual belong to the model.

    Subclasses give `advance`, `commit` and `init_state`; `forward` is written once, here.
    """

    apart: ClassVar[bool] = False  # each step is read by itself, without a state: some steps of x give these of y
    no_decay: ClassVar[tuple[str, ...]] = ()  # parameter names that weight decay leaves alone
    own_init: tuple[str, ...] = ()  # parameter names that a model-wide initialisation leaves alone
    residual_output: ClassVar[str]  # name of the weight that writes into the residual stream

    def __init_subclass__(cls) -> None:
        """A class with an `advance` of its own inherits nothing that stands for the `advance` of another class."""
        super().__init_subclass__()
        own = vars(cls)
        if "advance" not in own:
            return
        if "apart" not in own:
            cls.apart = False
        if "advance_last" not in own:
            cls.advance_last = Layer.advance_last
        if "step_" not in own:
            cls.step_ = Layer.step_
        if "read_piece" not in own:
            cls.read_piece = Layer.read_piece

    def advance(
        self, x: Float[Tensor, "B T D"], state: State | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B T D"], Trace]:
        """Read a piece of text after `state`, writing nothing: -> (output `[B T D]`, trace).

        The trace holds what the piece adds to the state; `commit` turns it into the next state. `state=None` is the
        empty state. With segments the batch is packed `[1 T D]` and the state has a row per sequence.
        """
        raise NotImplementedError

    def advance_last(
        self, x: Float[Tensor, "B T D"], state: State | None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B L D"], Trace]:
        """`advance`, of whose output only `last_steps` is wanted; no sequence is empty.

        Here as `advance`; a layer that can leave out the rest overrides it. The trace is that of all steps.
        """
        y, trace = self.advance(x, state, segments)
        return last_steps(y, segments), trace

    def commit(self, state: State | None, trace: Trace, keep: Keep | None = None) -> State:
        """The state after the traced piece, or after its first `keep` steps (one number, or one per sequence). Pure."""
        raise NotImplementedError

    def commit_(self, state: State, trace: Trace, keep: Keep | None = None) -> None:
        """`commit` into the tensors of `state` itself, bit for bit the same values.

        The buffers that captured decoding replays over stay where they are. A `keep` on a GPU is read there and trusted
        to lie within the piece: checking it would wait for the GPU.
        """
        write_(state, self.commit(state, trace, keep))

    def resized(self, state: State, capacity: int) -> State:
        """The state with room for exactly `capacity` steps, where it is a buffer that grows; else the state itself."""
        return state

    def step_(self, x: Float[Tensor, "B 1 D"], state: State, norm: nn.Module) -> Float[Tensor, "B 1 D"]:
        """One decoded step of every row, the state advanced in place: -> `x + self(norm(x))`.

        Here as `advance` and `commit_`; a layer whose step has kernels of its own overrides it.
        """
        y, trace = self.advance(norm(x), state)
        self.commit_(state, trace)
        return x + y

    def read_piece(
        self, x: Float[Tensor, "B T D"], state: State, norm: nn.Module
    ) -> tuple[Float[Tensor, "B T D"], Trace]:
        """Read a short piece of every row, the state left alone: -> (`x + self(norm(x))`, the trace).

        Here as `advance`; a layer that has kernels for few steps of few rows overrides it.
        """
        y, trace = self.advance(norm(x), state)
        return x + y, trace

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The empty state of `batch` sequences. `dtype` is that of activations; recurrent sums stay at least fp32."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, segments: Segments | None = None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Read a piece of text: -> (output `[B T D]`, the state after it)."""
        y, trace = self.advance(x, state, segments)
        return y, self.commit(state, trace)

    def named_no_decay(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that weight decay leaves alone, checked to exist."""
        for name in self.no_decay:
            yield name, self.get_parameter(name)


def bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very kind and nobody looks on by a hook, so that what takes its weights past the
    call does what calling it does. A parametrization makes a module of another kind."""
    return type(module) is kind and not _hooked(module) and not _has_any_global_hook()


def unseen(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very kind and nobody looks on, at it or at any module inside it."""
    return bare(module, kind) and not any(map(_hooked, module.modules()))


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def last_steps(x: Float[Tensor, "B T D"], segments: Segments | None) -> Float[Tensor, "B L D"]:
    """The last step of every sequence, of which none is empty: `[B 1 D]`, packed `[1 S D]`."""
    return x[:, -1:] if segments is None else x[:, segments.on(x.device)[1:] - 1]


def keep_per_sequence(keep: Keep | None, lengths: Tensor) -> Tensor:
    """`keep` as int64 `[S]` on the CPU, checked against the lengths of the traced pieces.

    Raises:
        ValueError: if a number is negative, longer than its piece, or if there is not one per sequence.
    """
    if keep is None:
        return lengths
    wanted = torch.as_tensor(keep, dtype=torch.int64, device="cpu")
    if wanted.ndim == 0:
        wanted = wanted.expand(lengths.shape)
    if wanted.shape != lengths.shape:
        raise ValueError(f"commit: keep must be one number or one per sequence [{lengths.numel()}], got {keep}")
    if bool((wanted < 0).any()) or bool((wanted > lengths).any()):
        raise ValueError(f"commit: keep must lie in 0..{lengths.tolist()[:8]}, got {wanted.tolist()[:8]}")
    return wanted


def write_(state: State, values: State) -> None:
    """Copy `values` into the tensors of `state`, which has the same shapes."""
    for (_, old), (_, new) in zip(named_tensors(state), named_tensors(values), strict=True):
        old.copy_(new)


def keep_on_device(keep: Keep | None, batch: int, time: int, device: torch.device) -> Int[Tensor, " B"]:
    """`keep` as int64 `[B]` on `device`, without segments. One that lies on a GPU already is not checked.

    Raises:
        ValueError: as `keep_per_sequence`.
    """
    if keep is None:
        return torch.full((batch,), time, dtype=torch.int64, device=device)
    if isinstance(keep, Tensor) and keep.device.type != "cpu":
        return keep.to(device, torch.int64).expand(batch)
    checked = keep_per_sequence(keep, sequence_bounds(batch, time, None).diff())
    return checked.to(device)


def last_columns_(history: Float[Tensor, "B P C"], new: Float[Tensor, "B T C"], keep: Int[Tensor, " B"]) -> None:
    """`last_columns` into `history` itself, without segments; `keep` on the same device."""
    columns = history.shape[1]
    if columns == 0 or new.shape[1] == 0:
        return
    both = torch.cat([history, new.to(history.dtype)], 1)
    index = keep[:, None] + torch.arange(columns, device=history.device)
    history.copy_(both.gather(1, index[..., None].expand(-1, -1, history.shape[2])))


def kept_steps(x: Tensor, keep: Tensor, segments: Segments | None) -> tuple[Tensor, Segments]:
    """The first `keep[s]` steps of every sequence of `x` `[B T ...]`: -> (packed `[1 sum(keep) ...]`, segments)."""
    bounds = sequence_bounds(x.shape[0], x.shape[1], segments)
    packed = Segments(torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)]))
    shift = torch.repeat_interleave(bounds[:-1] - packed.offsets[:-1], keep)
    index = (torch.arange(packed.total) + shift).to(x.device)
    return x.flatten(0, 1).index_select(0, index).unsqueeze(0), packed


def last_columns(
    history: Float[Tensor, "S P C"], new: Float[Tensor, "B T C"], keep: Tensor, segments: Segments | None
) -> Float[Tensor, "S P C"]:
    """The last P columns of each sequence after its first `keep` new ones: what a convolution needs of the past."""
    columns = history.shape[1]
    if columns == 0 or new.shape[0] * new.shape[1] == 0:
        return history.clone()
    starts = sequence_bounds(new.shape[0], new.shape[1], segments)[:-1]
    wanted = keep[:, None] + torch.arange(columns) - columns  # index into the piece; negative: into the history
    from_new = (starts[:, None] + wanted.clamp_min(0)).clamp_max(new.shape[0] * new.shape[1] - 1)
    from_old = (wanted + columns).clamp(0, columns - 1)
    # a copy to a GPU that may be waited for would wait for all that the GPU has to do
    fresh, from_new, from_old = (index.to(new.device, non_blocking=True) for index in (wanted >= 0, from_new, from_old))
    taken = new.flatten(0, 1)[from_new]
    kept = history.gather(1, from_old[..., None].expand(-1, -1, history.shape[2]))
    return torch.where(fresh[..., None], taken.to(history.dtype), kept)
