"""The Triton kernels of a short Mamba piece under Triton's interpreter, on CPU tensors, against the float64 definition.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import pytest
import torch

from milonga.ops.mamba_piece import ERROR_BOUND, triton
from milonga.ops.mamba_piece.reference import mamba_piece_reference
from tests.ops.helpers import relative_rms
from tests.ops.interpreted_decode_step import norm_of, weights_of, wide
from tests.ops.interpreter import prepare

prepare()


@pytest.mark.parametrize(
    ("batch", "time", "width", "inner", "rank", "states", "taps", "centred"),
    [
        (1, 8, 24, 48, 2, 16, 4, True),
        (3, 5, 40, 80, 5, 3, 1, False),
        (2, 1, 16, 32, 1, 4, 2, True),
        (1, 17, 32, 272, 33, 8, 8, False),
    ],
)
def test_mamba(batch: int, time: int, width: int, inner: int, rank: int, states: int, taps: int, centred: bool) -> None:
    x, norm, weights = (
        torch.randn(batch, time, width),
        norm_of(width, centred),
        weights_of(width, inner, rank, states, taps),
    )
    conv, ssm = torch.randn(batch, taps - 1, inner), torch.randn(batch, inner, states)
    before = conv.clone(), ssm.clone()
    got, added = triton.mamba_piece(x, norm, weights, conv, ssm)
    expected, truth = mamba_piece_reference(wide(x), wide(norm), wide(weights), wide(conv), wide(ssm))
    assert relative_rms(got, expected) <= ERROR_BOUND
    for mine, other in zip(added, truth, strict=True):
        assert relative_rms(mine, other) <= ERROR_BOUND
    assert torch.equal(conv, before[0]) and torch.equal(ssm, before[1])
