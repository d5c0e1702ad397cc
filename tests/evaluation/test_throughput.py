"""Speed, memory, and what a Transformer would hold."""

import mmap

import numpy as np
import pytest

from milonga.errors import UserError
from milonga.evaluation import measure_throughput, memory_growth, transformer_cache_bytes
from milonga.evaluation.throughput import resident_bytes
from milonga.layers import AttentionConfig, SwiGLUConfig
from milonga.models import ModelConfig
from tests.inference.helpers import SAMBA, opinionated

LM = opinionated()


def test_rates_are_positive_and_say_where_they_were_taken():
    rates = measure_throughput(LM, b"some text " * 30, generated=6, repeats=2)
    assert rates.feed_bytes_per_second > rates.generate_bytes_per_second > 0
    assert rates.device == "cpu"
    assert rates.to_json()["threads"] >= 1


@pytest.mark.parametrize(("text", "generated", "repeats"), [(b"", 1, 1), (b"a", 0, 1), (b"a", 1, 0)])
def test_nothing_cannot_be_timed(text, generated, repeats):
    with pytest.raises(UserError, match="throughput"):
        measure_throughput(LM, text, generated=generated, repeats=repeats)


@pytest.mark.parametrize("length", [1, 100])
def test_a_transformers_cache_is_what_one_of_this_library_holds(length):
    transformer = ModelConfig(
        vocab_size=256,
        d_model=SAMBA.d_model,
        pattern="attn mlp",
        repeats=len(SAMBA.stack) // 2,
        layers={"attn": AttentionConfig(heads=2), "mlp": SwiGLUConfig(d_hidden=16)},
    )
    session = opinionated(transformer).session()
    session.feed(np.zeros(length, np.uint8))
    state = session.mark().state
    positions = sum(int(part.position) for part in state[::2])
    per_position = sum(part.k[0, 0].numel() + part.v[0, 0].numel() for part in state[::2]) * 4
    assert positions == length * len(state[::2])
    assert transformer_cache_bytes(SAMBA, length) == per_position * length


def test_growth_is_seen():
    kept = []

    class Hoarder:
        position = 0

        def feed(self, text):
            self.position += len(text)
            block = mmap.mmap(-1, 8 << 20)  # pages of its own: what is allocated may be memory that was freed before
            block.write(b"x" * (8 << 20))
            kept.append(block)

    grown = memory_growth(Hoarder(), b"x" * 1000, first=2000, total=6500)
    assert grown.bytes == 6500
    assert grown.growth > 3 * (8 << 20)
    flat = memory_growth(LM.session(), b"x" * 1000, first=2000, total=6500)
    assert flat.bytes == 6500
    assert flat.growth < 4 << 20
    assert resident_bytes() > 16 << 20
    with pytest.raises(UserError, match="text"):
        memory_growth(LM.session(), b"", first=1, total=2)
