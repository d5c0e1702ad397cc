"""The attention layer against its equations: window, rotary positions, grouped keys, short convolution."""

import pytest
import torch
from torch.nn import functional as F

from milonga.layers import AttentionConfig

D = 24


def turned(x, base):
    """Rotary positions by complex numbers: lane i and lane i + K / 2 are one number, `[B T H K]` from position 0."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1]).double()[:, None] * base ** (-torch.arange(half).double() / half)
    numbers = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([numbers.real, numbers.imag], -1)


def by_the_equations(layer, x):
    """Samba section 2.1.2 with a mask of T x T, in float64: `[B T D]` -> `[B T D]`."""
    config, (batch, time, _) = layer.config, x.shape
    qkv = x @ layer.qkv_proj.weight.T
    if config.short_conv:
        padded = F.pad(qkv.transpose(1, 2), (config.short_conv - 1, 0))
        qkv = F.silu(F.conv1d(padded, layer.conv_weight[:, None], groups=qkv.shape[-1]).transpose(1, 2))
    qkv = qkv.view(batch, time, -1, layer.width)
    q, k, v = qkv.split([layer.heads, layer.groups, layer.groups], 2)
    if config.rope_base is not None:
        q, k = turned(q, config.rope_base), turned(k, config.rope_base)
    k, v = (part.repeat_interleave(layer.heads // layer.groups, 2) for part in (k, v))
    behind = torch.arange(time)[:, None] - torch.arange(time)
    seen = (behind >= 0) & (behind < (config.window or time))
    scores = torch.einsum("bqhk,bmhk->bhqm", q, k) / layer.width**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqm,bmhv->bqhv", weights, v).flatten(2) @ layer.out_proj.weight.T


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(heads=4),
        AttentionConfig(heads=4, window=5),
        AttentionConfig(heads=4, kv_heads=2, window=1),
        AttentionConfig(heads=6, kv_heads=2, head_dim=10, window=7, rope_base=500.0),
        AttentionConfig(heads=3, window=6, rope_base=None),
        AttentionConfig(heads=4, kv_heads=1, window=4, short_conv=4),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_it_is_its_equations(config, dtype, bound):
    layer = config.build(D).to(dtype)
    x = 3 * torch.randn(2, 17, D, dtype=dtype)
    with torch.no_grad():
        y, expected = layer(x)[0], by_the_equations(layer.double(), x.double())
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) <= bound


def test_a_window_counts_the_query_itself():
    """A step sees the w - 1 steps before it and none further back; the state keeps those w - 1."""
    layer = AttentionConfig(heads=2, window=4).build(D)
    x = torch.randn(1, 12, D)
    with torch.no_grad():
        y, state = layer(x)
        for back in range(8):
            other = x.clone()
            other[0, 11 - back] += 1.0
            assert bool((layer(other)[0][0, 11] != y[0, 11]).any()) is (back < 4)
    assert state.k.shape == (1, 3, 2, D // 2)
    assert state.position.tolist() == [12] and state.position.dtype == torch.int64


def test_without_positions_what_was_read_may_be_reordered():
    layer = AttentionConfig(heads=2, rope_base=None).build(D)
    x = torch.randn(1, 9, D)
    with torch.no_grad():
        y = layer(x)[0][0, -1]
        shuffled = layer(x[:, [3, 1, 0, 2, 7, 5, 6, 4, 8]])[0][0, -1]
        rotary = AttentionConfig(heads=2).build(D)
        assert not torch.allclose(rotary(x)[0][0, -1], rotary(x[:, [3, 1, 0, 2, 7, 5, 6, 4, 8]])[0][0, -1])
    torch.testing.assert_close(shuffled, y)


def test_a_buffer_doubles_when_full():
    layer = AttentionConfig(heads=2).build(D)
    state, slots = layer.init_state(1), []
    with torch.no_grad():
        for time in (0, 1, 63, 1, 64, 1):
            _, state = layer(torch.randn(1, time, D), state)
            slots.append(state.k.shape[1])
    assert slots == [0, 64, 64, 128, 256, 256]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 5}, "heads must divide d_model, got heads 5 and d_model 24"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must divide heads"),
        ({"heads": 8}, "even head_dim, got 3"),
    ],
)
def test_shapes_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        AttentionConfig(**settings).build(D)
    if settings == {"heads": 8}:
        assert AttentionConfig(heads=8, rope_base=None).build(D).width == 3


def test_a_projection_that_is_wrapped_is_called_also_where_the_last_step_alone_is_wanted():
    """An adapter around a projection has no parts that could be taken alone."""
    torch.manual_seed(0)
    layer = AttentionConfig(heads=2, window=4).build(16)
    x = torch.randn(2, 9, 16)
    expected, _ = layer.advance_last(x, None)
    layer.set_submodule("qkv_proj", torch.nn.Sequential(layer.qkv_proj))
    got, _ = layer.advance_last(x, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
