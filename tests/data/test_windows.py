"""What a step sees: a pure function of seed, data and step; every window once; documents kept apart."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.data.windows import Batch, Ring, WindowSampler
from milonga.errors import UserError
from tests.data.helpers import STORY, in_memory, make_corpus, story_codec, subword_corpus

TEXTS = st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=6)
SEPARATORS = st.sampled_from([b"", b"\n", b"<|>"])


def layout(texts: list[bytes], separator: bytes) -> tuple[list[int], set[int]]:
    """The ring as a list of bytes, and where documents start: the definition, written out."""
    ring, starts = [], set()
    for text in texts:
        starts.add(len(ring))
        ring += list(text + separator)
    return ring, starts


def expected_rows(batch: Batch, rows: int) -> list[list[tuple[int, int]]]:
    """(token, target) of each row, whether the batch is packed or not."""
    pairs = list(zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True))
    size = len(pairs) // rows
    return [pairs[row * size : (row + 1) * size] for row in range(rows)]


def check_batch(sampler: WindowSampler, step: int, texts: list[bytes], separator: bytes) -> None:
    ring, starts = layout(texts, separator)
    batch, rows, window = sampler.batch(step), sampler.rows, sampler.window
    bounds = []
    for row, (position, pairs) in enumerate(zip(sampler.positions(step), expected_rows(batch, rows), strict=True)):
        sequences = [row * window]
        for i, (token, target) in enumerate(pairs):
            here, after = (position + i) % len(ring), (position + i + 1) % len(ring)
            assert token == ring[here]
            new_document = sampler.isolate and after in starts and not separator
            assert target == (-100 if new_document else ring[after])
            if sampler.isolate and i > 0 and here in starts:
                sequences.append(row * window + i)
        assert int(batch.first[row]) == len(bounds)
        bounds += sequences
        assert int(batch.last[row]) == len(bounds) - 1
    if len(bounds) == rows:
        assert batch.segments is None
        assert batch.tokens.shape == (rows, window)
    else:
        assert batch.segments is not None
        assert batch.tokens.shape == (1, rows * window)
        assert batch.segments.offsets.tolist() == [*bounds, rows * window]


@settings(max_examples=150)
@given(TEXTS, SEPARATORS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.booleans(), st.data())
def test_a_batch_is_what_the_definition_says(texts, separator, window, rows, step, isolate, data):
    total = sum(map(len, texts)) + len(texts) * len(separator)
    carried = data.draw(st.booleans()) and total >= window * rows
    if total < window:
        window = total
    corpus = in_memory(texts, separator)
    sampler = WindowSampler(corpus, window=window, batch=rows, seed=3, carried=carried, isolate=isolate)
    check_batch(sampler, step, texts, separator)


@settings(max_examples=100)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**64), st.integers(0, 3))
def test_every_window_exactly_once_per_epoch(length, window, rows, seed, epoch):
    window = min(window, length)
    sampler = WindowSampler(in_memory([bytes(length)]), window=window, batch=rows, seed=seed)
    count = sampler.windows_per_epoch
    assert count == length // window
    samples = range(epoch * count, (epoch + 1) * count)
    positions = [p for step in range(samples[0] // rows, samples[-1] // rows + 1) for p in sampler.positions(step)]
    skip = samples[0] % rows
    mine = positions[skip : skip + count]
    seen = Counter((p + i) % length for p in mine for i in range(window))
    assert max(seen.values()) == 1  # nothing twice, so the windows tile
    assert len(seen) == count * window


def test_epochs_differ_in_start_and_order_and_seeds_in_both():
    def epoch(seed: int, number: int) -> list[int]:
        sampler = WindowSampler(in_memory([bytes(1003)]), window=10, batch=100, seed=seed)
        return sampler.positions(number)

    assert len({min(p % 10 for p in epoch(0, n)) for n in range(30)}) > 3
    ranks = {tuple(np.argsort(epoch(seed, n)).tolist()) for seed in range(3) for n in range(3)}
    assert len(ranks) == 9
    assert epoch(1, 2) == epoch(1, 2)


@settings(max_examples=100)
@given(TEXTS, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_carried_rows_go_on_where_they_ended(texts, window, rows, seed, isolate):
    total = sum(map(len, texts))
    window = min(window, total // rows)
    if window == 0:
        return
    sampler = WindowSampler(in_memory(texts), window=window, batch=rows, seed=seed, carried=True, isolate=isolate)
    _, starts = layout(texts, b"")
    steps = int(sampler.steps_per_epoch) + 2
    assert sampler.batch(0).fresh.all()
    for step in range(1, steps):
        now, before = sampler.positions(step), sampler.positions(step - 1)
        assert now == [(p + window) % total for p in before]
        assert sampler.batch(step).fresh.tolist() == [isolate and p in starts for p in now]
    positions = [p for n in range(int(sampler.steps_per_epoch)) for p in sampler.positions(n)]
    seen = Counter((p + i) % total for p in positions for i in range(window))
    assert max(seen.values()) == 1


def test_any_step_costs_the_same_and_batches_repeat_them(tmp_path: Path):
    sampler = WindowSampler(make_corpus(tmp_path, [bytes(range(32, 127)) * 90] * 3), window=64, batch=4, seed=1)
    stream = sampler.batches(start=5)
    for step in (5, 6, 7):
        one, two = next(stream), sampler.batch(step)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.targets, two.targets)
    assert sampler.batch(0).tokens.dtype == sampler.batch(0).targets.dtype == torch.int64

    def seconds(step: int) -> float:
        start = time.perf_counter()
        sampler.batch(step)
        return time.perf_counter() - start

    assert min(seconds(10**12) for _ in range(20)) < 5 * min(seconds(1) for _ in range(20))


def test_views_of_a_corpus_are_sampled_like_corpora_of_their_own(tmp_path: Path):
    texts = [b"abcdefg", b"hij", b"klmnopqrstu", b"vwx"]
    view = make_corpus(tmp_path, texts, b"|").select([2, 0])
    sampler = WindowSampler(view, window=5, batch=2, seed=0)
    for step in range(8):
        check_batch(sampler, step, [texts[2], texts[0]], b"|")


def test_the_ring_reads_round_more_than_once():
    text, starts = Ring(in_memory([b"ab", b"c"], b"-")).read(4, 12)
    assert bytes(text.tolist()) == b"-ab-c-ab-c-a"
    assert starts.tolist() == [1, 4, 6, 9, 11]


def test_identity_names_all_that_decides_what_is_seen():
    def identity(**changes):
        settings = {"window": 4, "batch": 2, "seed": 0, "carried": False, "isolate": True} | changes
        return WindowSampler(in_memory([b"some text here"]), **settings).identity()

    assert identity() == identity()
    for changes in ({"window": 5}, {"batch": 3}, {"seed": 1}, {"carried": True}, {"isolate": False}):
        assert identity(**changes) != identity()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"window": 0}, "window and batch must be at least 1, got window 0"),
        ({"batch": 0}, "got window 4 and batch 0"),
        ({"window": 11}, "has 10 bytes, which is less than one window of 11 bytes"),
        ({"batch": 3, "carried": True}, "less than 3 rows of 4 bytes: give more text, or a smaller window or batch"),
    ],
)
def test_impossible_windows_are_refused(settings_, message):
    with pytest.raises(UserError, match=message):
        WindowSampler(in_memory([b"0123456789"]), **({"window": 4, "batch": 2, "seed": 0} | settings_))


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step must not be negative"):
        WindowSampler(in_memory([b"0123456789"]), window=4, batch=2, seed=0).batch(-1)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("separator", [b"", b"the "])
def test_windows_of_subwords_know_the_bytes_of_their_targets(tmp_path: Path, isolate: bool, separator: bytes):
    codec, texts = story_codec(), [STORY, STORY[7:90], b"a moon"]
    sampler = WindowSampler(
        subword_corpus(tmp_path, texts, codec, separator), window=11, batch=3, seed=0, isolate=isolate
    )
    ring = [int(i) for text in texts for i in [*codec.encode(text), *codec.encode(separator)]]
    assert sampler.ring.length == len(ring)
    assert sampler.identity()["tokenizer"] == codec.digest
    for step in range(6):
        batch = sampler.batch(step)
        for row, position in enumerate(sampler.positions(step)):
            wanted = [ring[(position + i) % len(ring)] for i in range(11)]
            assert batch.tokens.reshape(3, 11)[row].tolist() == wanted
        targets = [target for target in batch.targets.flatten().tolist() if target != -100]
        assert batch.bytes == len(codec.decode(batch.tokens.flatten()))
        assert batch.target_bytes == len(codec.decode(targets))
        assert len(targets) == 33 or (isolate and not separator)


def test_of_bytes_the_bytes_are_their_number(tmp_path: Path):
    sampler = WindowSampler(make_corpus(tmp_path, [b"abcdefgh", b"ijk"]), window=5, batch=4, seed=0)
    batch = sampler.batch(0)
    assert batch.bytes == batch.tokens.numel() == 20
    assert batch.target_bytes == int((batch.targets != -100).sum()) < 20
    assert "tokenizer" not in sampler.identity()


def test_a_text_too_short_in_subwords_is_said_in_tokens(tmp_path: Path):
    corpus = subword_corpus(tmp_path, [b"the cat sat"], story_codec())
    with pytest.raises(UserError, match=r"has \d tokens, which is less than one window of 100 tokens"):
        WindowSampler(corpus, window=100, batch=1, seed=0)
