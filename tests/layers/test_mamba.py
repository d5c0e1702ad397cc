"""The Mamba layer against its equations, and the values it starts with."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from milonga.layers import Mamba, MambaConfig
from milonga.layers import mamba as mamba_module
from milonga.layers.linear import store_weights
from milonga.ops import mamba_step

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


@pytest.fixture
def steps(monkeypatch):
    """How many steps the kernel for decoding has taken."""
    taken = []

    def counted(x, *arguments):
        taken.append(x.shape[0])
        return mamba_step.mamba_step(x, *arguments)

    monkeypatch.setattr(mamba_module, "mamba_step", counted)
    return taken


def difference(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("config", [MambaConfig(), MambaConfig(d_state=3, d_conv=1, expand=1, dt_rank=2)])
@pytest.mark.parametrize("storage", [None, "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_read_step_by_step_is_the_text_read_at_once(steps, config, storage, rows):
    layer = config.build(D)
    if storage:
        store_weights(layer, storage)
    layer.eval()
    x = torch.randn(rows, 40, D)
    with torch.inference_mode():
        state = layer.init_state(rows)
        outputs, traces = [], []
        for t in range(40):
            before = [tensor.clone() for tensor in state]
            y, trace = layer.advance(x[:, t : t + 1], state)
            assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))  # read and not written
            state = layer.commit(state, trace)
            outputs.append(y)
            traces.append(trace)
        assert steps == [rows] * 40
        whole, trace = layer.advance(x, layer.init_state(rows))
        assert len(steps) == 40
        assert difference(torch.cat(outputs, 1), whole) <= 2e-6
        for part, whole_part in zip(state, layer.commit(None, trace), strict=True):
            assert part.numel() == 0 or difference(part, whole_part) <= 2e-6
        for name in ("columns", "x", "dt", "B"):
            joined = torch.cat([getattr(one, name) for one in traces], 1)
            assert difference(joined, getattr(trace, name)) <= 2e-6
        assert torch.equal(layer.commit(state, traces[-1], 0).ssm, state.ssm)
        replayed = layer.commit(state, layer.advance(x[:, :1], state)[1], 1)
        assert difference(replayed.ssm, layer(x[:, :1], state)[1].ssm) <= 2e-7


def test_steps_follow_the_weights(steps):
    """Written in place, moved, replaced, stored otherwise, copied: the next step is that of the weights there."""
    layer = MambaConfig().build(D).eval()
    x = torch.randn(1, 1, D)

    def check(layer):
        count = len(steps)
        with torch.inference_mode():
            state = layer.init_state(1)
            state.ssm.copy_(torch.randn(state.ssm.shape))
            state.conv.copy_(torch.randn(state.conv.shape))
            got, after = layer(x, state)
            assert len(steps) == count + 1
            both = layer(torch.cat([x, x], 1), state)[0][:, :1]  # two tokens at once: not by the kernel of a step
        assert difference(got, both) <= 2e-6
        assert after.ssm.data_ptr() != state.ssm.data_ptr()

    check(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.1)
            check(layer)
    layer.conv_weight.data = layer.conv_weight.data * 2
    check(layer)
    layer.in_proj.weight = torch.nn.Parameter(layer.in_proj.weight.detach() * 2)
    check(layer)
    layer.load_state_dict({name: value * 0.9 for name, value in layer.state_dict().items()}, assign=True)
    check(layer)
    check(layer.double().float())
    check(copy.deepcopy(layer))
    check(pickle.loads(pickle.dumps(layer)))
    store_weights(layer, "int8")
    check(layer)
    layer.train()
    fused = torch.optim.AdamW([layer.scan.A_log, layer.conv_weight], lr=0.1, fused=True)
    state = layer.init_state(1)
    layer(x, state)[0].sum().backward()
    fused.step()
    check(layer.eval())


def test_when_a_step_is_not_for_the_kernel(steps):
    layer = MambaConfig().build(D).eval()
    x = torch.randn(1, 1, D)
    y, _ = layer(x, layer.init_state(1))
    assert y.requires_grad
    with torch.no_grad():
        layer(x)
        layer(torch.randn(8, 1, D), layer.init_state(8))
        layer.double()(x.double(), layer.init_state(1))
        layer.float()
        seen = []
        hook = layer.x_proj.register_forward_hook(lambda *_: seen.append(1))
        layer(x, layer.init_state(1))
        assert seen == [1]
        hook.remove()
        layer.train()(x, layer.init_state(1))
        layer.eval().in_proj.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x, layer.init_state(1))
    assert steps == []
    with torch.no_grad():
        layer.float()(x, layer.init_state(1))
    assert steps == [1]


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_written_behind_autograd_count_after_eval(steps: int) -> None:
    """`.data` is written without a trace: what decoding keeps of the weights is dropped by `eval`."""
    layer, x = Mamba(16, MambaConfig(d_state=4)).eval(), torch.randn(1, steps, 16)
    with torch.no_grad():
        before, _ = layer(x, layer.init_state(1))
        other = Mamba(16, MambaConfig(d_state=4))
        for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
            mine.data.copy_(its.data * 1.5)
        layer.eval()
        after, _ = layer(x, layer.init_state(1))
    layer.train()
    expected, _ = layer(x, layer.init_state(1))
    torch.testing.assert_close(after, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)


def test_a_layer_made_in_inference_mode_decodes() -> None:
    with torch.inference_mode():
        layer = Mamba(16, MambaConfig(d_state=4)).eval()
        for steps in (1, 4, 1):
            y, _ = layer(torch.randn(1, steps, 16), layer.init_state(1))
            assert y.isfinite().all()
