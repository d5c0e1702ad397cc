"""Capturing work on a GPU in a CUDA graph."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def captured_into(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None, *, collect: bool = True
) -> Iterator[None]:
    """What is launched within it goes into `graph`, on `stream` or one of PyTorch's choice.

    With `collect` what nobody holds is collected before, and its memory given back: the graph gets memory of its own,
    and an autograd graph still alive would make a new one wait for another stream. Then Python's collector stays out:
    it may come upon a graph that nobody holds any more, and destroying one is among the calls that make CUDA give up a
    capture. A capture that fails leaves the current stream as it was, which PyTorch's own does not.
    """
    if collect:
        gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            yield
    finally:
        if collecting:
            gc.enable()
