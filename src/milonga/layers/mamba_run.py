"""Mamba layers that follow each other in a network: on a CPU a decoded token goes through all of them in one kernel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from milonga.layers.mamba import Mamba, MambaState
from milonga.layers.norm import RMSNorm
from milonga.ops.mamba_step import has_step, join_steps, mamba_steps
from milonga.state import State

if TYPE_CHECKING:
    from milonga.ops.mamba_step.cpu import PreparedWeights

Pair = tuple[nn.Module | None, nn.Module | None]


class MambaRun:
    """Mamba layers one behind the other, one or more, an RMS norm before each.

    Args:
        pairs: norm and layer of each.
    """

    def __init__(self, pairs: Sequence[tuple[RMSNorm, Mamba]]):
        self._pairs = tuple(pairs)
        self._key: list[float] = []
        self._held: list["PreparedWeights"] = []  # whose identities the key names
        self._joined: "PreparedWeights | None" = None

    def __len__(self) -> int:
        return len(self._pairs)

    def step(
        self, x: Float[Tensor, "B 1 D"], branch: Float[Tensor, "B 1 D"] | None, states: Sequence[State]
    ) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B 1 D"], list[MambaState]] | None:
        """`x = x + branch; branch = layer(norm(x))` for each: -> (x, branch, the next states).

        None where the kernel does not run: on another device, in another precision, with gradients, in training, or
        where somebody looks on by a hook.
        """
        if not has_step(x) or (branch is not None and branch.dtype != torch.float32):
            return None
        convs, ssms = zip(*states, strict=True)
        if not all(tensor.dtype == torch.float32 and tensor.device == x.device for tensor in (*convs, *ssms)):
            return None
        layers = self._prepared()
        if layers is None:
            return None
        added = None if branch is None else branch[:, 0]
        x, branch, convs, ssms = mamba_steps(x[:, 0], added, layers, convs, ssms)
        return x[:, None], branch[:, None], list(map(MambaState, convs, ssms))

    def _prepared(self) -> "PreparedWeights | None":
        """The layers as the kernel takes them, made again when one of them or a norm has changed its place."""
        key: list[float] = []
        held, norms = [], []
        for norm, layer in self._pairs:
            prepared = None if watched(norm) or watched(layer) else layer.prepared()
            if prepared is None:
                self._key, self._held, self._joined = [], [], None
                return None
            weight = norm._parameters["weight"]
            assert weight is not None
            key += (id(prepared), weight.data_ptr(), norm.eps)
            held.append(prepared)
            norms.append((weight.detach(), norm.eps))
        if key != self._key:
            self._key, self._held, self._joined = key, held, join_steps(held, norms)
        return self._joined


class MambaRuns:
    """Where in a stack of norms and layers Mamba layers follow each other: found once for a stack."""

    def __init__(self) -> None:
        self._stack: list[Pair] = []
        self._runs: dict[int, MambaRun] = {}

    def __reduce__(self) -> tuple[type["MambaRuns"], tuple[()]]:
        return MambaRuns, ()  # a copy of the network has layers of its own

    def of(self, stack: list[Pair]) -> dict[int, MambaRun]:
        """The runs, by the index at which they begin."""
        if stack != self._stack:
            self._stack, self._runs = stack, {}
            first, pairs = 0, list[tuple[RMSNorm, Mamba]]()
            for index, (norm, layer) in enumerate([*stack, (None, None)]):
                if isinstance(norm, RMSNorm) and type(layer) is Mamba:
                    first = first if pairs else index
                    pairs.append((norm, layer))
                    continue
                if pairs:
                    self._runs[first] = MambaRun(pairs)
                pairs = []
        return self._runs


def watched(module: nn.Module) -> bool:
    """Whether a hook is to see every call of the module."""
    return bool(module._forward_hooks) or bool(module._forward_pre_hooks)
