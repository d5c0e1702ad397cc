"""Capturing work on a GPU in a CUDA graph."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def captured_into(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """What is launched within it goes into `graph`, on `stream` or one of PyTorch's choice.

    Python's collector stays out: it may come upon a graph that nobody holds any more, and destroying one is among the
    calls that make CUDA give up a capture under way.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream):
            yield
    finally:
        if collecting:
            gc.enable()
