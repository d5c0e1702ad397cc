"""What speculative decoding needs of a network: read a piece without moving, move by part of it, take one step."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from milonga.layers.base import Trace
from milonga.models.network import Network, NetworkState


class Runner(Protocol):
    """Runs one network on states of B rows. Calls come under `torch.inference_mode`.

    An implementation may keep buffers of its own (`milonga.inference.captured.CapturedRunner` does): logits and traces
    live until the next verification, and a state that `commit` returned until the commit after the next, which may
    follow the same verification. It pads `tokens` as it likes, as long as the first T logits of every row are those of
    the T tokens.
    """

    def ensure(self, capacity: int) -> None:
        """Make room for `capacity` tokens a row, where states grow with the text and buffers have to be made for them.

        Called before a verification, with the most tokens that a row will have read by the next call. States that were
        returned before stay what they are; the trace of the last verification does not serve any more.
        """
        ...

    def verify(
        self, tokens: Int[Tensor, "B T"], state: NetworkState
    ) -> tuple[Float[Tensor, "B P V"], tuple[Trace, ...]]:
        """Read T tokens of every row: -> (logits behind each, P >= T; the trace for `commit`). The state stays."""
        ...

    def commit(self, state: NetworkState, trace: tuple[Trace, ...], keep: Sequence[int]) -> NetworkState:
        """The state after the first `keep[b]` tokens of row b of the last verification. The old state stays."""
        ...

    def step(self, tokens: Int[Tensor, "B 1"], state: NetworkState) -> tuple[Float[Tensor, "B V"], NetworkState]:
        """Read one token of every row: -> (logits behind it, the next state). The caller gives the old state up."""
        ...


class NetworkRunner:
    """The plain `Runner`: calls the network."""

    def __init__(self, network: Network):
        self._network, self._length = network, 0

    def ensure(self, capacity: int) -> None:
        """As `Runner.ensure`: nothing to do, states are values."""

    def verify(
        self, tokens: Int[Tensor, "B T"], state: NetworkState
    ) -> tuple[Float[Tensor, "B P V"], tuple[Trace, ...]]:
        """As `Runner.verify`."""
        output = self._network(tokens, state, logits="all", traced=True)
        assert output.logits is not None and output.trace is not None
        self._length = tokens.shape[1]
        return output.logits, output.trace

    def commit(self, state: NetworkState, trace: tuple[Trace, ...], keep: Sequence[int]) -> NetworkState:
        """As `Runner.commit`."""
        if min(keep) == self._length:  # all of it, which costs less
            return self._network.commit(state, trace)
        return self._network.commit(state, trace, torch.tensor(keep, dtype=torch.int64))

    def step(self, tokens: Int[Tensor, "B 1"], state: NetworkState) -> tuple[Float[Tensor, "B V"], NetworkState]:
        """As `Runner.step`."""
        output = self._network(tokens, state, logits="last")
        assert output.logits is not None and output.state is not None
        return output.logits, output.state
