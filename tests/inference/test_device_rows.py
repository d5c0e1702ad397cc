"""Rounds on the device write what rounds from the host write: the same bytes, whatever drafts. Here without graphs."""

import gc
import math
import subprocess
import sys
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.data.bpe import BpeCodec
from milonga.errors import UserError
from milonga.inference import device_drafting, device_rows, device_verification, draft_length
from milonga.inference.captured import CapturedRunner
from milonga.inference.device_drafting import preserving
from milonga.inference.device_rows import DeviceRows
from milonga.inference.draft_length import AdaptiveDraft, Plan
from milonga.inference.drafters import NgramDrafter
from milonga.inference.language_model import LanguageModel
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.sampling import Sampling
from milonga.inference.speculative import SpeculativeDecoder
from milonga.inference.speculative_rows import SpeculationStats, SpeculativeRows
from milonga.state import merge, named_tensors
from tests.gpu.helpers import WIDE, scaled, written_both_ways
from tests.inference.helpers import CONFIGS, FAILURES, MAMBA, SAMBA, assert_undone, opinionated

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b" the", b"m"), (b"a", b"b"), (b"ab", b"c"), (b"c", b"a")]
FEW = settings(max_examples=4)
PROMPTS = st.binary(max_size=40) | st.text("abc the\n", max_size=40).map(str.encode)
KINDS = ("near", "subwords", "ngram")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def tokens_enough(monkeypatch):
    """The host draws until a draft is long enough: so here the device may draw as many tokens as bytes."""
    monkeypatch.setattr(draft_length, "round", lambda number: int(10 * number + 1), raising=False)


@cache
def verifier():
    return opinionated(SAMBA)


@cache
def model(kind):
    if kind == "near":
        near = opinionated(SAMBA)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in near.network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.abs().mean() * 0.3)
        return near
    codec = BpeCodec(MERGES)
    subwords = LanguageModel(MAMBA.replace(vocab_size=codec.vocab_size).build(seed=3), codec)
    with torch.no_grad():
        subwords.network.embedding.weight.mul_(20)
    return subwords


def decoder(kind, rule, draft, *, device, rows=1, lm=None):
    lm = lm or verifier()
    if kind == "ngram":
        drafter = NgramDrafter(longest=8, shortest=1)
    else:
        drafter = ModelDrafter(model(kind), CapturedRunner(model(kind).network, rows) if device else None)
    runner = CapturedRunner(lm.network, rows) if device else None
    return SpeculativeDecoder(lm, drafter, rule=rule, draft=draft, runner=runner)


def write(decoder, prompts, limits, settings, until=None):
    """Texts written together: -> (texts, state, logits, the rows)."""
    sessions = [decoder.verifier.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.feed(prompt)
    marks = [session.mark() for session in sessions]
    rows = decoder.rows(
        merge([mark.state for mark in marks]),
        torch.stack([mark.logits for mark in marks]),
        decoder.drafter.start(prompts),
        [
            session.sampler(decoder.settings(each), n)
            for session, each, n in zip(sessions, settings, limits, strict=True)
        ],
        limits,
        until,
    )
    texts = [b""] * len(prompts)
    while not rows.done:
        texts = [text + more for text, more in zip(texts, rows.round(), strict=True)]
    return texts, *rows.finish(), rows


@every_kind
@pytest.mark.parametrize("rule", ["greedy", "exact"])
@FEW
@given(data=st.data())
def test_the_device_writes_what_the_host_writes(kind, rule, data):
    """Texts of a batch, their states and the logits behind them, and what is counted."""
    prompts = data.draw(st.lists(PROMPTS, min_size=1, max_size=3))
    limits = data.draw(st.lists(st.integers(0, 40), min_size=len(prompts), max_size=len(prompts)))
    draft = data.draw(st.integers(1, 20))
    chosen = data.draw(st.sampled_from([{}, {"top_k": 20}, {"top_p": 0.9, "top_k": 50}]))
    ends = data.draw(st.sampled_from([b"", b"a", b" \n\0"]))
    each = [Sampling(temperature=0.8, seed=index, **chosen) for index in range(len(prompts))]
    found = []
    for device in (False, True):
        mine = decoder(kind, rule, draft, device=device, rows=len(prompts))
        texts, state, logits, rows = write(mine, prompts, limits, each, [lambda byte: byte in ends] * len(prompts))
        assert isinstance(rows, DeviceRows) == device and isinstance(rows, SpeculativeRows)
        stats = {name: value for name, value in vars(mine.stats).items() if "seconds" not in name}
        found.append((texts, stats, state, logits))
    (expected, counted, state, logits), (texts, stats, mine, behind) = found
    assert texts == expected
    assert stats == counted
    np.testing.assert_allclose(behind.numpy(), logits.numpy(), atol=1e-4)
    for part, other in zip(mine, state, strict=True):
        for a, b in zip(part, other, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "draft", "settings"), [("bytes", 40, {}), ("subwords", 1, {"top_k": 30, "top_p": 0.9})]
)
def test_what_is_compared_on_a_gpu_is_so_here(kind, draft, settings, monkeypatch):
    monkeypatch.undo()
    lm = LanguageModel(scaled(WIDE, device="cpu"))
    device, host = written_both_ways(lm, kind, "exact", draft, 50, temperature=0.8, **settings)
    assert device == host and [len(text) for text in host] == [50] * 3


