"""Sessions: what they write has been read, and comes out as whole characters."""

import pytest
import torch

from milonga.errors import UserError
from tests.inference.helpers import CONFIGS, opinionated
from tests.inference.test_session import LM, MODELS, TEXT, same_place


@pytest.mark.parametrize("name", CONFIGS)
def test_generated_bytes_have_been_read(name):
    s = MODELS[name].session()
    s.feed(TEXT[:30])
    t = s.fork()
    written = b"".join(s.generate_bytes(40, seed=3))
    assert len(written) == 40
    for byte in written:
        t.feed(bytes([byte]))
    assert same_place(s, t)


def test_text_and_bytes_of_one_seed_agree_and_seeds_differ():
    start = LM.session()
    start.feed(b"once")
    texts = {seed: b"".join(start.fork().generate_bytes(60, seed=seed)) for seed in range(4)}
    assert len(set(texts.values())) == 4
    for seed, expected in texts.items():
        s = start.fork()
        text = "".join(s.generate(60, seed=seed))
        assert text + s.pending.decode(errors="replace") == expected.decode(errors="replace")
        assert b"".join(start.fork().generate_bytes(60, seed=seed)) == expected


def test_greedy_needs_no_seed():
    texts = {b"".join(LM.session().generate_bytes(30, temperature=0, seed=seed)) for seed in (0, 1, None)}
    assert len(texts) == 1


def test_closing_early_leaves_the_session_behind_what_was_yielded():
    s = LM.session()
    s.feed(b"once upon a time")
    t = s.fork()
    pieces = s.generate_bytes(100, seed=1)
    taken = b"".join(next(pieces) for _ in range(5))
    pieces.close()
    assert s.position == 16 + 5
    for byte in taken:
        t.feed(bytes([byte]))
    assert same_place(s, t)
    begun = s.pending
    pieces = s.generate(100, seed=2)
    text = next(pieces) + next(pieces)
    pieces.close()
    expected = b"".join(t.fork().generate_bytes(s.position - t.position, seed=2))
    for byte in expected:
        t.feed(bytes([byte]))
    assert same_place(s, t)
    assert text + s.pending.decode(errors="replace") == (begun + expected).decode(errors="replace")


def test_nothing_is_drawn_before_it_is_asked_for():
    s = LM.session()
    s.generate(10)
    pieces = s.generate(10)
    assert s.position == 0
    next(pieces)
    assert s.position > 0
    assert list(s.generate(0)) == []
    assert list(s.generate_bytes(0)) == []


def test_wrong_arguments_of_generate_are_told_at_once():
    for call in (LM.session().generate, LM.session().generate_bytes):
        with pytest.raises(UserError, match="number of bytes"):
            call(-1)
        with pytest.raises(UserError, match="top_p"):
            call(3, top_p=2.0)


class _Parrot(torch.nn.Module):
    """The network with its head bent so that it writes a given text, whatever it reads."""

    def __init__(self, network, text):
        super().__init__()
        self.embedding, self.config, self.network = network.embedding, network.config, network
        self.text = text

    def init_state(self, batch):
        return self.network.init_state(batch), torch.zeros(batch, dtype=torch.int64)

    def forward(self, tokens, state, *, logits):
        output = self.network(tokens, state[0], logits=logits)
        at = state[1] + tokens.shape[1]
        bent = torch.full_like(output.logits, -50.0)
        bent[..., self.text[int(at) % len(self.text)]] = 50.0
        return output._replace(logits=bent, state=(output.state, at))


def test_a_character_is_never_split():
    text = "x€Ω𝄞é"
    lm = opinionated()
    lm.network = _Parrot(lm.network, text.encode())
    s = lm.session()
    s.feed(b"x")
    assert list(s.generate(3)) == ["€"]
    assert list(s.generate(1)) == []
    assert s.pending == "Ω".encode()[:1]
    twin = s.fork()
    assert list(s.generate(2)) == ["Ω"]
    assert s.pending == "𝄞".encode()[:1]
    assert list(twin.generate(1)) == ["Ω"]
    twin.feed("𝄞".encode()[:2])
    assert twin.pending == "𝄞".encode()[:2]
    assert list(twin.generate(2)) == ["𝄞"]


def test_bytes_that_are_no_text_come_out_as_replacement_characters():
    lm = opinionated()
    lm.network = _Parrot(lm.network, b"x\xffa\xe2\x82b")
    s = lm.session()
    s.feed(b"x")
    assert "".join(s.generate(5)) == "\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}b"
