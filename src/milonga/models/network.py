"""The network that a model config describes: embedding, residual layers, norm, head."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from milonga.layers import Layer, LayerConfig, NormKind, build_norm
from milonga.layers.base import Keep, Trace, last_steps, unseen
from milonga.layers.linear import Linear
from milonga.layers.mamba_run import MambaRun, MambaRuns, Pair, watched
from milonga.layers.recompute import cheap, forgetting
from milonga.ops.backend import direct
from milonga.ops.linear_cross_entropy import linear_cross_entropy
from milonga.segments import Segments
from milonga.state import State

NetworkState = tuple[State, ...]
LogitsOf = Literal["all", "last", "none"]
_LOGITS: tuple[LogitsOf, ...] = get_args(LogitsOf)
_NO_RUNS: dict[int, MambaRun] = {}


@runtime_checkable
class NetworkSettings(Protocol):
    """What a network needs of its config (`ModelConfig` has it)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def stack(self) -> list[str]: ...
    @property
    def layers(self) -> Mapping[str, LayerConfig]: ...
    @property
    def norm(self) -> NormKind: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied(self) -> bool: ...
    @property
    def init(self) -> str: ...


class NetworkOutput(NamedTuple):
    """What one call of a network gives; fields that were not asked for are None."""

    logits: Float[Tensor, "B T V"] | Float[Tensor, "S V"] | None  # fp32 at least; [S V] for `logits="last"`
    losses: Float[Tensor, "B T"] | None  # nats of each target; 0 where the target is -100
    state: NetworkState | None
    trace: tuple[Trace, ...] | None


class Sublayer(nn.Module):
    """`x + layer(norm(x))`: the norm and the residual live here, not in layers.

    What the layer before gave is added here too, so that the sum and its norm are one pass over memory.
    """

    def __init__(self, norm: nn.Module, layer: Layer):
        super().__init__()
        self.norm = norm
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        branch: Float[Tensor, "B T D"] | None,
        state: State | None,
        segments: Segments | None,
        keep_state: bool,
        traced: bool,
        last: bool = False,
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L D"], State | None, Trace | None]:
        """-> (`x + branch`, what the layer adds to it, the next state unless not wanted, the trace if wanted).

        L is T; with `last` the first two are `last_steps` of these.
        """
        if branch is None:
            y = self.norm(x)
        else:
            y, x = self.norm(x, branch)
        y = cheap("norm", y, self.norm, x)
        if last:
            (y, trace), x = self.layer.advance_last(y, state, segments), last_steps(x, segments)
        else:
            y, trace = self.layer.advance(y, state, segments)
        after = self.layer.commit(state, trace) if keep_state and not traced else None
        return x, y, after, trace if traced else None


