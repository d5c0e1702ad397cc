"""The network around its layers: residual stream, initialisation in both regimes, what it refuses."""

import math

import pytest
import torch

from milonga.layers import AttentionConfig, Layer, MambaConfig, SwiGLUConfig, attention, swiglu
from milonga.layers.linear import store_weights
from milonga.layers.recompute import CHEAP
from milonga.models import ModelConfig, preset
from milonga.segments import Segments
from milonga.state import to_flat

D = 256
CONFIG = ModelConfig(
    vocab_size=1000,
    d_model=D,
    pattern="mamba mlp swa mlp",
    repeats=2,
    layers={
        "mamba": MambaConfig(),
        "swa": AttentionConfig(heads=4, window=8, short_conv=4),
        "mlp": SwiGLUConfig(d_hidden=512),
    },
)
SMALL = CONFIG.replace(init="small", tied=False)


def deviation(tensor):
    return float(tensor.detach().std())


def test_the_regime_of_mamba():
    """Embedding N(0, 0.02); linear layers U(+-1/sqrt(fan in)); residual outputs over the root of the layers' number."""
    network = CONFIG.build(seed=1)
    assert network.head.weight is network.embedding.weight
    assert deviation(network.embedding.weight) == pytest.approx(0.02, rel=0.02)
    mamba, mlp, swa = (sublayer.layer for sublayer in network.sublayers[:3])
    root = math.sqrt(3)
    for weight, fan_in, layers in (
        (mamba.in_proj.weight, D, 1),
        (mlp.gate_up.weight, D, 1),
        (swa.qkv_proj.weight, D, 1),
        (mamba.out_proj.weight, 2 * D, 8),
        (mlp.down.weight, 512, 8),
        (swa.out_proj.weight, D, 8),
    ):
        assert deviation(weight) == pytest.approx(fan_in**-0.5 / root / math.sqrt(layers), rel=0.02)
        assert float(weight.detach().abs().max()) <= fan_in**-0.5 / math.sqrt(layers)


def test_the_regime_of_the_small_llamas():
    """All weights N(0, sqrt(2 / 5D)), residual outputs N(0, 2 / (layers sqrt(D))); what layers keep is kept."""
    network = SMALL.build(seed=1)
    assert network.head.weight is not network.embedding.weight
    mamba, mlp, swa = (sublayer.layer for sublayer in network.sublayers[:3])
    for weight in (
        network.embedding.weight,
        network.head.weight,
        mamba.in_proj.weight,
        mamba.x_proj.weight,
        mlp.gate_up.weight,
        swa.qkv_proj.weight,
    ):
        assert deviation(weight) == pytest.approx(math.sqrt(2 / (5 * D)), rel=0.03)
    for weight in (mamba.out_proj.weight, mlp.down.weight, swa.out_proj.weight):
        assert deviation(weight) == pytest.approx(2 / (8 * math.sqrt(D)), rel=0.02)
    assert torch.equal(mamba.scan.D, torch.ones(2 * D))
    assert float(mamba.dt_proj.weight.detach().abs().max()) <= 16**-0.5
    assert float(swa.conv_weight.detach().abs().max()) <= 0.5


