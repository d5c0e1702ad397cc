"""Sessions: reading and writing one text, however it comes."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milonga.errors import UserError
from milonga.inference import session as session_module
from milonga.models.pretrained import save_weights
from milonga.state import map_tensors, named_tensors
from tests.inference.helpers import CONFIGS, GROWING, SAMBA, opinionated

RELATIVE_RMS, WORST_BITS = 2e-6, 1e-4
MODELS = {name: opinionated(config) for name, config in CONFIGS.items()}
LM = MODELS["samba"]
TEXT = bytes(np.random.default_rng(1).choice(np.arange(97, 123, dtype=np.uint8), 700))


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces of the network's even in short texts."""
    monkeypatch.setattr(session_module, "PIECE", 50)


def same_place(one, two):
    """Whether two sessions hold the same bits."""
    mine, yours = one.mark(), two.mark()
    pairs = zip(named_tensors((mine.state, mine.logits)), named_tensors((yours.state, yours.logits)), strict=True)
    return (mine.position, mine.pending) == (yours.position, yours.pending) and all(
        name == other and torch.equal(a, b) for (name, a), (other, b) in pairs
    )


def assert_same_bits(bits, expected):
    error = np.abs(bits - expected)
    assert np.sqrt((error**2).mean() / (expected**2).mean()) <= RELATIVE_RMS
    assert error.max() <= WORST_BITS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_session_predicts_uniformly_and_models_do_not(name):
    bits = MODELS[name].session().score(TEXT)
    assert bits.dtype == np.float64
    assert bits.shape == (len(TEXT),)
    assert bits[0] == 8.0
    assert bits.std() > 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_bits_are_those_of_one_pass_of_the_network_in_float64(name):
    network = CONFIGS[name].build().double()
    with torch.no_grad():
        network.embedding.weight.copy_(MODELS[name].network.embedding.weight)
        network.load_state_dict({k: v.double() for k, v in MODELS[name].network.state_dict().items()})
        logits = network(torch.tensor([list(TEXT)])).logits[0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(list(TEXT))[1:], reduction="none")
    assert_same_bits(MODELS[name].session().score(TEXT)[1:], nats.numpy() / np.log(2))


@given(data=st.data())
@settings(max_examples=12)
@pytest.mark.parametrize("name", CONFIGS)
def test_split_law_of_feed_and_score(name, data):
    lm = MODELS[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(TEXT)), max_size=12)))
    expected = lm.session().score(TEXT)
    s = lm.session()
    bits, scored = [], []
    for start, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True):
        if data.draw(st.booleans()):
            bits.append(s.score(TEXT[start:end]))
            scored.extend(range(start, end))
        else:
            s.feed(TEXT[start:end])
        assert s.position == end
    if scored:
        assert_same_bits(np.concatenate(bits), expected[scored])
    assert_same_bits(s.score(b"to be or not to be"), lm.session().score(TEXT + b"to be or not to be")[len(TEXT) :])


@pytest.mark.parametrize("name", CONFIGS)
def test_byte_by_byte_is_the_same(name):
    lm, s = MODELS[name], MODELS[name].session()
    bits = np.concatenate([s.score(TEXT[i : i + 1]) for i in range(200)])
    assert_same_bits(bits, lm.session().score(TEXT[:200]))


def test_texts_longer_than_a_piece(small_pieces):
    s, t = LM.session(), LM.session()
    bits = s.score(TEXT)
    t.feed(TEXT)
    assert same_place(s, t) or np.allclose(s.mark().logits, t.mark().logits, atol=1e-6)
    assert s.position == t.position == len(TEXT)
    assert_same_bits(bits, np.concatenate([LM.session().score(TEXT[:1]), bits[1:]]))


def test_piece_size_does_not_change_the_bits(monkeypatch):
    expected = LM.session().score(TEXT)
    for size in (1, 7, 64):
        monkeypatch.setattr(session_module, "PIECE", size)
        assert_same_bits(LM.session().score(TEXT), expected)


@pytest.mark.parametrize(
    "text",
    [
        "Füße".encode(),
        "Füße",
        bytearray("Füße".encode()),
        memoryview("Füße".encode()),
        np.frombuffer("Füße".encode(), np.uint8),
        np.array(list("Füße".encode()), np.int64),
        torch.tensor(list("Füße".encode())),
    ],
    ids=lambda text: type(text).__name__,
)
def test_what_text_may_be(text):
    s = LM.session()
    s.feed(text)
    t = LM.session()
    t.feed("Füße".encode())
    assert s.position == 6
    assert same_place(s, t)
    assert np.array_equal(LM.session().score(text), LM.session().score("Füße".encode()))


@pytest.mark.parametrize("call", ["feed", "score"])
@pytest.mark.parametrize(
    "text", [np.array([1, 256]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), np.uint8), "\ud800"], ids=repr
)
def test_what_text_may_not_be_leaves_the_session_alone(text, call):
    s = LM.session()
    s.feed(b"abc")
    before = s.fork()
    with pytest.raises(UserError, match="text:"):
        {"feed": s.feed, "score": s.score}[call](text)
    assert same_place(s, before)


