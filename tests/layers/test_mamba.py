"""The Mamba layer against its equations, and the values it starts with."""

import copy
import math
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from milonga.layers import Mamba, MambaConfig
from milonga.layers import mamba as mamba_module
from milonga.layers.linear import store_weights
from milonga.layers.recompute import CHEAP, forgetting
from milonga.ops import mamba_step
from milonga.ops.selective_scan import cpu as selective_scan_cpu
from milonga.segments import Segments

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


def both_ways(layer, x, precision, state=None, segments=None, names=("conv", "scan"), keep=None):
    """Values and gradients with everything kept, and with `names` forgotten: -> two lists of each."""
    leaves = [x, *layer.parameters(), *(state or ())]
    values, gradients = [], []
    for forgotten in ((), names):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), forgetting(forgotten):
            y, trace = layer.advance(x, state, segments)
            after = layer.commit(state, trace, keep)
        values.append([y, *after, trace.dt, trace.B])
        loss = y.float().square().sum() + after.ssm.square().sum() + after.conv.float().square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    return values, gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("names", [("scan",), CHEAP])
@pytest.mark.parametrize("case", ["text", "state", "packed", "replay", "empty"])
def test_the_scan_made_again_changes_no_value_and_gradients_by_rounding(precision, names, case):
    torch.manual_seed(0)
    layer = MambaConfig(d_state=3, dt_rank=5, expand=3).build(D)  # 72 channels: no multiple of 16
    segments = Segments.from_lengths([9, 0, 32, 26]) if case == "packed" else None
    shape = (1, 67, D) if case == "packed" else (3, 0 if case == "empty" else 67, D)
    x = torch.randn(shape, requires_grad=True)
    state = None
    if case != "text":
        rows = 4 if case == "packed" else 3
        conv = torch.randn(rows, 3, layer.inner, requires_grad=True)
        state = mamba_module.MambaState(conv, torch.randn(rows, layer.inner, 3, requires_grad=True))
    keep = 20 if case == "replay" else None
    values, gradients = both_ways(layer, x, precision, state, segments, names, keep)
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    bound = 1e-6 if precision == "fp32" else 2.0**-7
    for usual, other in zip(*gradients, strict=True):
        assert float((usual - other).norm()) <= bound * float(usual.norm())


@pytest.mark.parametrize(("names", "kept"), [(("scan",), {"u"}), (("conv", "scan"), set()), (("conv",), {"dt", "y"})])
def test_what_is_made_again_is_not_held(names, kept, monkeypatch):
    """Of the convolution's output u, dt and the scan's output y."""
    layer, found = MambaConfig().build(D), {}
    scan = selective_scan_cpu.forward

    def watched(x, dt, *arguments):
        y, final, checkpoints = scan(x, dt, *arguments)
        for name, tensor in (("u", x), ("dt", dt), ("y", y)):
            found[name] = StorageWeakRef(tensor.untyped_storage())
        return y, final, checkpoints

    monkeypatch.setattr(selective_scan_cpu, "forward", watched)
    with forgetting(names):
        out = layer.advance(torch.randn(2, 40, D, requires_grad=True), None)[0]
    assert {name for name, weak in found.items() if not weak.expired()} == kept
    out.sum().backward()


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "parametrization", "other"])
def test_a_projection_that_is_more_than_a_product_is_called(name, kind):
    torch.manual_seed(0)
    layer, calls = MambaConfig().build(D), []
    module = layer.get_submodule(name)
    if kind == "forward":
        module.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "pre":
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    elif kind == "backward":
        module.register_full_backward_hook(lambda *_: calls.append(1))
    elif kind == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(module)
    else:
        layer.set_submodule(name, torch.nn.Sequential(module))
    x = torch.randn(2, 12, D, requires_grad=True)
    _, gradients = both_ways(layer, x, "fp32")
    assert len(calls) == (2 if kind in ("forward", "pre", "backward") else 0)
    for usual, other in zip(*gradients, strict=True):
        if name == "in_proj":  # what comes behind it may still be one node
            assert float((usual - other).norm()) <= 1e-6 * float(usual.norm())
        else:
            assert torch.equal(usual, other), "the same ops"


def test_a_hook_on_all_modules_sees_the_projections_of_a_step():
    layer, seen = MambaConfig().build(D), []
    with torch.inference_mode():
        x, state = torch.randn(2, 1, D), layer.init_state(2)
        expected, _ = layer(x, state)
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            got, _ = layer(x, state)
        finally:
            handle.remove()
    assert {layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj} <= set(seen)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_hook_on_all_modules_sees_the_projections():
    layer, seen = MambaConfig().build(D), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with forgetting(["scan"]):
            layer(torch.randn(2, 12, D, requires_grad=True))
    finally:
        handle.remove()
    assert {layer.x_proj, layer.dt_proj, layer.out_proj} <= set(seen)
