"""The kernels of captured passes stand for layers that are what they were built as, and for no others.

Here "as on a GPU" is the choice alone: the kernels are asked for, and run by their definitions.
"""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from milonga.inference import passes
from milonga.layers import attention, mamba, swiglu
from milonga.layers.linear import StoredLinear
from milonga.state import clone
from tests.inference.helpers import SAMBA
from tests.ops.helpers import relative_rms

# what each module is looked for in, and the kernels that take its weights
PLACES = {
    "sublayers.0.layer.in_proj": "mamba",
    "sublayers.0.layer.x_proj": "mamba",
    "sublayers.0.layer.dt_proj": "mamba",
    "sublayers.0.layer.out_proj": "mamba",
    "sublayers.0.norm": "mamba",
    "sublayers.1.layer.gate_up": "swiglu",
    "sublayers.1.layer.down": "swiglu",
    "sublayers.2.layer.qkv_proj": "attention",
    "sublayers.2.layer.out_proj": "attention",
    "norm": "passes",
    "head": "passes",
}
ALL = {"mamba": 2, "swiglu": 4, "attention": 4, "passes": 1}  # launches of a pass, two of each in attention
PASSES = {
    "step": lambda *given: passes.decode_step(*given)[:, None],
    "piece": lambda *given: passes.read_piece(*given)[0],
}
every_pass = pytest.mark.parametrize("name", list(PASSES))


@pytest.fixture
def launched(monkeypatch):
    """How often the kernels of each kind were asked for."""
    counts = dict.fromkeys(ALL, 0)

    def counted(module, kernel, kind):
        original = kernel

        def launch(*args, **kwargs):
            counts[kind] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, kernel.__name__, launch)

    for module in (mamba, swiglu, attention):
        monkeypatch.setattr(module, "has_step_kernels", lambda x: True)
        monkeypatch.setattr(module, "has_piece_kernels", lambda x: True)
    monkeypatch.setattr(passes, "has_step_kernels", lambda x: True)
    counted(mamba, mamba.mamba_step_, "mamba")
    counted(mamba, mamba.mamba_piece, "mamba")
    counted(swiglu, swiglu.swiglu_step, "swiglu")
    counted(attention, attention.linear_step, "attention")
    counted(passes, passes.linear_step, "passes")
    return counts


@pytest.fixture
def network():
    network = SAMBA.build(seed=0).eval()
    with torch.no_grad():
        network.embedding.weight.mul_(20)
    return network


def run(network, name):
    """Logits of the pass, and of the network itself."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (2, 9 if name == "step" else 13), generator=generator)
    with torch.no_grad():
        state = network(tokens[:, :8], logits="last").state
        expected = network(tokens[:, 8:], state, logits="all").logits
        return PASSES[name](network, tokens[:, 8:], clone(state)), expected


@every_pass
def test_kernels_stand_for_layers_as_they_were_built(name, network, launched):
    got, expected = run(network, name)
    assert launched == ALL
    assert relative_rms(got, expected) <= 1e-5


@every_pass
@pytest.mark.parametrize("place", list(PLACES))
def test_a_hook_is_called(place, name, network, launched):
    """One that changes what the module gives, too."""
    module, calls = network.get_submodule(place), []

    def other(module, inputs, output):
        calls.append(module)
        return (output[0] + 10, *output[1:]) if isinstance(output, tuple) else output + 10

    before = run(network, name)[1]
    handle = module.register_forward_hook(other)
    launched.update(dict.fromkeys(launched, 0))
    got, expected = run(network, name)
    kind = PLACES[place]
    fewer = ALL[kind] - (2 if kind == "attention" else 1 if kind in ("mamba", "swiglu") else ALL[kind])
    assert launched[kind] == fewer and sum(launched.values()) == sum(ALL.values()) - ALL[kind] + fewer
    assert relative_rms(got, expected) <= 1e-5
    assert len(calls) == 3 and relative_rms(got, before) > 1e-3  # the prompt, the network, the pass
    handle.remove()
    launched.update(dict.fromkeys(launched, 0))
    assert relative_rms(run(network, name)[0], before) <= 1e-5 and launched == ALL


@every_pass
@pytest.mark.parametrize(
    "place", ["sublayers.0.layer.out_proj", "sublayers.1.layer.down", "sublayers.2.layer.qkv_proj"]
)
@pytest.mark.parametrize("change", ["parametrization", "storage"])
def test_a_projection_of_another_kind_is_called(change, place, name, network, launched):
    module = network.get_submodule(place)
    if change == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.mul_(2)
    else:
        network.set_submodule(place, StoredLinear(module, "int8"))
    got, expected = run(network, name)
    assert launched[PLACES[place]] < ALL[PLACES[place]]
    assert relative_rms(got, expected) <= 1e-5


@every_pass
def test_a_hook_on_all_modules_sees_all_of_them(name, network, launched):
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(network, name)
    finally:
        handle.remove()
    assert not any(launched.values())
    assert {network.get_submodule(place) for place in PLACES if not place.endswith("in_proj")} <= set(seen)
