"""Capturing work in a CUDA graph: what surrounds it. The capture itself is tested on a GPU."""

import gc
from contextlib import contextmanager

import pytest
import torch

from milonga.ops.gpu.capture import captured_into


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_stays_out_and_comes_back(monkeypatch: pytest.MonkeyPatch, collecting: bool) -> None:
    """Also where the capture fails; what nobody held before is gone by then."""
    seen = []

    @contextmanager
    def graph(into, stream):
        seen.append((into, stream, gc.isenabled()))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ValueError, match="in between"), captured_into("graph", "stream"):
            raise ValueError("in between")
        assert seen == [("graph", "stream", False)]
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