@every_kind
def test_greedy_is_plain_greedy(kind):
    """Bytes too close to call included: a tie of three tenths leaves many of them open."""
    lm, redone = verifier(), 0
    for tie in (None, 0.3):
        for prompt in (b"", b"abc the mat", b" the them"):
            session, other = lm.session(), lm.session()
            session.feed(prompt)
            other.feed(prompt)
            drafter = decoder(kind, "greedy", 7, device=True).drafter
            fast = SpeculativeDecoder(lm, drafter, rule="greedy", draft=7, tie=tie, runner=CapturedRunner(lm.network))
            text = b"".join(fast.generate_bytes(session, 40, context=prompt))
            assert text == b"".join(other.generate_bytes(40, temperature=0.0))
            assert session.position == other.position
            redone += fast.stats.redone
    assert redone > 0


@every_kind
def test_sessions_take_turns(kind):
    """Two generations of one decoder, a byte or more each in turn: each writes what it writes alone."""
    lm, mine = verifier(), decoder(kind, "exact", 6, device=True)
    prompts, alone = [b"abc the", b" the mat\n"], []
    for number, prompt in enumerate(prompts):
        session = lm.session()
        session.feed(prompt)
        alone.append(b"".join(mine.generate_bytes(session, 30, Sampling(seed=number), context=prompt)))
    running = []
    for number, prompt in enumerate(prompts):
        session = lm.session()
        session.feed(prompt)
        running.append(mine.generate_bytes(session, 30, Sampling(seed=number), context=prompt))
    texts = [b"", b""]
    for _ in range(30):
        texts = [text + next(generation, b"") for text, generation in zip(texts, running, strict=True)]
    assert texts == alone


@pytest.mark.parametrize("kind", ["near", "subwords"])
def test_a_stream_goes_on(kind):
    """A later call on the stream of an earlier one; stopped and closed on the way."""
    lm, sampling = verifier(), Sampling(seed=5, temperature=0.7)
    texts = []
    for device in (False, True):
        mine = decoder(kind, "exact", 6, device=device)
        session = lm.session()
        first = mine.generate_bytes(session, 25, sampling)
        text = b"".join(first)
        second = mine.generate_bytes(session, 25, sampling, stream=first.stream)
        text += next(second) + next(second)
        second.close()
        text += b"".join(mine.generate_bytes(session, 25, sampling, stream=second.stream))
        texts.append((text, b"".join(session.generate_bytes(5, sampling))))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("where", FAILURES)
def test_a_round_that_fails_is_undone(where):
    assert_undone(decoder("near", "exact", 6, device=True), where)


def test_what_is_preserved_is_so_after_an_interruption():
    value = torch.arange(3.0)

    def work():
        value.zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preserving(work, lambda: [value])()
    assert value.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", ["near", "subwords"])
def test_drafts_longer_than_a_text_may_still_get(kind):
    """More tokens than bytes are left are not drawn, and the buffers are those of the first round up to the end."""
    found = []
    for device in (False, True):
        mine = decoder(kind, "exact", 40, device=device)
        texts, *_ = write(mine, [b"abc the mat"], [90], [Sampling(temperature=0.8, seed=3)])
        found.append((texts, mine.stats.accepted, mine.stats.rounds))
    assert found[0] == found[1] and len(mine._buffers._made) == 1


