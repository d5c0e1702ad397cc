"""Speculative decoding writes what plain decoding writes, whatever drafts."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.data.bpe import BpeCodec
from milonga.errors import UserError
from milonga.inference import speculative_rows
from milonga.inference.captured import CapturedRunner
from milonga.inference.draft_length import AdaptiveDraft
from milonga.inference.drafters import NgramDrafter
from milonga.inference.language_model import LanguageModel
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.runner import NetworkRunner
from milonga.inference.sampling import Sampling
from milonga.inference.speculative import SpeculativeDecoder
from milonga.layers import SwiGLUConfig
from milonga.models import ModelConfig
from milonga.state import merge
from tests.inference.helpers import CONFIGS, GROWING, MAMBA, SAMBA, opinionated

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b" the", b"m"), (b"a", b"b"), (b"ab", b"c"), (b"c", b"a")]
FEW = settings(max_examples=3)
PROMPTS = st.binary(max_size=40) | st.text("abc the\n", max_size=40).map(str.encode)


@cache
def verifier(name):
    return opinionated(CONFIGS[name])


@cache
def drafters(name):
    """Drafters of every kind: the verifier itself, one that resembles it, subwords that do not, and no model."""
    near = opinionated(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in near.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.abs().mean() * 0.3)
    codec = BpeCodec(MERGES)
    subwords = LanguageModel(MAMBA.replace(vocab_size=codec.vocab_size).build(seed=3), codec)
    return {
        "itself": ModelDrafter(verifier(name)),
        "near": ModelDrafter(near),
        "subwords": ModelDrafter(subwords),
        "ngram": NgramDrafter(longest=8, shortest=1),
    }


def plain(lm, prompt, n, sampling):
    session = lm.session()
    session.feed(prompt)
    return b"".join(session.generate_bytes(n, sampling)), session


class Counting(NetworkRunner):
    """Counts the tokens that go through the network."""

    def __init__(self, network):
        super().__init__(network)
        self.pieces, self.steps = [], 0

    def verify(self, tokens, state):
        self.pieces.append(tokens.shape[1])
        return super().verify(tokens, state)

    def step(self, tokens, state):
        self.steps += 1
        return super().step(tokens, state)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("kind", ["itself", "near", "subwords", "ngram"])
@FEW
@given(prompt=PROMPTS, n=st.integers(0, 24), draft=st.integers(1, 17), penalty=st.sampled_from([1.0, 3.0]))
def test_greedy_is_plain_greedy(name, kind, prompt, n, draft, penalty):
    """Byte for byte, with the session left behind the last byte. A repetition penalty keeps the text from a loop."""
    lm = verifier(name)
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, repetition_window=8)
    expected, there = plain(lm, prompt, n, sampling)
    decoder = SpeculativeDecoder(lm, drafters(name)[kind], rule="greedy", draft=draft)
    session = lm.session()
    session.feed(prompt)
    text = b"".join(decoder.generate_bytes(session, n, sampling, context=prompt))
    assert text == expected
    assert session.position == there.position == len(prompt) + n
    np.testing.assert_allclose(session.logits, there.logits, atol=1e-4)
    assert b"".join(session.generate_bytes(5, sampling)) == b"".join(there.generate_bytes(5, sampling))


@pytest.mark.parametrize("kind", ["near", "subwords", "ngram"])
@pytest.mark.parametrize("seed", [0, 1])
def test_settings_hold(kind, seed):
    """What is banned, forced or no UTF-8 does not come, the limit is kept, and greedy texts agree."""
    lm = verifier("samba")
    random = np.random.default_rng(seed)
    banned = bytes(random.choice(np.arange(128, dtype=np.uint8), 40, replace=False))
    forced = b"" if seed % 2 else bytes(set(b"abc") - set(banned))
    for rule in ("greedy", "exact", "top_k"):
        sampling = Sampling(temperature=1.0, banned=banned, forced=forced, valid_utf8=True, top_k=100, seed=seed)
        decoder = SpeculativeDecoder(lm, drafters("samba")[kind], rule=rule, draft=6)
        text = b"".join(decoder.generate_bytes(lm.session(), 30, sampling))
        assert text.startswith(forced) and set(text).isdisjoint(banned)
        assert len(text) == 30
        text.decode()
        if rule == "greedy":
            assert text == plain(lm, b"", 30, decoder.settings(sampling))[0]
        again = b"".join(decoder.generate_bytes(lm.session(), 30, sampling))
        assert again == text


@pytest.mark.parametrize("rule", ["greedy", "exact"])
@pytest.mark.parametrize("kind", ["near", "subwords", "ngram"])
@FEW
@given(data=st.data())
def test_rows_are_independent(rule, kind, data):
    """Each row of a batch gets what it gets alone, at its own pace and length."""
    lm = verifier("samba")
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=4))
    limits = data.draw(st.lists(st.integers(0, 25), min_size=len(prompts), max_size=len(prompts)))
    decoder = SpeculativeDecoder(lm, drafters("samba")[kind], rule=rule, draft=data.draw(st.integers(1, 9)))
    alone, sessions, samplers = [], [], []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        sampling = decoder.settings(Sampling(temperature=0.8, seed=index, repetition_penalty=2.0))
        session = lm.session()
        session.feed(prompt)
        samplers.append(session.sampler(sampling, limit))
        sessions.append(session.fork())
        alone.append(b"".join(decoder.generate_bytes(session, limit, sampling, context=prompt)))
    marks = [session.mark() for session in sessions]
    rows = decoder.rows(
        merge([mark.state for mark in marks]),
        torch.stack([mark.logits for mark in marks]),
        decoder.drafter.start(prompts),
        samplers,
        limits,
    )
    texts = [b""] * len(prompts)
    while not rows.done:
        texts = [text + more for text, more in zip(texts, rows.round(), strict=True)]
    assert texts == alone
    _, logits = rows.finish()
    for index, session in enumerate(sessions):
        session.feed(texts[index])
        np.testing.assert_allclose(logits[index].numpy(), session.logits, atol=1e-4)
    assert rows.round() == [b""] * len(prompts)


def test_accepted_bytes_are_read_once():
    """The verifier reads the last byte and the draft in one piece a round, and nothing else but the very last byte."""
    lm = verifier("samba")
    runner = Counting(lm.network)
    decoder = SpeculativeDecoder(lm, drafters("samba")["near"], rule="exact", draft=5, runner=runner)
    text = b"".join(decoder.generate_bytes(lm.session(), 100, Sampling(seed=3)))
    stats = decoder.stats
    assert runner.steps == 0
    assert len(runner.pieces) == stats.rounds + 1 and max(runner.pieces) == 6 and runner.pieces[-1] == 1
    assert stats.written == len(text) - 1 and stats.verifications == stats.rounds
    assert 0 < stats.accepted < stats.examined <= stats.drafted
    assert stats.bytes_per_verification == pytest.approx(99 / stats.rounds)
    assert stats.acceptance == pytest.approx(stats.accepted / stats.examined)
    assert stats.predicted_speedup(1.0) > stats.predicted_speedup(0.5) > 0


@pytest.mark.parametrize("name", ["samba", "growing"])
@pytest.mark.parametrize("kind", ["near", "subwords"])
def test_captured_runners_write_the_same(name, kind):
    """Verifier and drafter in static buffers; on a CPU without graphs. Several calls on one session."""
    lm, plainly = verifier(name), drafters(name)[kind]
    captured = ModelDrafter(plainly.model, CapturedRunner(plainly.model.network))
    for rule in ("greedy", "exact"):
        sampling = Sampling(seed=11, temperature=0.7, repetition_penalty=2.0)
        texts = []
        for drafter, runner in ((plainly, None), (captured, CapturedRunner(lm.network))):
            decoder = SpeculativeDecoder(lm, drafter, rule=rule, draft=6, runner=runner)
            session = lm.session()
            first = decoder.generate_bytes(session, 20, sampling)
            text = b"".join(first)
            twin = session.fork()
            text += b"".join(decoder.generate_bytes(session, 15, sampling, stream=first.stream))
            assert twin.position == 20 and session.position == 35
            texts.append(text + b"".join(twin.generate_bytes(5, sampling)))
        assert texts[0] == texts[1]


@pytest.mark.parametrize(("kind", "rule"), [("near", "greedy"), ("near", "exact"), ("subwords", "exact")])
def test_captured_runners_grow_with_the_text(kind, rule):
    """Full attention, the runners as they come: behind a long prompt, and past two doublings of what it needs."""
    lm = verifier("growing")
    near = drafters("growing")[kind].model
    if kind == "subwords":  # full attention in the drafter too
        near = LanguageModel(GROWING.replace(vocab_size=near.codec.vocab_size).build(seed=3), near.codec)
    for prompt, n, capacity in ((b"abc the mat " * 20, 12, 64), (b"a", 70, 16)):
        texts = []
        for captured in (False, True):
            runners = [CapturedRunner(m.network, capacity=capacity) if captured else None for m in (near, lm)]
            decoder = SpeculativeDecoder(lm, ModelDrafter(near, runners[0]), rule=rule, draft=6, runner=runners[1])
            session = lm.session()
            session.feed(prompt)
            sampling = Sampling(seed=11, temperature=0.7, repetition_penalty=2.0)
            texts.append(b"".join(decoder.generate_bytes(session, n, sampling, context=prompt)))
        assert texts[0] == texts[1] and len(texts[0]) == n
        assert runners[1].capacity == (128 if n == 70 else 256)
        assert kind == "subwords" or runners[0].capacity == runners[1].capacity


def tied(name):
    """Bytes 2i and 2i + 1 have the same embedding, so the two likeliest are always equal, up to rounding."""
    lm = opinionated(CONFIGS[name])
    with torch.no_grad():
        weight = lm.network.embedding.weight
        weight[1::2] = weight[::2]
    return lm


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_ties_are_decided_by_single_steps(replay, rows, monkeypatch):
    """And counted. With a bound of 0 the pieces decide."""
    monkeypatch.setattr(speculative_rows, "REPLAY", 1000 if replay else 0)
    lm = tied("samba")
    prompts = [b"abc", b"the", b""][:rows]
    sampling = Sampling(temperature=0.0)
    expected = [plain(lm, prompt, 20, sampling)[0] for prompt in prompts]
    for tie in (None, 0.0):
        runner = Counting(lm.network)
        decoder = SpeculativeDecoder(lm, drafters("samba")["near"], rule="greedy", draft=4, tie=tie, runner=runner)
        sessions = [lm.session() for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.feed(prompt)
        marks = [session.mark() for session in sessions]
        run = decoder.rows(
            merge([mark.state for mark in marks]),
            torch.stack([mark.logits for mark in marks]),
            decoder.drafter.start(prompts),
            [session.sampler(sampling, 20) for session in sessions],
            [20] * rows,
        )
        texts = [b""] * rows
        while not run.done:
            texts = [text + more for text, more in zip(texts, run.round(), strict=True)]
        stats = decoder.stats
        assert stats.redone == (19 * rows if tie is None else 0)
        assert runner.steps == 0
        if tie is None:
            assert stats.replayed == stats.redone
            assert texts == expected


def test_a_tie_far_from_the_beginning_is_replayed_from_there():
    """One tie late in a text: all bytes since the beginning are read again one by one, as plain decoding did."""
    lm = verifier("samba")
    decoder = SpeculativeDecoder(lm, drafters("samba")["itself"], rule="greedy", tie=0.05)
    text = b"".join(decoder.generate_bytes(lm.session(), 40, Sampling(repetition_penalty=3.0)))
    assert text == plain(lm, b"", 40, Sampling(temperature=0.0, repetition_penalty=3.0))[0]
    assert 0 < decoder.stats.redone < decoder.stats.replayed <= 39


def test_stop_texts_end_it_where_plain_decoding_ends():
    """Inside a draft too: the session has read the stop text and nothing behind it."""
    lm = verifier("samba")
    free = Sampling(temperature=0.0, repetition_penalty=3.0)
    whole = plain(lm, b"ab", 60, free)[0]
    for start in (0, 7):
        stop = whole[start : start + 3]
        sampling = Sampling(temperature=0.0, repetition_penalty=3.0, stop=(stop,))
        expected, there = plain(lm, b"ab", 60, sampling)
        for kind in ("itself", "ngram"):
            session = lm.session()
            session.feed(b"ab")
            decoder = SpeculativeDecoder(lm, drafters("samba")[kind], rule="greedy", draft=16)
            generation = decoder.generate_bytes(session, 60, sampling, context=b"ab")
            assert b"".join(generation) == expected
            assert (generation.stop_reason, generation.stop) == ("stop", stop)
            assert session.position == there.position
    never = decoder.generate_bytes(lm.session(), 10, Sampling(stop=(b"\x00never met\x00",)))
    assert len(b"".join(never)) == 10 and never.stop_reason == "length"


def test_text_and_closing_early():
    """`generate` gives whole characters; a closed generation leaves the session behind what was written."""
    lm = verifier("mamba")
    decoder = SpeculativeDecoder(lm, drafters("mamba")["near"], rule="greedy", draft=4)
    sampling = Sampling(valid_utf8=True, repetition_penalty=3.0)
    session = lm.session()
    text = "".join(decoder.generate(session, 50, sampling))
    assert text.encode() == plain(lm, b"", 50, decoder.settings(sampling))[0]
    session = lm.session()
    generation = decoder.generate_bytes(session, 50, sampling)
    got = next(generation) + next(generation)
    stream = generation.stream
    generation.close()
    assert generation.stop_reason == "closed" and session.position == generation.tokens == len(got)
    got += b"".join(decoder.generate_bytes(session, 50 - len(got), sampling, stream=stream))
    assert got.decode(errors="ignore") == text[: len(got.decode(errors="ignore"))]
    assert list(decoder.generate(lm.session(), 0)) == []
    unused = lm.session()
    decoder.generate(unused, 5).close()
    assert unused.position == 0


def test_an_interruption_leaves_the_session_behind_whole_rounds():
    """Also one that comes between a decision and its commit."""

    class Interrupted(NetworkRunner):
        left = 3

        def commit(self, state, trace, keep):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return super().commit(state, trace, keep)

    lm = verifier("samba")
    decoder = SpeculativeDecoder(lm, drafters("samba")["near"], runner=Interrupted(lm.network), draft=4)
    session, got = lm.session(), b""
    generation = decoder.generate_bytes(session, 50)
    try:
        for piece in generation:
            got += piece
    except KeyboardInterrupt:
        assert len(got) > 1
    else:
        pytest.fail("it was not interrupted")
    assert session.position == len(got) and generation.stop_reason == "closed"
    there = lm.session()
    there.feed(got)
    np.testing.assert_allclose(session.logits, there.logits, atol=1e-4)


def test_a_broken_model_is_an_error():
    lm = opinionated(SAMBA)
    with torch.no_grad():
        lm.network.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="weights are damaged"):
        list(SpeculativeDecoder(lm, NgramDrafter()).generate(lm.session(), 5))
    good = verifier("samba")
    broken = SpeculativeDecoder(good, ModelDrafter(lm), draft=4)
    assert len(b"".join(broken.generate_bytes(good.session(), 9))) == 9
    assert broken.stats.drafted == 0


def test_what_cannot_work_is_said():
    lm, codec = verifier("samba"), BpeCodec(MERGES)
    subwords = LanguageModel(MAMBA.replace(vocab_size=codec.vocab_size).build(), codec)
    with pytest.raises(UserError, match="has to be a model of bytes"):
        SpeculativeDecoder(subwords, NgramDrafter())
    with pytest.raises(UserError, match="one of exact, greedy, top_k, got 'lossless'"):
        SpeculativeDecoder(lm, NgramDrafter(), rule="lossless")
    for wrong in ({"top": 0}, {"top": 2.5}, {"tie": 1.0}, {"tie": float("nan")}):
        with pytest.raises(UserError, match=r"top must be a whole number, at least 1, and tie in \[0, 1\)"):
            SpeculativeDecoder(lm, NgramDrafter(), **wrong)
    for draft in (0, -1, 2.5, True, "Adaptive", None, float("inf")):
        with pytest.raises(UserError, match="draft must be a whole number of bytes, at least 1, 'adaptive' or"):
            SpeculativeDecoder(lm, NgramDrafter(), draft=draft)
    decoder = SpeculativeDecoder(lm, NgramDrafter())
    with pytest.raises(UserError, match="another model than the verifier"):
        decoder.generate(verifier("mamba").session(), 5)
    with pytest.raises(UserError, match="0 or more, got -1"):
        decoder.generate(lm.session(), -1)


def test_an_adaptive_draft_goes_by_its_word():
    lm, texts = verifier("samba"), []
    for draft in ("adaptive", AdaptiveDraft()):
        decoder = SpeculativeDecoder(lm, drafters("samba")["near"], draft=draft)
        assert decoder.draft == AdaptiveDraft()
        texts.append(b"".join(decoder.generate_bytes(lm.session(), 60, Sampling(seed=5))))
    assert texts[0] == texts[1] and len(texts[0]) == 60
    assert SpeculativeDecoder(lm, NgramDrafter(), draft=np.int64(5)).draft == 5


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("end", ["close", "exhaust"])
@pytest.mark.parametrize("moved", ["fed", "rewound", "written"])
def test_a_session_that_is_moved_meanwhile_is_left_there_and_it_is_said(moved, end, captured):
    """Neither is what was fed lost, nor is what was written put in front of it."""
    lm = verifier("samba")
    runner = CapturedRunner(lm.network) if captured else None
    decoder = SpeculativeDecoder(lm, NgramDrafter(), rule="greedy", runner=runner)
    session = lm.session()
    empty = session.mark()
    session.feed(b"abc abc ")
    for rounds in (0, 1, 2):
        session.rewind(empty)
        session.feed(b"abc abc ")
        generation = decoder.generate_bytes(session, 30)
        for _ in range(rounds):
            next(generation)
        if moved == "fed":
            session.feed(b"HELLO")
        elif moved == "rewound":
            session.rewind(empty)
        else:
            list(session.generate_bytes(3, seed=2))
        there, position = session.mark(), session.position
        if rounds == 0 and end == "close":
            generation.close()  # nothing was written: nothing to say
        else:
            with pytest.raises(
                UserError, match=r"was fed or moved before the text was ended.*close\(\) the generation"
            ):
                generation.close() if end == "close" else list(generation)
        assert session.mark() is there and session.position == position and generation.tokens >= rounds
    assert len(b"".join(decoder.generate_bytes(session, 9))) == 9  # the decoder is as good as before


def test_a_closed_generation_makes_way_for_more_text():
    """The way that the message names."""
    lm = verifier("samba")
    decoder = SpeculativeDecoder(lm, drafters("samba")["near"], rule="greedy", draft=4)
    session = lm.session()
    generation = decoder.generate_bytes(session, 30)
    got = next(generation) + next(generation)
    generation.close()
    session.feed(b"HELLO")
    assert bytes(session.mark().recent.tolist()) == got + b"HELLO"


def test_the_drafter_reads_what_the_session_remembers():
    """Where no context is given; so drafts come from the first round on, also behind a state file."""
    lm, text = verifier("samba"), b"the cat sat on the mat. " * 60
    session = lm.session()
    session.feed(text)
    streams = {}
    for name, context in (("remembered", None), ("given", text), ("none", b"")):
        generation = SpeculativeDecoder(lm, NgramDrafter()).generate_bytes(session.fork(), 5, context=context)
        (streams[name],) = generation.stream.draft(8, 1.0, [lambda ahead, lane: 0.5])
    assert streams["remembered"].text == streams["given"].text == b"the cat "
    assert streams["none"].text == b""


def test_a_verifier_of_layers_without_a_state():
    layers = {"mlp": SwiGLUConfig(d_hidden=32)}
    lm = opinionated(ModelConfig(vocab_size=256, d_model=16, pattern="mlp", layers=layers))
    plain, drafted = lm.session(), lm.session()
    for session in (plain, drafted):
        session.feed(b"abcabcabc")
    decoder = SpeculativeDecoder(lm, NgramDrafter(), rule="greedy")
    expected = b"".join(plain.generate_bytes(30, temperature=0))
    assert b"".join(decoder.generate_bytes(drafted, 30)) == expected


def test_a_text_that_ends_by_its_bytes():
    lm = verifier("samba")
    session = lm.session()
    text = SpeculativeDecoder(lm, NgramDrafter()).generate_bytes(session, 60, Sampling(seed=1))
    text.most_bytes = 10
    assert len(b"".join(text)) == 10 == session.position
    assert text.stop_reason == "length"


@pytest.mark.parametrize("begun", [False, True])
def test_a_text_whose_session_was_moved_is_closed(begun):
    lm = verifier("samba")
    session = lm.session()
    text = SpeculativeDecoder(lm, NgramDrafter()).generate_bytes(session, 60, Sampling(seed=1))
    if begun:
        next(text)
    session.feed(b"elsewhere")
    with pytest.raises(UserError, match="was fed or moved"):
        next(text)
    assert text.stop_reason == "closed"
