"""Boundaries of packed sequences, and what they refuse."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from milonga.segments import Segments, sequence_bounds, sequence_count


def test_offsets_lengths_and_counts():
    segments = Segments([0, 3, 3, 7])
    assert (segments.count, segments.total) == (3, 7)
    assert segments.offsets.dtype == torch.int64
    assert segments.lengths.tolist() == [3, 0, 4]
    assert Segments.from_lengths([3, 0, 4]).offsets.tolist() == [0, 3, 3, 7]
    assert Segments.from_lengths([]).count == 0
    assert segments.on(torch.device("cpu")) is segments.offsets
    assert repr(segments) == "Segments([0, 3, 3, 7])"
    assert repr(Segments(range(20))) == "Segments(S=19, T=19)"


@pytest.mark.parametrize(
    ("offsets", "words"),
    [([], "list of integers"), ([1, 2], "start at 0"), ([0, 3, 2], "never decrease"), ([0.0, 2.0], "integers")],
)
def test_what_are_no_offsets(offsets, words):
    with pytest.raises(ValueError, match=words):
        Segments(torch.tensor(offsets) if offsets and isinstance(offsets[0], float) else offsets)


def test_a_batch_that_they_do_not_cover():
    segments = Segments([0, 2, 5])
    segments.check(1, 5)
    with pytest.raises(ValueError, match=r"network: .*\[1, T\], got 2 rows"):
        segments.check(2, 5, "network")
    with pytest.raises(ValueError, match="offsets to end at 6, got 5"):
        segments.check(1, 6)


def test_without_segments_each_row_is_a_sequence():
    assert sequence_bounds(3, 4, None).tolist() == [0, 4, 8, 12]
    assert sequence_bounds(3, 0, None).tolist() == [0, 0, 0, 0]
    segments = Segments([0, 2, 4])
    assert sequence_bounds(1, 4, segments) is segments.offsets
    assert (sequence_count(3, None), sequence_count(1, segments)) == (3, 2)


def test_bounds_asked_for_while_tracing_are_not_remembered():
    """What was made under a fake mode, or on another default device, must not reach a kernel later."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        sequence_bounds(2, 1009, None)
    with torch.device("meta"):
        sequence_bounds(2, 1013, None)
    for time in (1009, 1013):
        bounds = sequence_bounds(2, time, None)
        assert type(bounds) is torch.Tensor
        assert bounds.device.type == "cpu"
        assert bounds.numpy().tolist() == [0, time, 2 * time]
