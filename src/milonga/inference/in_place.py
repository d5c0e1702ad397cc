"""Sessions that write token by token in the static buffers of a captured decoder, one session at a time."""

import threading
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from milonga.inference.captured import Decoder
from milonga.models.network import Network, NetworkState

# Tokens of room that a state which grows is given beyond those it has read, when a session comes in.
ROOM = 1024


class Owner(Protocol):
    """A session: its state may stand here, and it takes it home when told to."""

    def settle(self) -> None: ...


class InPlace:
    """The buffers of one row, and the session whose state stands in them.

    A session that takes a step brings its state here; the state stays until the session is asked for it, or another one
    comes. Sessions of several threads take turns.
    """

    def __init__(self, network: Network):
        self.lock = threading.RLock()
        self._network = network
        self._decoder: Decoder | None = None
        self._owner: Owner | None = None

    def holds(self, session: Owner) -> bool:
        """Whether the state in the buffers is this session's."""
        return self._owner is session

    def step(
        self, session: Owner, token: int, position: int, state: NetworkState, logits: Tensor
    ) -> Float[Tensor, " V"]:
        """Read one token: -> the logits behind it.

        Args:
            session: whose text it is. If it is not its state that stands here, that of the other one is sent home, and
                `state` and `logits` are brought in.
            token: its id.
            position: tokens read before it.
            state, logits: of the session, where it holds them itself.
        """
        if self._owner is not session:
            if self._owner is not None:
                self._owner.settle()
            if self._decoder is None:
                self._decoder = Decoder(self._network, 1, capacity=position + ROOM)
            self._decoder.ensure(position + ROOM)
            self._decoder.load(0, state, logits)
            self._owner = session
        assert self._decoder is not None
        self._decoder.ensure(position + 1)
        with torch.inference_mode():
            self._decoder.tokens.fill_(token)
            self._decoder.step(1)
            return self._decoder.logits[0].clone()

    def take(self, position: int) -> NetworkState:
        """A copy of the state in the buffers, which has read `position` tokens; it is nobody's then."""
        assert self._decoder is not None
        with torch.inference_mode():
            state, _ = self._decoder.take(0, position)
        self._owner = None
        return state

    def leave(self) -> None:
        """The state in the buffers is nobody's."""
        self._owner = None


def last_ids(recent: np.ndarray, count: int) -> np.ndarray:
    """The last `count` of the ids that a mark remembers."""
    assert count <= len(recent)
    return recent[len(recent) - count :].astype(np.int64)