def started(decoder, prompts, limit):
    """Rows behind prompts, each with its seed; and the drafter's stream."""
    sessions = [decoder.verifier.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.feed(prompt)
    marks = [session.mark() for session in sessions]
    samplers = [session.sampler(decoder.settings(Sampling(seed=seed)), limit) for seed, session in enumerate(sessions)]
    state, logits = merge([mark.state for mark in marks]), torch.stack([mark.logits for mark in marks])
    stream = decoder.drafter.start(prompts)
    return decoder.rows(state, logits, stream, samplers, [limit] * len(prompts)), stream


@every_kind
def test_buffers_that_were_not_used_for_longest_go(kind, monkeypatch):
    """Drafts of more lengths than buffers are kept for, a round each in turn: every text is what it is alone, and what
    went is free at once."""
    monkeypatch.undo()
    monkeypatch.setattr(device_rows, "KEPT", 2)
    mine, lengths, alone = decoder(kind, "exact", 6, device=True), (31, 39, 47), []
    for mine.draft in lengths:
        texts, *_ = write(mine, [b"abc the"], [50], [Sampling(seed=0)])
        alone += texts
    assert [limit for _, limit, _ in mine._buffers._made] == [39, 47]
    oldest = [weakref.ref(buffers) for buffers in next(iter(mine._buffers._made.values())) if buffers is not None]
    runs = [started(mine, [b"abc the"], 50)[0] for _ in lengths]
    written = [b""] * len(lengths)
    gc.disable()
    try:
        while not all(rows.done for rows in runs):
            for index, (rows, mine.draft) in enumerate(zip(runs, lengths, strict=True)):
                written[index] += rows.round()[0]
                assert len(mine._buffers._made) <= 2
        assert [reference() for reference in oldest] == [None] * len(oldest)
    finally:
        gc.enable()
    assert written == alone


@every_kind
@pytest.mark.parametrize("draft", [6, 40], ids=["the same buffers", "others"])
def test_texts_that_nobody_holds_are_forgotten(kind, draft):
    """But for the stream, where somebody holds that: it goes on behind what was written, with drafts as good."""
    mine = decoder(kind, "exact", 6, device=True)
    rows, stream = started(mine, [b"abc the"], 120)
    text = b""
    while len(text) < 60:
        text += rows.round()[0]
    assert len(mine._buffers._owners) == 1
    reference = weakref.ref(rows)
    del rows
    assert reference() is None and not mine._buffers._owners
    mine.draft, found = draft, []
    for how in ({"stream": stream}, {"context": b"abc the" + text}):
        session, mine.stats = mine.verifier.session(), SpeculationStats()
        session.feed(b"abc the" + text)
        found.append(
            (
                b"".join(mine.generate_bytes(session, 50, Sampling(seed=4), **how)),
                mine.stats.drafted,
                mine.stats.accepted,
            )
        )
    assert found[0] == found[1]
    if kind != "ngram":
        whole = b"abc the" + text + found[0][0]
        _, behind, count = stream._read(whole[: stream._bytes[0]])
        assert count == stream._lengths[0] > 20
        np.testing.assert_allclose(stream.behind.numpy(), behind.numpy(), atol=1e-4)


def test_adaptive_drafts_have_no_more_tokens_than_bytes(monkeypatch):
    monkeypatch.undo()
    mine = decoder("near", "exact", AdaptiveDraft(round=20.0, token=0.001, longest=64), device=True)
    rows = write(mine, [b"abc the mat"], [90], [Sampling(temperature=0.8, seed=3)])[-1]
    assert mine.draft.tokens(rows._rows[0].pace.acceptance, 1.0) == draft_length.LONGEST
    assert mine.stats.written == 89


def test_a_broken_verifier_is_told():
    lm = opinionated(SAMBA)
    mine = decoder("near", "exact", 6, device=True, lm=lm)
    session = lm.session()
    generation = mine.generate_bytes(session, 60, Sampling(seed=1))
    next(generation), next(generation)
    with torch.no_grad():
        lm.network.head.weight.fill_(float("nan"))
    next(generation)  # was launched before that
    with pytest.raises(UserError, match="weights are damaged"):
        next(generation)


@every_kind
@pytest.mark.parametrize("rounds", [3, 100], ids=["ended amid", "to the end"])
def test_a_round_that_is_launched_ahead_is_as_one_that_is_not(kind, rounds):
    """The same texts; and one that nobody asks for in the end is undone."""
    found = []
    for ahead in (False, True):
        mine = decoder(kind, "exact", 6, device=True, rows=2)
        rows, _ = started(mine, [b"abc the mat", b"the cat"], 40)
        texts = [b"", b""]
        for _ in range(rounds):
            texts = [text + more for text, more in zip(texts, rows.round(), strict=True)]
            if ahead:
                rows.ahead()
        state, logits = rows.finish()
        found.append((texts, [tensor for _, tensor in named_tensors(state)], logits, mine.stats.accepted))
    assert found[0][0] == found[1][0] and found[0][3] == found[1][3]
    for mine, its in zip([*found[0][1], found[0][2]], [*found[1][1], found[1][2]], strict=True):
        assert torch.equal(mine, its)


def test_nothing_is_differentiated(monkeypatch):
    """Also outside of inference mode: a GPU's kernels for steps and pieces are taken only where nothing is."""
    enabled = []
    for where, name in (
        (device_drafting, "read_piece"),
        (device_drafting, "decode_step"),
        (device_verification, "read_piece"),
    ):
        own = getattr(where, name)

        def passes(*given, own=own):
            enabled.append(torch.is_grad_enabled())
            return own(*given)

        monkeypatch.setattr(where, name, passes)
    mine = decoder("subwords", "exact", 6, device=True)
    session = mine.verifier.session()
    assert len(b"".join(mine.generate_bytes(session, 40, Sampling(seed=1), context=b"abc"))) == 40
    assert len(enabled) > 20 and not any(enabled)


SHARED = (b"the cat sat on a mat ", b"abc the mat, on the ")


@every_kind
@pytest.mark.parametrize("rule", ["greedy", "exact"])
def test_texts_that_share_the_buffers_turn_back(kind, rule, monkeypatch):
    """Each text launches its next round and then has to leave for the other: as if it were alone, in every round."""
    monkeypatch.undo()
    length = AdaptiveDraft(round=0.3, token=0.1, longest=12)
    for seed in range(1 if rule == "greedy" else 3):
        alone = []
        for prompt in SHARED:
            rows, _ = started(decoder(kind, rule, length, device=True), [prompt + b"ab" * seed], 40)
            alone.append([rows.round()[0] for _ in range(40)])
        mine = decoder(kind, rule, length, device=True)
        both, texts = [started(mine, [prompt + b"ab" * seed], 40)[0] for prompt in SHARED], [[], []]
        for _ in range(40):
            for text, rows in zip(texts, both, strict=True):
                text.append(rows.round()[0])
                rows.ahead()
        assert texts == alone


def test_buffers_in_use_stay(monkeypatch):
    """A text that goes on all the time keeps its buffers, whatever comes and goes beside it."""
    made, own = [], device_rows.DeviceBuffers._make
    monkeypatch.setattr(device_rows.DeviceBuffers, "_make", lambda self, *key: made.append(key) or own(self, *key))
    mine = decoder("ngram", "greedy", 6, device=True, rows=1)
    lasting, _ = started(mine, [b"abc the mat"], 60)
    lasting.round()
    for rows in range(2, 2 + 2 * device_rows.KEPT):
        lasting.round()
        other, _ = started(mine, [b"the cat"] * rows, 3)
        for _ in range(2):
            other.round()
    assert len([key for key in made if key[0] == 1]) == 1


@pytest.mark.parametrize("each", [1, 2])
def test_a_text_that_goes_on_without_drafts_is_caught_up(each):
    mine = decoder("subwords", "exact", 6, device=True)
    session = mine.verifier.session()
    session.feed(b"abc ")
    generation = mine.generate_bytes(session, 0, Sampling(seed=1), context=b"abc ")
    stream, text = generation.stream, b""
    for _ in range(140):
        text += b"".join(mine.generate_bytes(session, each, Sampling(seed=1), stream=stream))
    text += b"".join(mine.generate_bytes(session, 30, Sampling(seed=1), stream=stream))
    assert len(text) == 140 * each + 30 and len(stream.tail_ids()[0]) < 64
    assert session.position == 4 + len(text)


def test_an_interrupt_is_not_lost_where_nobody_asks_again(monkeypatch):
    """It comes when the generation is closed, and the session stands behind what was given out."""
    mine = decoder("near", "exact", 6, device=True)
    session = mine.verifier.session()
    generation = mine.generate_bytes(session, 60, Sampling(seed=1), context=b"abc")
    text = next(generation)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DeviceRows, "ahead", interrupted)
    text += next(generation)
    with pytest.raises(KeyboardInterrupt):
        generation.close()
    assert session.position == len(text)