class _Undrawn(TorchFunctionMode):
    """Leaves out what draws random numbers into a tensor: on the meta device there is nothing to draw into.

    PyTorch would run its Python definitions of these functions, and import its compiler for them: about a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """Embedding, a stack of residual sub-layers, a norm and a head.

    Everything goes through `forward`: methods beside it would bypass FSDP2's hooks and `torch.compile`.
    """

    def __init__(self, config: NetworkSettings, *, seed: int = 0, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        on_meta = device is not None and torch.device(device).type == "meta"
        undrawn = _Undrawn() if on_meta else nullcontext()
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"), undrawn:
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.sublayers = nn.ModuleList(
                Sublayer(
                    build_norm(config.norm, config.d_model, config.norm_eps), config.layers[name].build(config.d_model)
                )
                for name in config.stack
            )
            self.norm = build_norm(config.norm, config.d_model, config.norm_eps)
            self.head = Linear(config.d_model, config.vocab_size)
            if config.tied:
                self.head.weight = self.embedding.weight
            if not on_meta:
                self._initialise()
        self._mamba_runs = MambaRuns()
        self.recompute: tuple[str, ...] = ()  # results that the backward pass makes again, see `layers.recompute`
        self.residual_dtype: torch.dtype | None = None  # of the residual stream; None is that of the embedding
        if device is not None and not on_meta:
            self.to(device)

    def layers(self) -> list[Layer]:
        """The layers in order, without their norms."""
        return [sublayer.layer for sublayer in self._stack()]

    def _stack(self) -> Iterator[Sublayer]:
        for sublayer in self.sublayers:
            assert isinstance(sublayer, Sublayer)
            yield sublayer

    @torch.no_grad()
    def _initialise(self) -> None:
        """One of the two regimes of the Samba code; what a layer calls `own_init` keeps the layer's values."""
        width, depth = self.config.d_model, len(self.sublayers)
        small = self.config.init == "small"
        deviation = math.sqrt(2 / (5 * width))
        self.embedding.weight.normal_(0, deviation if small else 0.02)
        if small and not self.config.tied:
            self.head.weight.normal_(0, deviation)
        for layer in self.layers():
            for name, parameter in layer.named_parameters():
                if name == layer.residual_output:
                    if small:
                        parameter.normal_(0, 2 / (depth * math.sqrt(width)))
                    else:
                        parameter.div_(math.sqrt(depth))
                elif small and name not in layer.own_init:
                    parameter.normal_(0, deviation)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: NetworkState | None = None,
        segments: Segments | None = None,
        targets: Int[Tensor, "B T"] | None = None,
        *,
        logits: LogitsOf | None = None,
        traced: bool = False,
    ) -> NetworkOutput:
        """Read a piece of text after `state`.

        Args:
            tokens: int64 `[B T]`, from 0 to V - 1; with segments packed `[1 T]`.
            state: a row per sequence; None is the empty state.
            segments: where sequences start in a packed batch.
            targets: int64 `[B T]`, -100 where no loss is wanted. With targets the losses are returned, computed without
                logits of `[B T V]`, and a new state only if one was given (training without a state commits nothing).
            logits: `all`, `last` (of each sequence, `[S V]`) or `none`; by default `all` without targets, else `none`.
            traced: return the layers' traces instead of a state, for `commit`.

        Raises:
            ValueError: if the shapes or `logits` do not fit, or `logits="last"` meets an empty sequence.
        """
        wanted = logits or ("all" if targets is None else "none")
        self._check(tokens, state, segments, targets, wanted)
        keep_state = state is not None or targets is None
        x = self.embedding(tokens)
        x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        every = targets is not None or wanted == "all"
        x, branch, states, traces = self._read(
            x, state, segments, "all" if every else wanted, keep_state and not traced, traced
        )
        scores, losses = self._results(x, branch, targets, wanted)
        return NetworkOutput(scores, losses, states, traces)

    def _read(
        self,
        x: Float[Tensor, "B T D"],
        state: NetworkState | None,
        segments: Segments | None,
        steps: LogitsOf,
        keep_state: bool,
        traced: bool,
    ) -> tuple[Tensor, Tensor | None, NetworkState | None, tuple[Trace, ...] | None]:
        """The sub-layers: -> (the stream and what the last of them adds to it, at these steps; states; traces)."""
        branch, states, traces = None, [], []
        runs, passed = self._runs(x, state, segments, traced), 0
        final = None if steps == "all" else self._final(x.shape[1])
        for index, sublayer in enumerate(self.sublayers):
            if index < passed:
                continue
            if state is not None and index in runs:
                stepped = runs[index].step(x, branch, state[index : index + len(runs[index])])
                if stepped is not None:
                    x, branch, passed = stepped[0], stepped[1], index + len(runs[index])
                    states.extend(stepped[2])
                    continue
            before = None if state is None else state[index]
            last = index == final and steps == "last" and unseen(sublayer, Sublayer)
            with forgetting(self.recompute):
                x, branch, after, trace = sublayer(x, branch, before, segments, keep_state, traced, last)
            if index == final:
                if steps == "none":
                    x, branch = x[:, :0], branch[:, :0]
                elif not last:
                    x, branch = last_steps(x, segments), last_steps(branch, segments)
                segments = None
            states.append(after)
            traces.append(trace)
        return x, branch, tuple(states) if keep_state else None, tuple(traces) if traced else None

    def _final(self, time: int) -> int | None:
        """The last sub-layer that reads every step: behind it only the steps whose logits are wanted go on.

        Behind it each step is read by itself, and nobody looks on who would miss the others.
        """
        if time < 2:
            return None
        final = len(self.sublayers) - 1
        for sublayer in reversed(list(self._stack())[1:]):
            if not (unseen(sublayer, Sublayer) and sublayer.layer.apart):
                break
            final -= 1
        return final

    def _results(
        self, x: Tensor, branch: Tensor | None, targets: Tensor | None, wanted: LogitsOf
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> (logits, losses), of what was asked for."""
        if wanted == "none" and targets is None:
            return None, None
        if wanted == "last":
            x, branch = x.flatten(0, 1), None if branch is None else branch.flatten(0, 1)
        x = self.norm(x) if branch is None else self.norm(x, branch)[0]
        losses = None if targets is None else linear_cross_entropy(x, self.head.weight, targets)
        if wanted == "none":
            return None, losses
        scores = self.head(x)
        return scores.float() if scores.element_size() < 4 else scores, losses

    def _runs(
        self, x: Tensor, state: NetworkState | None, segments: Segments | None, traced: bool
    ) -> Mapping[int, MambaRun]:
        """Mamba layers that one kernel may take together, by the index of the first: for a decoded token on a CPU."""
        if x.shape[1] != 1 or state is None or segments is not None or traced or not direct(x):
            return _NO_RUNS
        stack: list[Pair] = []
        for sublayer in self.sublayers:
            plain = type(sublayer) is Sublayer and not watched(sublayer)
            stack.append((sublayer._modules["norm"], sublayer._modules["layer"]) if plain else (None, None))
        return self._mamba_runs.of(stack)

    def _check(
        self,
        tokens: Tensor,
        state: NetworkState | None,
        segments: Segments | None,
        targets: Tensor | None,
        wanted: LogitsOf,
    ) -> None:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"network: tokens must be int64 [B T], got {tokens.dtype} {list(tokens.shape)}")
        if segments is not None:
            segments.check(tokens.shape[0], tokens.shape[1], "network")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"network: targets must be {list(tokens.shape)} like tokens, got {list(targets.shape)}")
        if state is not None and len(state) != len(self.sublayers):
            raise ValueError(f"network: state must have {len(self.sublayers)} layers, got {len(state)}")
        if wanted not in _LOGITS:
            raise ValueError(f"network: logits must be one of {', '.join(_LOGITS)}, got {wanted!r}")
        if wanted != "last":
            return
        if targets is not None:
            raise ValueError("network: logits='last' and targets exclude each other")
        if tokens.shape[1] == 0 and segments is None:
            raise ValueError("network: an empty piece has no last step; ask for logits='none'")
        if segments is not None and bool((segments.lengths == 0).any()):
            raise ValueError("network: an empty sequence has no last step; ask for logits='none' or leave it out")

    def commit(self, state: NetworkState | None, trace: Sequence[Trace], keep: Keep | None = None) -> NetworkState:
        """The state after a traced piece, or after its first `keep` steps (one number, or one per sequence). Pure."""
        before = state if state is not None else (None,) * len(self.sublayers)
        return tuple(
            layer.commit(part, piece, keep) for layer, part, piece in zip(self.layers(), before, trace, strict=True)
        )

    def commit_(self, state: NetworkState, trace: Sequence[Trace], keep: Keep | None = None) -> None:
        """`commit` into the tensors of `state` itself, bit for bit the same values; see `Layer.commit_`."""
        for layer, part, piece in zip(self.layers(), state, trace, strict=True):
            layer.commit_(part, piece, keep)

    def resized(self, state: NetworkState, capacity: int) -> NetworkState:
        """The state with room for exactly `capacity` steps in every buffer that grows; the rest is shared."""
        return tuple(layer.resized(part, capacity) for layer, part in zip(self.layers(), state, strict=True))

    def init_state(
        self, batch: int = 1, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NetworkState:
        """The empty state of `batch` sequences.

        By default activations have the dtype of the embedding: weights of layers may be stored in another.
        """
        dtype = dtype or self.embedding.weight.dtype
        return tuple(layer.init_state(batch, device=device, dtype=dtype) for layer in self.layers())

    def no_decay(self) -> dict[str, nn.Parameter]:
        """Parameters that weight decay leaves alone by the layers' own declaration, and every norm."""
        names: dict[str, nn.Parameter] = {f"norm.{name}": p for name, p in self.norm.named_parameters()}
        for index, sublayer in enumerate(self._stack()):
            prefix = f"sublayers.{index}"
            names |= {f"{prefix}.norm.{name}": p for name, p in sublayer.norm.named_parameters()}
            names |= {f"{prefix}.layer.{name}": p for name, p in sublayer.layer.named_no_decay()}
        return names


def allocate(network: Network, device: torch.device | str) -> None:
    """Give a network of the meta device memory, not written yet; what is tied stays tied.

    `Module.to_empty` does so by PyTorch's Python definitions, and importing these takes half a second.
    """
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(memory, parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            memory = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            module.register_buffer(name, memory, persistent=name not in module._non_persistent_buffers_set)
