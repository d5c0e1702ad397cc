"""The Mamba layer against its equations, and the values it starts with."""

import math

import pytest
import torch
from torch.nn import functional as F

from milonga.layers import MambaConfig

D = 24


def by_the_equations(layer, x):
    """Samba section 2.1.1, one step at a time, in the dtype of the layer: `[B T D]` -> `[B T D]`."""
    inner, width = layer.inner, layer.config.d_conv
    rank, states, _ = layer.split_sizes
    u, gate = (x @ layer.in_proj.weight.T).split(inner, -1)
    u = F.conv1d(
        F.pad(u.transpose(1, 2), (width - 1, 0)), layer.conv_weight[:, None], layer.conv_bias, groups=inner
    ).transpose(1, 2)
    u = u * torch.sigmoid(u)
    dt, b, c = (u @ layer.x_proj.weight.T).split((rank, states, states), -1)
    dt = torch.log1p(torch.exp(dt @ layer.dt_proj.weight.T + layer.scan.dt_bias))
    z, outputs = x.new_zeros(x.shape[0], inner, states), []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t, :, None] * torch.exp(layer.scan.A_log))
        z = decay * z + dt[:, t, :, None] * b[:, t, None, :] * u[:, t, :, None]
        outputs.append((z * c[:, t, None, :]).sum(-1) + layer.scan.D * u[:, t])
    return (torch.stack(outputs, 1) * gate * torch.sigmoid(gate)) @ layer.out_proj.weight.T


@pytest.mark.parametrize("config", [MambaConfig(), MambaConfig(d_state=3, d_conv=2, expand=3, dt_rank=5)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_it_is_its_equations(config, dtype, bound):
    layer = config.build(D).to(dtype)
    x = torch.randn(2, 19, D, dtype=dtype)
    with torch.no_grad():
        y, expected = layer(x)[0], by_the_equations(layer.double(), x.double())
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) <= bound


def test_what_it_starts_with():
    layer = MambaConfig().build(512)
    scan, rank = layer.scan, layer.split_sizes[0]
    assert rank == 32
    assert torch.equal(scan.A_log, torch.arange(1.0, 17.0).log().expand(1024, 16))
    assert torch.equal(scan.D, torch.ones(1024))
    dt = F.softplus(scan.dt_bias.detach())
    assert float(dt.min()) >= 1e-3 * 0.999 and float(dt.max()) <= 0.1 * 1.001
    # uniform in its logarithm: mean and spread of U(log 0.001, log 0.1)
    low, high = math.log(1e-3), math.log(0.1)
    assert abs(float(dt.log().mean()) - (low + high) / 2) < 0.15
    assert abs(float(dt.log().std()) - (high - low) / math.sqrt(12)) < 0.1
    for weight, bound in (
        (layer.dt_proj.weight, rank**-0.5),
        (layer.conv_weight, 0.5),
        (layer.conv_bias, 0.5),
        (layer.in_proj.weight, 512**-0.5),
        (layer.x_proj.weight, 1024**-0.5),
        (layer.out_proj.weight, 1024**-0.5),
    ):
        assert float(weight.detach().abs().max()) <= bound
        assert abs(float(weight.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.05


def test_steps_shorter_than_the_floor_are_lifted():
    layer = MambaConfig(dt_min=1e-6, dt_max=1e-5, dt_floor=1e-4).build(D)
    assert torch.allclose(F.softplus(layer.scan.dt_bias.double()), torch.tensor(1e-4, dtype=torch.float64), rtol=1e-4)


def test_a_rank_that_does_not_divide_is_rounded_up():
    assert MambaConfig().rank(1328) == 83
    assert MambaConfig().rank(1000) == 63