def test_the_first_byte_does_not_wait_for_a_round(monkeypatch):
    rounds, own = [], DeviceRows._take_off
    monkeypatch.setattr(DeviceRows, "_take_off", lambda self: rounds.append(1) or own(self))
    mine = decoder("near", "exact", 6, device=True)
    generation = mine.generate_bytes(mine.verifier.session(), 60, Sampling(seed=1), context=b"abc")
    assert len(next(generation)) == 1 and not rounds
    assert next(generation) and len(rounds) == 2


def test_rounds_behind_the_end_give_nothing():
    mine = decoder("near", "exact", 6, device=True)
    rows, _ = started(mine, [b"abc"], 40)
    rows.round()
    rows.finish()
    rows.ahead()
    assert rows.done and rows.round() == [b""] and rows._flight is None


OPEN = """
from milonga.inference import LanguageModel, Sampling
from milonga.inference.drafters import NgramDrafter
from milonga.inference.speculative import SpeculativeDecoder
from tests.inference.helpers import MAMBA

lm = LanguageModel(MAMBA.build(seed=0))
generation = SpeculativeDecoder(lm, NgramDrafter()).generate_bytes(lm.session(), 60, Sampling(seed=1))
print(len(next(generation) + next(generation)))
"""


def test_a_process_may_end_amid_a_speculation():
    done = subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip().isdigit() and not done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "sampling", "rule"),
    [
        ("growing", Sampling(), "exact"),
        ("samba", Sampling(repetition_penalty=2.0), "exact"),
        ("samba", Sampling(), "top_k"),
    ],
    ids=["growing", "penalty", "lossy"],
)
def test_what_the_device_does_not_do_is_done_from_the_host(name, sampling, rule):
    lm = opinionated(CONFIGS[name])
    mine = SpeculativeDecoder(lm, NgramDrafter(), rule=rule, runner=CapturedRunner(lm.network))
    *_, rows = write(mine, [b"abc"], [9], [sampling])
    assert not isinstance(rows, DeviceRows)


