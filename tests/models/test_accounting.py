"""What the config says a model costs is what the built model costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from milonga.layers import AttentionConfig, AttentionState, LayerConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig, preset
from milonga.models.accounting import flops_per_token, parameter_count, state_bytes
from milonga.state import nbytes

D = 32
LAYERS = {
    "mamba": MambaConfig(),
    "wide mamba": MambaConfig(expand=3, d_state=5, d_conv=3, dt_rank=7),
    "full": AttentionConfig(heads=4),
    "window": AttentionConfig(heads=4, kv_heads=2, window=9),
    "wide heads": AttentionConfig(heads=2, kv_heads=1, head_dim=48, window=5, rope_base=None),
    "short convolution": AttentionConfig(heads=4, window=9, short_conv=4),
    "mlp": SwiGLUConfig(d_hidden=80),
}
TINY = ModelConfig(
    vocab_size=50,
    d_model=D,
    pattern="mamba mlp swa mlp attn",
    repeats=2,
    layers={
        "mamba": MambaConfig(),
        "mlp": SwiGLUConfig(d_hidden=80),
        "swa": AttentionConfig(heads=4, window=9),
        "attn": AttentionConfig(heads=4, kv_heads=1),
    },
)


def outside_products(config) -> float:
    """Operations of one step that are no matrix products, which PyTorch's counter does not see."""
    if isinstance(config, MambaConfig):
        inner = config.expand * D
        return 2 * inner * config.d_conv + 7 * inner * config.d_state
    if isinstance(config, AttentionConfig):
        heads, groups, width = config.shape(D)
        return 2 * (heads + 2 * groups) * width * (config.short_conv or 0)
    return 5 * config.d_hidden


def state_at(config, length):
    """A state of `length` earlier steps. In float64, where the definitions run rather than the kernels."""
    state = config.build(D).double().init_state(1)
    if isinstance(state, AttentionState) and config.window is None:
        _, groups, width = config.shape(D)
        ring = torch.zeros(1, length, groups, width, dtype=torch.float64)
        state = state._replace(k=ring, v=ring)
    if isinstance(state, AttentionState):
        state = state._replace(position=torch.tensor([length]))
    return state


def nan_guard(config, context) -> float:
    """Products that the reference attention spends on finding NaN among the values, and no kernel does."""
    if not isinstance(config, AttentionConfig):
        return 0
    _, groups, width = config.shape(D)
    return 2 * groups * width * (context + 1)


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_flops_of_a_step_are_the_products_counted_by_pytorch(config):
    context = 8 if getattr(config, "window", 9) in (9, None) else config.window - 1
    layer, x = config.build(D).double(), torch.randn(1, 1, D, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        layer.advance(x, state_at(config, context))
    expected = config.flops_per_token(D, context) - outside_products(config) + nan_guard(config, context)
    assert counter.get_total_flops() == expected


def test_flops_of_a_window_stop_growing_and_of_full_attention_do_not():
    window, full = LAYERS["window"], LAYERS["full"]
    assert window.flops_per_token(D, 8) == window.flops_per_token(D, 10**6) > window.flops_per_token(D, 7)
    assert full.flops_per_token(D, 100) - full.flops_per_token(D, 99) == 4 * D


def test_flops_of_a_network_are_its_layers_and_head():
    stack = [TINY.layers[name] for name in TINY.stack]
    network = TINY.build().double()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, dtype=torch.int64), tuple(state_at(config, 8) for config in stack), logits="all")
    expected = flops_per_token(TINY, 8) + sum(nan_guard(config, 8) - outside_products(config) for config in stack)
    assert counter.get_total_flops() == expected
    assert flops_per_token(TINY, training=True) == 3 * flops_per_token(TINY)


def test_flops_of_mambabyte_are_near_the_published_figure():
    """SpaceByte (2024), table 4: 713M for MambaByte-353M."""
    assert flops_per_token(preset("mambabyte-353m")) == pytest.approx(713e6, rel=0.02)


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_parameters_of_each_kind(config):
    for norm in ("rms_norm", "layer_norm"):
        for tied in (True, False):
            model = ModelConfig(vocab_size=11, d_model=D, pattern="a a", layers={"a": config}, norm=norm, tied=tied)
            assert parameter_count(model) == sum(p.numel() for p in model.build(device="meta").parameters())


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_bytes_of_each_kind(config, dtype):
    layer = config.build(D).to(dtype)
    assert (
        config.state_bytes(D, 0, dtype) == nbytes(layer.init_state(1)) == LayerConfig.state_bytes(config, D, 0, dtype)
    )


@pytest.mark.parametrize("length", [0, 1, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_those_of_the_state(length, dtype):
    network = TINY.build().to(dtype)
    state = network(torch.zeros(1, length, dtype=torch.int64), network.init_state(), logits="none").state
    assert nbytes(state) == state_bytes(TINY, length, dtype=dtype)


def test_the_state_is_constant_but_for_full_attention():
    samba, llama = preset("samba-1.7b"), preset("llama-3-1.6b")
    assert state_bytes(samba, 0) == state_bytes(samba, 1) == state_bytes(samba, 10**9)
    # keys and values of 24 layers, 4 heads of 64, bf16: 24,576 bytes a token, in a buffer of a power of two
    assert state_bytes(llama, 2**20, dtype=torch.bfloat16) == 24_576 * 2**20 + state_bytes(llama, 0)
