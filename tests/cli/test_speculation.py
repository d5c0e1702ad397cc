"""What `generate --drafter` makes: the same text whether the networks run captured or plainly."""

import pytest

from milonga.cli import speculation
from milonga.cli.speculation import NGRAM, decoder_of, speculation_of
from milonga.inference import Sampling, load
from milonga.inference.captured import CapturedRunner
from milonga.models.pretrained import save_weights
from tests.inference.helpers import GROWING, opinionated


@pytest.mark.parametrize("rule", ["greedy", "exact"])
@pytest.mark.parametrize("kind", ["model", NGRAM])
def test_captured_and_plain_write_the_same(kind, rule, tmp_path, monkeypatch):
    for name, seed in (("verifier", 0), ("drafter", 1)):
        save_weights(opinionated(GROWING, seed=seed).network, tmp_path / f"{name}.safetensors")
    lm = load(tmp_path / "verifier.safetensors", device="cpu")
    asked = speculation_of(NGRAM if kind == NGRAM else str(tmp_path / "drafter.safetensors"), rule, 4)
    assert asked is not None
    texts, made = [], []
    for captured in (False, True):
        if captured:  # as on a GPU
            monkeypatch.setattr(
                speculation, "runner_for", lambda network: made.append(CapturedRunner(network)) or made[-1]
            )
        session = lm.session()
        session.feed(b"It was the best of times, " * 3)
        texts.append(b"".join(decoder_of(lm, asked).generate_bytes(session, 20, Sampling(seed=3), context=b"times, ")))
    assert texts[0] == texts[1] and len(texts[0]) == 20
    assert [runner.network is lm.network for runner in made] == ([True] if kind == NGRAM else [False, True])
