"""The gated MLP against its equation."""

import torch

from milonga.layers import SwiGLUConfig


def test_it_is_its_equation():
    layer = SwiGLUConfig(d_hidden=20).build(12).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    gate, up = layer.gate_up.weight.split(20)
    g = x @ gate.T
    expected = (g * torch.sigmoid(g) * (x @ up.T)) @ layer.down.weight.T
    y, state = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    assert tuple(state) == ()


def test_it_stands_in_for_a_mamba_layer():
    """With twice the model's width it has the 6 d^2 parameters of one (MLP2-SWA-MLP)."""
    assert SwiGLUConfig(d_hidden=2 * 48).parameter_count(48) == 6 * 48**2
