"""Mamba layers that follow each other take a decoded token together, in whole networks."""

import copy

import pytest
import torch

from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig, mamba_run
from milonga.layers.linear import store_weights
from milonga.models import ModelConfig
from milonga.models.network import Network
from milonga.ops.mamba_step import mamba_steps
from milonga.state import named_tensors

WIDTH = 24
LAYERS = {"mamba": MambaConfig(), "swa": AttentionConfig(heads=2, window=4), "mlp": SwiGLUConfig(d_hidden=40)}


@pytest.fixture
def runs(monkeypatch):
    """How many layers each call of the kernel took."""
    taken = []

    def counted(x, branch, layers, *states):
        taken.append(len(layers.table))
        return mamba_steps(x, branch, layers, *states)

    monkeypatch.setattr(mamba_run, "mamba_steps", counted)
    return taken


def network(pattern, **settings) -> Network:
    layers = {name: LAYERS[name] for name in set(pattern.split())}
    config = ModelConfig(vocab_size=50, d_model=WIDTH, pattern=pattern, repeats=2, layers=layers, **settings)
    return config.build().eval()


def bytewise(net, tokens):
    """Logits and state of a text read token by token, and whether every state was left as it was."""
    state, logits = net.init_state(tokens.shape[0]), []
    for t in range(tokens.shape[1]):
        before = [(tensor, tensor.clone()) for _, tensor in named_tensors(state)]
        output = net(tokens[:, t : t + 1], state, logits="last")
        assert all(torch.equal(tensor, copied) for tensor, copied in before)
        logits.append(output.logits)
        state = output.state
    return torch.stack(logits, 1), state


def check(net, rows=1, length=12):
    """Token by token as at once, within the bound of the split law."""
    tokens = torch.randint(0, 50, (rows, length))
    with torch.inference_mode():
        logits, state = bytewise(net, tokens)
        whole = net(tokens, net.init_state(rows))
        pairs = [(logits, whole.logits)]
        pairs += [(a, b) for (_, a), (_, b) in zip(named_tensors(state), named_tensors(whole.state), strict=True)]
        for value, expected in pairs:
            if value.is_floating_point():
                assert float((value - expected).norm()) <= 2e-6 * float(expected.norm()) + 1e-12
            else:
                assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mamba", [2]),
        ("mamba mamba mlp", [2, 2]),
        ("mlp mamba", [1, 1]),
        ("mamba mlp swa mlp", [1, 1]),
        ("swa mamba mamba mamba", [3, 3]),
    ],
)
@pytest.mark.parametrize("storage", [None, "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_text_token_by_token_is_the_text_at_once(runs, pattern, expected, storage, rows):
    net = network(pattern)
    if storage:
        store_weights(net, storage)
    check(net, rows)
    assert runs == expected * 12


def test_where_the_layers_step_alone(runs):
    net = network("mamba", norm="layer_norm")
    check(net)
    assert runs == []
    net = network("mamba")
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    net(tokens, net.init_state(1))  # gradients
    with torch.no_grad():
        net(tokens)  # without a state
        net(tokens, net.init_state(1), traced=True)
        net(tokens.expand(8, 1), net.init_state(8))
        net.train()(tokens, net.init_state(1))
        net.eval()
        for module in (net.sublayers[1], net.sublayers[1].norm, net.sublayers[1].layer, net.sublayers[1].layer.x_proj):
            seen = []
            watching = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            net(tokens, net.init_state(1))
            watching.remove()
            # A layer is called by `advance`, which no hook sees; its parts and its sub-layer are called as modules.
            assert seen == ([1] if module is not net.sublayers[1].layer else [])
        assert runs == [1]  # beside the sub-layer that is watched the other one goes on
        net.double()(tokens, net.init_state(1))
        net.float()
        runs.clear()
        net(tokens, net.init_state(1))
    assert runs == [2]


def test_runs_follow_the_network(runs):
    """Weights written, moved and stored otherwise, layers and norms replaced, the network copied."""
    net = network("mamba mamba")
    check(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.05)
        check(net)
    net.sublayers[2].norm.weight.data = torch.rand(WIDTH)
    check(net)
    net.sublayers[1].norm.eps = 0.5
    check(net)
    net.sublayers[3].layer = copy.deepcopy(net.sublayers[0].layer)
    check(net)
    net.sublayers[0].layer.out_proj.weight = torch.nn.Parameter(torch.randn(WIDTH, 2 * WIDTH))
    check(net)
    check(copy.deepcopy(net))
    store_weights(net, "int8")
    check(net)
    assert set(runs) == {4}
    runs.clear()
    net.sublayers[1].layer = MambaConfig(d_state=3).build(WIDTH).eval()
    check(net)  # of other sizes and another storage: not in one kernel, and right all the same
    assert runs == []


def test_states_behind_a_token_are_kept_apart(runs):
    """A state behind a token stays what it was when the text goes on."""
    net = network("mamba")
    with torch.inference_mode():
        first = net(torch.zeros(1, 1, dtype=torch.int64), net.init_state(1)).state
        before = [tensor.clone() for _, tensor in named_tensors(first)]
        second = net(torch.ones(1, 1, dtype=torch.int64), first).state
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, named_tensors(first), strict=True))
    old = {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(first)}
    assert not old & {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(second)}
    assert runs == [2, 2]