@pytest.mark.parametrize("empty", [b"", "", np.empty(0, np.uint8)], ids=repr)
def test_nothing_may_be_read(empty):
    s, t = LM.session(), LM.session()
    s.feed(empty)
    assert s.score(empty).shape == (0,)
    assert same_place(s, t)
    s.feed(TEXT[:20])
    t.feed(TEXT[:20])
    s.feed(empty)
    assert same_place(s, t)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fork_goes_its_own_way(name):
    s = MODELS[name].session()
    s.feed(TEXT[:33])
    t = s.fork()
    assert same_place(s, t)
    t.feed(b"one way")
    s.feed(b"the other way")
    u = MODELS[name].session()
    u.feed(TEXT[:33])
    u.feed(b"one way")
    assert same_place(t, u)
    assert not same_place(s, t)


@pytest.mark.parametrize("name", CONFIGS)
def test_forks_share_no_memory(name):
    s = MODELS[name].session()
    s.feed(TEXT[:33])
    t, before = s.fork(), s.fork()
    canary = t.mark()
    map_tensors(lambda tensor: tensor.fill_(13), (canary.state, canary.logits))
    assert same_place(s, before)
    expected = before.score(b"canary")
    assert np.array_equal(s.score(b"canary"), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_rewinding_forgets_what_was_read_since(name):
    s = MODELS[name].session()
    s.feed(TEXT[:40])
    mark, twin = s.mark(), s.fork()
    for _ in range(2):
        first = s.score(TEXT[40:90])
        list(s.generate(12, seed=9))
        s.rewind(mark)
        assert same_place(s, twin)
        assert np.array_equal(s.score(TEXT[40:90]), first)
        s.rewind(mark)
    with pytest.raises(ValueError, match="another model"):
        opinionated(seed=1).session().rewind(mark)


def test_progress_tells_the_bytes_of_this_call(small_pieces):
    s, seen = LM.session(), []
    s.feed(TEXT[:70])
    s.feed(TEXT, progress=seen.append)
    assert seen[-1] == len(TEXT)
    assert seen == sorted(set(seen))
    assert max(b - a for a, b in pairwise([0, *seen])) <= 50
    again = []
    s.score(TEXT, progress=again.append)
    assert again[-1] == len(TEXT)


@given(st.integers(0, 5000), st.integers(0, 3000))
@settings(max_examples=50)
def test_pieces_end_at_multiples_and_come_in_few_lengths(before, count):
    """On a CPU: whole pieces, powers of two, or shorter than 8, so that few products are compiled and kept."""
    s, ids = LM.session(), np.zeros(count, np.uint8)
    s._here = replace(s.mark(), position=before)
    lengths = []
    for piece in s._pieces(ids, 256):
        lengths.append(len(piece))
        s._here = replace(s.mark(), position=s.position + len(piece))
    assert sum(lengths) == count
    assert all(length in (8, 16, 32, 64, 128, 256) or length < 8 for length in lengths)
    reached = set(np.cumsum([before, *lengths]).tolist())
    assert set(range(-(-before // 256) * 256, before + count + 1, 256)) <= reached


def test_a_gpu_reads_in_longer_pieces():
    assert session_module.piece_length(torch.device("cpu")) == 256
    assert session_module.piece_length(torch.device("cuda", 1)) == 8192


def test_ids_may_be_read_and_are_checked():
    s, t = LM.session(), LM.session()
    s.read_ids(np.frombuffer(TEXT[:90], np.uint8))
    t.feed(TEXT[:90])
    assert same_place(s, t)
    with pytest.raises(UserError, match="256"):
        s.read_ids(np.array([256]))
    assert s.position == 90


def test_an_interrupted_feed_leaves_a_session_behind_a_whole_piece(small_pieces, monkeypatch):
    s, t, calls = LM.session(), LM.session(), []
    read = session_module.Session._read

    def interrupted(self, ids, wanted="last"):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, ids, wanted)

    monkeypatch.setattr(session_module.Session, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.feed(TEXT)
    monkeypatch.undo()
    assert s.position == 2 * calls[0]
    monkeypatch.setattr(session_module, "PIECE", 50)
    t.feed(TEXT[: s.position])
    assert same_place(s, t)


def test_nbytes_is_what_the_tensors_hold_and_grows_for_full_attention_only():
    s = LM.session()
    held = s.nbytes
    assert held == sum(t.numel() * t.element_size() for _, t in named_tensors((s.mark().state, s.mark().logits)))
    s.feed(TEXT)
    assert s.nbytes == held
    g = MODELS["growing"].session()
    g.feed(TEXT[:100])
    before = g.nbytes
    g.feed(TEXT)
    assert g.nbytes > before > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_session_keeps_no_more_memory_than_it_says(name):
    s = MODELS[name].session()
    s.score(TEXT)
    tensors = [tensor for _, tensor in named_tensors((s.mark().state, s.mark().logits))]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    assert sum(kept.values()) <= s.nbytes


MEMORY = """
import sys
import psutil
from milonga.inference import load
lm = load(sys.argv[1], device="cpu")
s = lm.session()
text = bytes(range(32, 127)) * 400
process = psutil.Process()
for _ in range(6):
    s.feed(text)
    s.score(text[:5000])
before = process.memory_info().rss
while s.position < (1 << 20):
    s.feed(text)
    s.score(text[:5000])
print(process.memory_info().rss - before, s.position)
"""


def test_memory_stays_flat_over_a_megabyte(tmp_path):
    save_weights(LM.network, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    growth, position = map(int, done.stdout.split())
    assert position >= 1 << 20
    assert growth < 8 << 20


def test_configs_cover_a_growing_state():
    assert GROWING.layers["swa"].window is None
    assert SAMBA.layers["swa"].window == 7
