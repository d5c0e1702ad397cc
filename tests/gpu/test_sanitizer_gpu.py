"""Small models through every kernel, each once: for `compute-sanitizer python -m pytest -m gpu -k sanitizer tests/gpu`.

What the kernels compute is compared elsewhere. Here they run on shapes that no tile divides, so that an access beyond
an array is seen.
"""

import pytest
import torch

from milonga.inference import LanguageModel, Sampling
from milonga.segments import Segments
from tests.gpu.helpers import CONFIGS, decoder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("names", [(), ("sum", "scan"), ("norm", "sum", "conv", "scan", "gate", "rotary", "cast")])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_training_for_the_sanitizer(name: str, names: tuple[str, ...]) -> None:
    """Rectangular, of one step, and packed with an empty sequence."""
    network = CONFIGS[name].build(device="cuda")
    network.recompute = names
    for batch, time, segments in ((3, 67, None), (2, 1, None), (1, 90, Segments.from_lengths([41, 0, 33, 16]))):
        tokens = torch.randint(0, 256, (batch, time), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(tokens, segments=segments, targets=tokens).losses.mean()
        loss.backward()
        assert bool(loss.isfinite())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_decoding_for_the_sanitizer(name: str) -> None:
    """Three texts written together."""
    batch = LanguageModel(CONFIGS[name].build(device="cuda").to(torch.bfloat16).eval()).batch(max_rows=3)
    for seed, prompt in enumerate((b"", b"a text of some length, and then " * 3, b"abc")):
        batch.join(prompt, Sampling(temperature=0.8, top_k=20, seed=seed), 9)
    assert [event.ended for event in batch.events() if event.ended] == ["length"] * 3


def test_speculation_for_the_sanitizer() -> None:
    network = CONFIGS["mamba"].build(device="cuda").to(torch.bfloat16).eval()
    for kind in ("ngram", "bytes", "subwords"):
        made = decoder(LanguageModel(network), kind, "exact", dtype=torch.bfloat16)
        session = made.verifier.session()
        session.feed(b"the them the")
        assert len(b"".join(made.generate_bytes(session, 20, Sampling(seed=1), context=b"the them the"))) == 20
