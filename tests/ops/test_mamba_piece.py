"""A Mamba layer over a short piece: the definition is the layer, and what goes in is checked."""

import pytest
import torch

from milonga.layers import MambaConfig
from milonga.layers.norm import RMSNorm, norm_of
from milonga.ops.mamba_piece import ERROR_BOUND, has_piece_kernels, mamba_piece
from tests.ops.helpers import relative_rms


@pytest.mark.parametrize(("batch", "time"), [(1, 1), (2, 7)])
def test_the_definition_is_the_layer(batch: int, time: int) -> None:
    layer, norm = MambaConfig(d_state=3).build(8).double().eval(), RMSNorm(8).double()
    x = torch.randn(batch, time, 8).double()
    with torch.no_grad():
        _, state = layer(torch.randn(batch, 5, 8).double())
        expected, trace = layer.advance(norm(x), state)
        before = norm_of(norm)
        assert before is not None
        got, added = mamba_piece(x, before, layer._kernel_weights(), state.conv, state.ssm)
        piece, mine = layer.read_piece(x, state, norm)
    assert relative_rms(got, x + expected) <= ERROR_BOUND and relative_rms(piece, x + expected) <= ERROR_BOUND
    for part, other in zip(added, (trace.columns, trace.x, trace.dt, trace.B), strict=True):
        assert relative_rms(part, other) <= ERROR_BOUND
    assert torch.equal(mine.columns, trace.columns)


def test_a_trace_without_a_final_state_is_replayed() -> None:
    layer = MambaConfig(d_state=3).build(8).double().eval()
    with torch.no_grad():
        _, state = layer(torch.randn(2, 5, 8).double())
        _, trace = layer.advance(torch.randn(2, 4, 8).double(), state)
        for part, other in zip(layer.commit(state, trace._replace(final=None)), trace.final, strict=True):
            assert relative_rms(part, other) <= ERROR_BOUND


def test_bad_input_is_named() -> None:
    layer, norm = MambaConfig().build(8).eval(), norm_of(RMSNorm(8))
    assert norm is not None
    state = layer.init_state(2)
    with pytest.raises(ValueError, match=r"x must be \[B T 8\], contiguous, B and T from 1, got \[2, 8\]"):
        mamba_piece(torch.randn(2, 8), norm, layer._kernel_weights(), *state)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
        mamba_piece(torch.randn(2, 3, 8), norm, layer._kernel_weights(), *state, backend="triton")
    with pytest.raises(ValueError, match=r"B and T from 1, got \[2, 0, 8\]"):
        mamba_piece(torch.randn(2, 0, 8), norm, layer._kernel_weights(), *state)
    with pytest.raises(ValueError, match="ssm must be contiguous"):
        mamba_piece(torch.randn(2, 3, 8), norm, layer._kernel_weights(), state.conv, state.ssm.mT.contiguous().mT)
    with torch.no_grad():
        assert not has_piece_kernels(torch.randn(2, 3, 8))
