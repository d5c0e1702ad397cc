"""Which steps are replayed, and the static passes that a graph is made of, run as they stand on a CPU."""

import pytest
import torch

from milonga.data.prepare import prepare
from milonga.data.windows import WindowSampler
from milonga.errors import UserError
from milonga.layers.recompute import CHEAP
from milonga.training import CapturedGradient, OptimizerConfig, build_optimizer, training_step
from milonga.training.captured import StaticPasses, obstacle
from milonga.training.config import changed_keys
from milonga.training.step import backward, gradient, gradient_norm

from . import runs

CPU = torch.device("cpu")


@pytest.fixture
def network():
    return runs.RunConfig.parse(runs.settings("nowhere"), "test").model.build()


@pytest.fixture
def corpus(tmp_path):
    made = runs.config(runs.write_texts(tmp_path / "texts"))
    return prepare(made.data, tmp_path / "data")[0]


def sampler(corpus, **changes):
    return WindowSampler(corpus, **({"window": 24, "batch": 4, "seed": 1, "isolate": False} | changes))


def test_a_plain_step_may_be_replayed(network, corpus):
    batch = sampler(corpus).batch(0)
    assert obstacle(network, batch, None) is None
    network.recompute = CHEAP
    assert obstacle(network, batch, None) is None


def test_states_and_packed_sequences_are_obstacles(network, corpus):
    batch = sampler(corpus).batch(0)
    assert "state" in obstacle(network, batch, network.init_state(4))
    packed = sampler(corpus, window=200, isolate=True).batch(0)
    assert packed.segments is not None
    assert "packed" in obstacle(network, packed, None)


def test_what_is_not_a_network_is_an_obstacle(network, corpus):
    batch = sampler(corpus).batch(0)
    assert "compiled" in obstacle(torch.compile(network), batch, None)
    assert "compiled" in obstacle(lambda *_: None, batch, None)

    class Other(type(network)):
        pass

    network.__class__ = Other  # as sharding does
    assert "sharded" in obstacle(network, batch, None)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_modules_are_obstacles_as_long_as_they_are_there(network, corpus, kind):
    batch, module = sampler(corpus).batch(0), network.sublayers[1].layer
    register = {
        "forward": module.register_forward_hook,
        "forward_pre": module.register_forward_pre_hook,
        "full_backward": module.register_full_backward_hook,
        "full_backward_pre": module.register_full_backward_pre_hook,
    }[kind]
    hook = register(lambda *_: None)
    assert "module" in obstacle(network, batch, None)
    hook.remove()
    assert obstacle(network, batch, None) is None


@pytest.mark.parametrize("after", [False, True])
def test_hooks_of_parameters_are_obstacles(network, corpus, after):
    batch, weight = sampler(corpus).batch(0), network.norm.weight
    hook = (weight.register_post_accumulate_grad_hook if after else weight.register_hook)(lambda _: None)
    assert "parameter" in obstacle(network, batch, None)
    hook.remove()
    assert obstacle(network, batch, None) is None


def test_who_watches_every_operation_sees_them(network, corpus):
    batch = sampler(corpus).batch(0)
    with torch.autograd.set_detect_anomaly(True):
        assert "watched" in obstacle(network, batch, None)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert "watched" in obstacle(network, batch, None)
    with torch.autograd.graph.save_on_cpu():
        assert "kept for the backward pass" in obstacle(network, batch, None)
    assert obstacle(network, batch, None) is None


def gradients(network):
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_static_passes_are_the_passes(network, corpus, accumulation, precision):
    """To the last bit, for one batch after another, with some targets left out and a last piece of fewer rows."""
    settings = {"device": CPU, "precision": precision, "accumulation": accumulation}
    batches = [sampler(corpus).batch(step) for step in range(3)]
    batches[1].targets[0, 3:9] = -100
    batches[2].targets.fill_(-100)
    passes = StaticPasses(network, list(network.parameters()), batches[0], **settings)
    for batch in batches:
        network.zero_grad()
        nats, tokens, _ = backward(network, batch, None, **settings)
        norm, expected = gradient_norm(list(network.parameters())), gradients(network)
        assert passes.load(batch) == tokens
        passes.run()
        assert torch.equal(passes.nats, nats)
        assert torch.equal(passes.norm, norm)
        assert len(passes.gradients) == len(expected)
        for name, one, other in zip(dict(network.named_parameters()), passes.gradients, expected, strict=True):
            assert torch.equal(one, other), name
    assert not expected[0].any(), "no target, no gradient"


def test_on_a_cpu_every_step_is_a_plain_one(network, corpus):
    twin = runs.RunConfig.parse(runs.settings("nowhere"), "test").model.build()
    said = []
    captured = CapturedGradient(capturing=lambda: said.append("capturing"))
    for step in range(4):
        batch = sampler(corpus).batch(step)
        ours = captured(network, list(network.parameters()), batch, None, device=CPU)
        expected = gradient(twin, list(twin.parameters()), batch, None, device=CPU)
        assert (float(ours.nats), float(ours.norm), ours.tokens) == (
            float(expected.nats), float(expected.norm), expected.tokens,
        )  # fmt: skip
        twin.zero_grad()  # which a captured gradient does for itself
    assert not captured.captured
    assert not said


def test_a_step_takes_what_computes_its_gradient(network, corpus):
    batch, calls = sampler(corpus).batch(0), []

    def counted(*values, **settings):
        calls.append(settings)
        return gradient(*values, **settings)

    result = training_step(
        network,
        build_optimizer(network, OptimizerConfig()),
        batch,
        device=CPU,
        lr=0.01,
        accumulation=2,
        gradient_of=counted,
    )
    assert calls == [{"device": CPU, "precision": "fp32", "accumulation": 2}]
    assert result.tokens == int((batch.targets != -100).sum())


def test_memory_that_runs_out_without_a_graph_is_not_tried_again():
    tries = []

    def work():
        tries.append(1)
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        CapturedGradient().beside(work)
    assert len(tries) == 1


def test_no_memory_for_the_graph_gives_it_up_with_a_warning():
    """A step that fitted before goes on as it did; what cannot be captured for another reason is an error."""

    class Full:
        def capture(self):
            raise torch.OutOfMemoryError("no room")

    captured = CapturedGradient()
    with pytest.warns(
        RuntimeWarning, match="no memory for a step as a CUDA graph; from here on every step is launched"
    ):
        assert not captured._made(Full)
    assert not captured.captured and not captured._capture

    def broken():
        raise UserError("training.capture: this network's step cannot be captured")

    captured = CapturedGradient()
    with pytest.raises(UserError, match="cannot be captured"):
        captured._made(broken)


def test_the_setting_may_change_when_a_run_goes_on(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    assert runs.config(texts).training.capture is True
    assert changed_keys(runs.config(texts), runs.config(texts, capture=False)) == []
