"""Timing on a GPU: the device's part alone."""

import time

import pytest
import torch

from milonga.bench.timing import Timing, measure

pytestmark = pytest.mark.gpu


def test_a_slow_host_is_not_measured() -> None:
    """A call whose host needs longer than it did while it was warmed is timed behind more work."""
    device = torch.device("cuda")
    x = torch.zeros(1 << 20, device=device)
    calls = 0

    def call() -> object:
        nonlocal calls
        calls += 1
        if calls > 4:
            time.sleep(1.5e-3)
        return x.add_(1)

    timing = measure({"add": call}, device, budget=0.02, least=8)["add"]
    assert isinstance(timing, Timing)
    assert timing.host < 1e-3, "it was quick while it was warmed"
    assert timing.median < 1e-3