@pytest.mark.parametrize("rule", ["greedy", "exact"])
@every_kind
def test_adaptive_drafts_follow_from_text_and_seed(kind, rule, monkeypatch):
    """The same text twice, alone and beside others."""
    monkeypatch.undo()
    mine = decoder(kind, rule, AdaptiveDraft(round=1.5, token=0.1), device=True)
    both = decoder(kind, rule, AdaptiveDraft(round=1.5, token=0.1), device=True, rows=2)
    prompts, each = [b"abc the mat ", b"aaaa"], [Sampling(seed=3), Sampling(seed=4)]
    first = write(mine, prompts[:1], [60], each[:1])[0]
    assert first == write(mine, prompts[:1], [60], each[:1])[0]
    assert write(both, prompts, [60, 33], each)[0][0] == first[0]
    assert mine.stats.written > mine.stats.rounds


def test_the_best_number_of_tokens():
    """By the formula; and it grows with what stands."""
    rule = AdaptiveDraft(round=2.0, token=0.2, longest=8)
    for acceptance, size in ((0.0, 1.0), (0.5, 3.0), (0.8, 3.5), (0.95, 1.0), (1.0, 4.0)):
        rates = [
            sum(acceptance**power for power in range(min(int(count * size), 15) + 1)) / (2.0 + 0.2 * count)
            for count in range(1, 9)
            if (count * size).is_integer()
        ]
        if len(rates) == 8:
            assert rule.tokens(acceptance, size) == rates.index(max(rates)) + 1
    assert rule.tokens(0.3, 3.5) < rule.tokens(0.8, 3.5) < rule.tokens(0.97, 3.5) == 4
    pace = draft_length.Pace()
    short = pace.plan(rule, 3.5)
    for _ in range(50):
        pace.saw(8, 8)
    assert pace.acceptance > 0.95 and short.tokens < pace.plan(rule, 3.5).tokens and pace.plan(rule, 3.5).bytes == 15
    assert pace.plan(9, 1.0) == Plan(9, 9)
    for wrong in ({"round": 0.0}, {"round": math.inf}, {"token": math.nan}, {"token": -1.0}):
        with pytest.raises(UserError, match="prices must be above 0 and finite"):
            AdaptiveDraft(**wrong)
    for longest in (0, 2.5, math.inf, True):
        with pytest.raises(UserError, match="longest must be a whole number, 1 or more"):
            AdaptiveDraft(longest=longest)
