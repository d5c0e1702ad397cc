"""What a model drafts, and that it was drawn with the probabilities it tells."""

from itertools import count

import numpy as np
import pytest
import torch

from milonga.data.bpe import BpeCodec
from milonga.errors import UserError
from milonga.inference.language_model import LanguageModel
from milonga.inference.model_drafter import ModelDrafter, ModelStream
from milonga.inference.sampling import Sampling
from milonga.inference.speculative import SpeculativeDecoder
from tests.inference.helpers import MAMBA, SAMBA

MERGES = [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c"), (b"c", b"a"), (b" ", b"a"), (b" a", b"b")]


def model(merges=MERGES, config=MAMBA, scale=12, seed=2):
    codec = BpeCodec(merges)
    network = config.replace(vocab_size=codec.vocab_size).build(seed=seed)
    with torch.no_grad():
        network.embedding.weight.mul_(scale)
    return LanguageModel(network, codec)


def dice_of(rows, seed=0):
    random = np.random.default_rng(seed)
    return [lambda ahead, lane: float(random.random()) for _ in range(rows)]


@torch.inference_mode()
def predicted(lm, ids):
    """float64 `[V]`: the drafter's own prediction behind tokens, from scratch."""
    if not ids:
        return np.full(lm.codec.vocab_size, 1 / lm.codec.vocab_size)
    logits = lm.network(torch.tensor([ids]), logits="last").logits[0]
    return torch.softmax(logits.double() / 0.9, 0).numpy()


def conditional(lm, ids, prefix):
    """float64 `[256]`, from the definition: what the token that begins with `prefix`, and is longer, has behind it."""
    mass, q = predicted(lm, ids), np.zeros(256)
    for token, text in enumerate(lm.codec.token_bytes):
        if text.startswith(prefix) and len(text) > len(prefix):
            q[text[len(prefix)]] += mass[token]
    return q / q.sum()


@pytest.mark.parametrize("config", [MAMBA, SAMBA], ids=["mamba", "samba"])
@pytest.mark.parametrize(
    "text", [b"", b"ab", b"cab ab", b"the ab abc ca", b"x" * 100], ids=["none", "open", "cut", "words", "long"]
)
def test_the_probabilities_told_are_those_drawn_from(config, text):
    """Over many drafts, the first byte comes as often as the draft says; and what it says is the conditional."""
    lm = model(config=config)
    drafter = ModelDrafter(lm)
    rows = 300
    drafts = drafter.start([text] * rows).draft(6, 0.9, dice_of(rows))
    expected, told = np.zeros(256), np.zeros(256)
    for draft in drafts:
        assert len(draft.text) == 6
        for index, byte in enumerate(draft.text):
            assert 0 < draft.probability(index) <= 1 + 1e-12
            if index < 2:
                q = draft.distribution(index)
                assert q[byte] == pytest.approx(draft.probability(index), rel=1e-9)
                assert q.sum() == pytest.approx(1) and q.min() >= 0
        expected += draft.distribution(0)
        told[draft.text[0]] += 1
    # bytes in groups of equal remainders, so that each group expects some
    expected, told = expected.reshape(-1, 8).sum(0), told.reshape(-1, 8).sum(0)
    assert expected.min() > 2
    assert ((told - expected) ** 2 / expected).sum() < 8 + 5 * np.sqrt(2 * 8)


def test_the_conditional_of_an_open_token():
    """Behind ` ab` the text may go on inside a longer token or with a new one: q is the one's or the other's."""
    lm = model()
    text = b"cab ab"
    ids = lm.codec.encode(text).tolist()
    last = lm.codec.token_bytes[ids[-1]]
    open_, ended = conditional(lm, ids[:-1], last) if last == b"ab" else None, conditional(lm, ids, b"")
    kinds = {"open": 0, "ended": 0}
    for draft in ModelDrafter(lm).start([text] * 200).draft(1, 0.9, dice_of(200)):
        q = draft.distribution(0)
        if np.allclose(q, ended, atol=1e-6):
            kinds["ended"] += 1
        else:
            assert open_ is not None
            np.testing.assert_allclose(q, open_, atol=1e-6)
            kinds["open"] += 1
    mass = predicted(lm, ids[:-1])
    longer = sum(m for m, t in zip(mass, lm.codec.token_bytes, strict=True) if t.startswith(last) and t != last)
    if longer:
        share = longer / (longer + mass[ids[-1]])
        assert abs(kinds["open"] - 200 * share) < 5 * np.sqrt(200 * share * (1 - share)) + 1


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_a_stream_that_went_on_is_one_that_begins_there(limit):
    """Whatever was drafted and refused on the way, and whoever is beside it: the drafts are those of a fresh stream."""
    lm = model(config=SAMBA)
    drafter, random = ModelDrafter(lm), np.random.default_rng(limit)
    texts = [b"", b"a cab ab", b"abc " * 40]
    stream = drafter.start(texts)
    for turn in range(12):
        stream.draft(limit, 0.9, dice_of(3, turn))
        more = [bytes(random.choice(list(b"abc \n"), random.integers(0, 9)).tolist()) for _ in texts]
        stream.extend(more)
        texts = [text + new for text, new in zip(texts, more, strict=True)]
        greedy = [draft.text for draft in stream.draft(limit, 0.0, dice_of(3))]
        for text, got in zip(texts, greedy, strict=True):
            ids = lm.codec.encode(text).tolist()
            assert len(got) == limit, (turn, ids)
    assert max(map(len, stream._tails)) < 64


@pytest.mark.parametrize("start", [b"ab ", b" abc", b""], ids=["behind a word", "in a word", "none"])
def test_a_word_without_end_leaves_few_tokens_open(start):
    """Where no white space comes any more, the tokens that every round reads again do not grow with the text."""
    stream = ModelDrafter(model()).start([start])
    for turn in range(40):
        assert len(stream.tail_ids()[0]) < 64, turn
        stream.draft(3, 0.9, dice_of(1, turn))
        stream.extend([b"c d" if turn == 0 else b"xyz" * 3])


def test_greedy_drafts_are_the_likeliest_tokens():
    lm = model()
    text = b"cab"
    ids = lm.codec.encode(text + b" ").tolist()
    (draft,) = ModelDrafter(lm).start([text + b" "]).draft(7, 0.0, dice_of(1))
    mass = predicted(lm, ids[:-1])
    opens = [i for i, t in enumerate(lm.codec.token_bytes) if t.startswith(b" ")]
    best = lm.codec.token_bytes[max(opens, key=lambda i: mass[i])]
    if len(best) > 1:
        ids.pop()
        expected = best[1:]
        ids.append(list(lm.codec.token_bytes).index(best))
    else:
        expected = b""
    for _ in count():
        if len(expected) >= 7:
            break
        token = int(predicted(lm, ids).argmax())
        expected, ids = expected + lm.codec.token_bytes[token], [*ids, token]
    assert draft.text == expected[:7]
    assert draft.probability(0) == 1


def test_a_vocabulary_without_all_bytes_is_refused():
    lm = model()

    class Characters(BpeCodec):
        def __init__(self):
            super().__init__(MERGES)
            self.token_bytes = [b"", *self.token_bytes[1:]]

    lm.codec = Characters()
    with pytest.raises(UserError, match="cannot draft for a model of bytes"):
        ModelDrafter(lm)


def test_tokens_are_drawn_warmer_than_bytes(monkeypatch):
    """Below temperature 1, and the rule draws from what was drawn; bytes, and draws from 1 on, are left alone."""
    drafter = ModelDrafter(model())
    assert [drafter.temperature(wanted) for wanted in (0.0, 0.5, 0.8, 1.0, 1.3)] == [0.0, 0.75, 1.0, 1.0, 1.3]
    alone = ModelDrafter(LanguageModel(MAMBA.build(seed=0)))
    assert [alone.temperature(wanted) for wanted in (0.0, 0.5, 1.3)] == [0.0, 0.5, 1.3]
    warmths, draft = [], ModelStream.draft
    monkeypatch.setattr(
        ModelStream,
        "draft",
        lambda self, limit, warmth, dice: warmths.append(warmth) or draft(self, limit, warmth, dice),
    )
    verifier = LanguageModel(MAMBA.build(seed=1))
    decoder = SpeculativeDecoder(verifier, drafter, draft=4)
    assert len(b"".join(decoder.generate_bytes(verifier.session(), 12, Sampling(temperature=0.5)))) == 12
    assert warmths and set(warmths) == {0.75}