def test_a_seed_decides_the_weights_and_nothing_outside_changes():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    left = CONFIG.build(seed=2)
    assert torch.equal(torch.rand(3), expected)
    right = CONFIG.build(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
    assert not torch.equal(CONFIG.build(seed=3).embedding.weight, left.embedding.weight)


def test_every_layer_adds_to_the_residual_stream():
    """`x + f(norm(x))` for each, then a norm and the head."""
    network = CONFIG.build()
    tokens = torch.randint(1000, (2, 11))
    with torch.no_grad():
        x = network.embedding(tokens)
        for sublayer in network.sublayers:
            x = x + sublayer.layer(sublayer.norm(x))[0]
        expected = network.norm(x) @ network.embedding.weight.T
        torch.testing.assert_close(network(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["samba-421m", "mambabyte-353m", "llama-2-438m"])
def test_shapes_without_memory(name: str) -> None:
    """Both passes of a whole model on `meta`, where tensors have shapes and nothing else."""
    network = preset(name).build(device="meta")
    tokens = torch.zeros(2, 70, dtype=torch.long, device="meta")
    assert network(tokens).logits.shape == (2, 70, network.config.vocab_size)
    network(tokens, targets=tokens).losses.sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


def test_what_is_returned():
    network = CONFIG.build()
    tokens = torch.randint(1000, (2, 7))
    with torch.no_grad():
        plain = network(tokens)
        assert plain.losses is None and plain.trace is None and plain.logits.dtype == torch.float32
        assert network(tokens, logits="none").logits is None
        carried = network(tokens, network.init_state(2), targets=tokens)
        assert carried.state is not None and carried.losses.shape == (2, 7)
        traced = network(tokens, traced=True)
        assert traced.state is None and len(traced.trace) == 8
        packed = network(tokens.view(1, 14), segments=Segments([0, 4, 14]), logits="last").logits
        assert packed.shape == (2, 1000)
        everything = network(tokens.view(1, 14), segments=Segments([0, 4, 14])).logits[0]
        torch.testing.assert_close(packed, everything[[3, 13]], rtol=1e-4, atol=1e-5)
        ignored = tokens.clone()
        ignored[0, 2] = -100
        assert network(tokens, targets=ignored).losses[0, 2] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n, t: n(t[0]), r"tokens must be int64 \[B T\]"),
        (lambda n, t: n(t.float()), "tokens must be int64"),
        (lambda n, t: n(t, targets=t[:, 1:]), r"targets must be \[2, 5\]"),
        (lambda n, t: n(t, segments=Segments([0, 5])), "packed as"),
        (lambda n, t: n(t, n.init_state(2)[:3]), "state must have 8 layers, got 3"),
        (lambda n, t: n(t[:, :0], logits="last"), "no last step"),
        (lambda n, t: n(t[:1], segments=Segments([0, 0, 5]), logits="last"), "no last step"),
        (lambda n, t: n(t, targets=t, logits="last"), "exclude each other"),
        (lambda n, t: n(t, logits="final"), "logits must be one of all, last, none, got 'final'"),
    ],
)
def test_what_does_not_fit(call, words):
    network = CONFIG.build()
    with pytest.raises(ValueError, match=words):
        call(network, torch.randint(1000, (2, 5)))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of every sequence that a gate or a query is computed for, in order."""
    seen: list[int] = []

    def spied(function):
        def call(x, *arguments, **settings):
            seen.append(x.shape[1])
            return function(x, *arguments, **settings)

        return call

    monkeypatch.setattr(swiglu, "swiglu", spied(swiglu.swiglu))
    monkeypatch.setattr(attention, "window_attention", spied(attention.window_attention))
    return seen


NARROW = CONFIG.replace(
    pattern="mlp swa mlp mlp", layers={"swa": AttentionConfig(heads=4, window=8), "mlp": SwiGLUConfig(d_hidden=64)}
)


def test_only_what_the_wanted_logits_need_is_computed(rows: list[int]) -> None:
    network, tokens = NARROW.build(), torch.randint(1000, (2, 20))
    with torch.no_grad():
        full = network(tokens)
        assert rows == [20] * 8
        rows.clear()
        last = network(tokens, network.init_state(2), logits="last")
        assert rows == [20, 20, 20, 20, 20, 1, 1, 1]  # of the last attention layer one query, and what is behind it
        rows.clear()
        none = network(tokens, logits="none")
        assert rows == [20, 20, 20, 20, 20, 20, 0, 0] and none.logits is None
        rows.clear()
        segments = Segments([0, 3, 20, 40])
        packed = network(tokens.view(1, 40), segments=segments, logits="last").logits
        assert rows == [40] * 6 + [3, 3]
        everything = network(tokens.view(1, 40), segments=segments).logits[0]
        rows.clear()
        trained = network(tokens, logits="none", targets=tokens)
        assert rows == [20] * 8 and torch.equal(trained.losses, network(tokens, targets=tokens).losses)
        traced = network(tokens, logits="last", traced=True)
    torch.testing.assert_close(last.logits, full.logits[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed, everything[[2, 19, 39]], rtol=1e-4, atol=1e-5)
    states = (last.state, none.state, network.commit(None, traced.trace))
    for state in states:
        for got, expected in zip(to_flat(state).values(), to_flat(full.state).values(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_last_of_stored_weights(rows: list[int], storage: str) -> None:
    network, tokens = NARROW.build(), torch.randint(1000, (2, 20))
    store_weights(network, storage)
    with torch.no_grad():
        last = network(tokens, logits="last").logits
        assert rows[-3:] == [1, 1, 1]
        torch.testing.assert_close(last, network(tokens).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_gradients_of_the_last_logits(rows: list[int]) -> None:
    network, tokens = NARROW.build(), torch.randint(1000, (2, 20))
    upstream = torch.randn(2, 1000)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(network(tokens).logits[:, -1], parameters, upstream)
    for names in ((), CHEAP):
        network.recompute = names
        rows.clear()
        got = torch.autograd.grad(network(tokens, logits="last").logits, parameters, upstream)
        assert rows[:8] == [20] * 5 + [1] * 3
        assert all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in zip(got, expected, strict=True))


def test_whoever_looks_on_sees_every_step(rows: list[int]) -> None:
    """A hook on a part of a network is called with what it was always called with."""
    network, tokens = NARROW.build(), torch.randint(1000, (2, 20))
    seen = []
    places = {
        5: network.sublayers[5],
        7: network.sublayers[6].layer.down,
        6: network.sublayers[5].layer.out_proj,
        8: network.sublayers[7].norm,
    }
    with torch.no_grad():
        expected = network(tokens, logits="last").logits
        for computed, module in places.items():
            handle = module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
            rows.clear()
            got = network(tokens, logits="last").logits
            handle.remove()
            assert seen == [20]
            seen.clear()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert rows == [20] * max(computed, 6) + [1] * (8 - max(computed, 6))
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        rows.clear()
        network(tokens, logits="last")
        handle.remove()
        assert rows == [20] * 8


class Shifted(swiglu.SwiGLU):
    """Adds what the step before gave: no longer each step by itself."""

    def advance(self, x, state, segments=None):
        y, trace = super().advance(x, state, segments)
        return y + torch.nn.functional.pad(y[:, :-1], (0, 0, 1, 0)), trace


class Doubled(attention.Attention):
    """Twice what its base gives."""

    def advance(self, x, state, segments=None):
        y, trace = super().advance(x, state, segments)
        return 2 * y, trace


@pytest.mark.parametrize(("index", "kind"), [(7, Shifted), (5, Doubled)])
def test_a_layer_with_another_advance_is_asked_for_it(index: int, kind: type[torch.nn.Module]) -> None:
    """Its base's ways to leave steps out, or to take one step, would give the base's results."""
    network, tokens = NARROW.build(), torch.randint(1000, (2, 20))
    layer = network.sublayers[index].layer
    layer.__class__ = kind
    assert kind.step_ is Layer.step_ and kind.read_piece is Layer.read_piece and not kind.apart
    with torch.no_grad():
        last = network(tokens, logits="last").logits
        torch.testing.assert_close(last, network(tokens).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time", [1, 7, 8, 9, 20])
def test_last_compiles(time: int) -> None:
    network, tokens = NARROW.build(), torch.randint(1000, (2, time))
    torch.compiler.reset()
    with torch.no_grad():
        run = torch.compile(lambda t, s: network(t, s, logits="last").logits, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            run(tokens, network.init_state(2)), network(tokens).logits[:, -1], rtol=1e-4, atol=1e-5
        )


def test_residual_stream_in_bf16() -> None:
    layers = {"mlp": SwiGLUConfig(d_hidden=24), "swa": AttentionConfig(heads=2, window=5)}
    network = ModelConfig(vocab_size=19, d_model=16, pattern="swa mlp", repeats=2, layers=layers).build()
    tokens, seen = torch.randint(0, 19, (2, 13)), []
    for layer in network.sublayers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        wide = network(tokens, targets=tokens).losses
        network.residual_dtype = torch.bfloat16
        narrow = network(tokens, targets=tokens).losses
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert not torch.equal(wide, narrow)
    torch.testing.assert_close(wide, narrow, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forgetting_cheap_results_changes_no_gradient(precision: str) -> None:
    layers = {
        "mamba": MambaConfig(d_state=4),
        "mlp": SwiGLUConfig(d_hidden=24),
        "swa": AttentionConfig(heads=2, window=5),
    }
    config = ModelConfig(vocab_size=19, d_model=16, pattern="mamba mlp swa mlp", repeats=1, layers=layers)
    network = config.build()
    torch.manual_seed(0)
    tokens = torch.randint(0, 19, (2, 13))
    found = []
    for names in ((), tuple(name for name in CHEAP if name != "scan"), CHEAP):
        network.recompute = names
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = network(tokens, targets=tokens).losses
        found.append(torch.autograd.grad(losses.sum(), list(network.parameters())))
    kept, again, scan_too = found
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    bound = 1e-6 if precision == "fp32" else 2.0**-7  # the sums are rounded in another order
    assert all(float((a - b).norm()) <= bound * float(a.norm()) for a, b in zip(kept, scan_too, strict=True))
