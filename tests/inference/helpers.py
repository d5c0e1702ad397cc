"""Small models with opinions, shared by the tests of sessions and of evaluation."""

import numpy as np
import pytest
import torch

from milonga.data.bpe import BpeCodec
from milonga.inference import LanguageModel, Sampling
from milonga.layers import AttentionConfig, MambaConfig, SwiGLUConfig
from milonga.models import ModelConfig

SAMBA = ModelConfig(
    vocab_size=256,
    d_model=16,
    pattern="mamba mlp swa mlp",
    repeats=2,
    layers={
        "mamba": MambaConfig(d_state=4),
        "swa": AttentionConfig(heads=2, window=7),
        "mlp": SwiGLUConfig(d_hidden=24),
    },
)
GROWING = SAMBA.replace_layer("swa", window=None)
MAMBA = SAMBA.replace(pattern="mamba", repeats=3)
ATTENTION = SAMBA.replace(pattern="swa mlp", repeats=2)
CONFIGS = {"samba": SAMBA, "growing": GROWING, "mamba": MAMBA, "attention": ATTENTION}


def opinionated(config=SAMBA, seed=0, codec=None):
    """A model whose predictions are far from uniform: its embedding, which is also its head, is scaled up."""
    network = config.build(seed=seed)
    with torch.no_grad():
        network.embedding.weight.mul_(20)
    return LanguageModel(network, codec)


def opinionated_subwords():
    """One of subwords."""
    codec = BpeCodec([(b"t", b"h"), (b"th", b"e"), (b"a", b"t"), (b" ", b"the"), (b" ", b"m"), (b" m", b"at")])
    return opinionated(SAMBA.replace(vocab_size=codec.vocab_size), codec=codec)


FAILURES = ("before the draft", "in the draft", "behind the verification")


def assert_undone(decoder, where):
    """The session stands behind what was written before: the round that fails there is undone, and none before it."""
    session = decoder.verifier.session()
    session.feed(b"abc")
    generation = decoder.generate_bytes(session, 60, Sampling(seed=1), context=b"abc")
    text = next(generation) + next(generation) + next(generation)
    rows = next(iter(decoder._buffers._owners.values()))

    def interrupted(*_):
        raise KeyboardInterrupt

    if where == "before the draft":
        rows._plans = interrupted
    elif where == "in the draft":
        rows._drafter.draft = interrupted
    else:
        rows._verifier.verdicts = interrupted
    written = [text]
    with pytest.raises(KeyboardInterrupt):
        written += generation  # what was written before it, and the round that was under way, is given out first
    text = b"".join(written)
    other = decoder.verifier.session()
    other.feed(b"abc" + text)
    assert session.position == other.position
    np.testing.assert_allclose(session.logits, other.logits, atol=1e-5 * np.abs(other.logits).max())
