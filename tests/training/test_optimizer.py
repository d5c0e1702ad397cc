"""Which parameters move how, and optimizers that are saved and loaded."""

import pytest
import torch

from milonga.training import OptimizerConfig, build_optimizer

from . import runs


@pytest.fixture
def network():
    return runs.RunConfig.parse(runs.settings("nowhere"), "test").model.build()


def _names(network, group):
    held = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in held}


def _step(network, optimizer, seed):
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    network(tokens, targets=tokens.roll(-1, 1)).losses.mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["declared", "all"])
def test_every_parameter_is_in_one_group(network, name, decay):
    optimizer = build_optimizer(network, OptimizerConfig(name=name, decay=decay))
    held = [id(parameter) for group in optimizer.groups() for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())


def test_layers_declare_what_does_not_decay(network):
    decayed, spared = build_optimizer(network, OptimizerConfig(weight_decay=0.3)).groups()
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = _names(network, spared)
    assert names == set(network.no_decay())
    assert {"norm.weight", "sublayers.0.norm.weight", "sublayers.0.layer.scan.A_log"} <= names
    assert "embedding.weight" in _names(network, decayed)


def test_decay_all_reproduces_the_papers(network):
    (group,) = build_optimizer(network, OptimizerConfig(decay="all")).groups()
    assert group["weight_decay"] == 0.1
    assert _names(network, group) == {name for name, _ in network.named_parameters()}


def test_muon_takes_the_matrices_of_the_stack(network):
    optimizer = build_optimizer(network, OptimizerConfig(name="muon", lr=0.01, muon_lr=0.04))
    adamw, muon = optimizer.parts
    names = {name for group in muon.param_groups for name in _names(network, group)}
    assert names == {
        f"sublayers.{place}.weight"
        for place in (
            *("0.layer.in_proj", "0.layer.x_proj", "0.layer.dt_proj", "0.layer.out_proj"),
            *("1.layer.qkv_proj", "1.layer.out_proj", "2.layer.gate_up", "2.layer.down"),
        )
    }
    optimizer.set_learning_rate(0.001)
    assert {group["lr"] for group in adamw.param_groups} == {0.001}
    assert {group["lr"] for group in muon.param_groups} == {0.004}


def test_a_no_decay_name_that_does_not_exist_is_an_error(network):
    layer = network.layers()[0]
    layer.no_decay = (*layer.no_decay, "scan.typo")
    with pytest.raises(AttributeError, match="typo"):
        build_optimizer(network, OptimizerConfig())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_and_loaded_it_goes_on_to_the_same_bits(network, name):
    config = OptimizerConfig(name=name, lr=0.01)
    first = build_optimizer(network, config)
    for seed in range(3):
        _step(network, first, seed)
    copy = network.config.build()
    copy.load_state_dict(network.state_dict())
    second = build_optimizer(copy, config)
    second.load_tensors({key: value.clone() for key, value in first.tensors().items()})
    for seed in range(3, 6):
        _step(network, first, seed)
        _step(copy, second, seed)
    for (key, one), other in zip(network.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(value, second.tensors()[key]) for key, value in first.tensors().items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_hooks_of_a_step_are_called_once_and_a_closure_too(network, name):
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # now the step of PyTorch's class has hooks of its own
    adamw = build_optimizer(network, OptimizerConfig(name=name)).parts[0]
    calls = []

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        return 3.0

    adamw.register_step_pre_hook(lambda *_: calls.append("before"))
    adamw.register_step_post_hook(lambda *_: calls.append("after"))
    before = network.embedding.weight.detach().clone()
    assert adamw.step(closure) == 3.0
    assert calls == ["before", "closure", "after"]
    assert not torch.equal(before, network.embedding.weight)


def test_parameters_without_gradients_stay(network):
    optimizer = build_optimizer(network, OptimizerConfig())
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
    network.norm.weight.grad = torch.ones_like(network.norm.weight)
    optimizer.step()
    assert {name.rpartition("/")[0] for name in optimizer.tensors()} == {"norm.weight"}


def test_moments_of_another_model_are_refused(network):
    optimizer = build_optimizer(network, OptimizerConfig())
    with pytest.raises(ValueError, match=r"other\.weight/exp_avg belongs to no parameter of this model"):
        optimizer.load_tensors({"other.weight/exp_avg": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"norm\.weight/exp_avg must be \[16\], got \[3\]"):
        optimizer.load_tensors({"norm.weight/exp_avg": torch.zeros(3)})
