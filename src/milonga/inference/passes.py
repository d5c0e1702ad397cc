"""A network over few steps of few rows: the passes that are captured, on kernels of their own where a GPU has them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from milonga.layers.base import Trace
from milonga.layers.norm import norm_of
from milonga.models.network import Network, NetworkState, Sublayer
from milonga.ops.decode_step import has_step_kernels, linear_step
from milonga.ops.mamba_piece import MOST_ROWS


def decode_step(network: Network, tokens: Int[Tensor, "B 1"], state: NetworkState) -> Float[Tensor, "B V"]:
    """One token of every row, the state advanced in place: -> logits of the next, fp32 at least."""
    x = network.embedding(tokens)
    for sublayer, part in zip(network.sublayers, state, strict=True):
        assert isinstance(sublayer, Sublayer)
        x = sublayer.layer.step_(x, part, sublayer.norm)
    return _scores(network, x)[:, 0]


def read_piece(
    network: Network, tokens: Int[Tensor, "B T"], state: NetworkState
) -> tuple[Float[Tensor, "B T V"], tuple[Trace, ...]]:
    """A short piece of every row, the state left alone: -> (logits behind each token, fp32 at least; the trace)."""
    x, traces = network.embedding(tokens), []
    for sublayer, part in zip(network.sublayers, state, strict=True):
        assert isinstance(sublayer, Sublayer)
        x, trace = sublayer.layer.read_piece(x, part, sublayer.norm)
        traces.append(trace)
    return _scores(network, x), tuple(traces)


def commit_side_by_side(
    network: Network,
    state: NetworkState,
    trace: Sequence[Trace],
    keep: Int[Tensor, " B"],
    streams: Sequence[torch.cuda.Stream],
) -> None:
    """`network.commit_`, the layers divided among some streams: their commits are short and do not need each other.

    On a CPU there are no streams, and they follow each other.
    """
    if not streams:
        network.commit_(state, trace, keep)
        return
    here = torch.cuda.current_stream(keep.device)
    for stream in streams:
        stream.wait_stream(here)
    for number, (layer, part, piece) in enumerate(zip(network.layers(), state, trace, strict=True)):
        with torch.cuda.stream(streams[number % len(streams)]):
            layer.commit_(part, piece, keep)
    for stream in streams:
        here.wait_stream(stream)


def _scores(network: Network, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
    norm = norm_of(network.norm, network.head)
    if norm is not None and (x.shape[1] == 1 or x.shape[0] * x.shape[1] <= MOST_ROWS) and has_step_kernels(x):
        rows = linear_step(x.flatten(0, 1), network.head.weight, norm=norm, dtype=torch.float32)
        return rows.view(*x.shape[:2], -1)
    logits = network.head(network.norm(x))
    return logits.float() if logits.element_size() < 4 else logits
