"""Sessions whose single tokens are read in shared buffers: what they say and hold is what they would without."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.inference import Session, session
from milonga.inference.in_place import InPlace
from milonga.state import named_tensors
from tests.inference.helpers import opinionated

LM = opinionated()


def shared() -> InPlace:
    return InPlace(LM.network)


def make(in_place: InPlace | None) -> Session:
    return Session(LM.network, LM.codec, lambda: LM.fingerprint, in_place)


def same(a: Session, b: Session) -> None:
    """Positions and everything said are equal; states and logits but for rounding."""
    assert (a.position, a.bytes_read, a.pending) == (b.position, b.bytes_read, b.pending)
    np.testing.assert_allclose(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    for (name, mine), (_, its) in zip(named_tensors(a.mark().state), named_tensors(b.mark().state), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5, msg=name)


def write(s: Session, n: int) -> bytes:
    return b"".join(s.generate_bytes(n, temperature=0.9, seed=3))


def test_the_text_is_that_of_plain_decoding() -> None:
    here, plain = make(shared()), make(None)
    for s in (here, plain):
        s.feed(b"once upon a time")
    assert write(here, 100) == write(plain, 100)
    same(here, plain)
    here.feed(b" and on")
    plain.feed(b" and on")
    assert write(here, 10) == write(plain, 10)


def test_every_look_at_a_session_on_its_way_is_right(tmp_path) -> None:
    here, plain = make(shared()), make(None)
    for step in range(4):
        assert write(here, 7) == write(plain, 7)
        twin, mark = here.fork(), here.mark()
        assert write(here, 3) == write(plain.fork(), 3) == write(twin, 3)
        here.rewind(mark)
        same(here, plain)
        here.save(tmp_path / f"{step}.state")
        assert write(LM.session(tmp_path / f"{step}.state"), 5) == write(plain.fork(), 5)
        assert here.nbytes == plain.nbytes


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans()), min_size=1, max_size=12))
def test_sessions_take_turns(turns: list[tuple[int, int, bool]]) -> None:
    together = shared()
    here, plain = [make(together) for _ in range(3)], [make(None) for _ in range(3)]
    for who, count, read in turns:
        if read:
            here[who].feed(bytes(range(65, 65 + count)))
            plain[who].feed(bytes(range(65, 65 + count)))
        else:
            assert write(here[who], count) == write(plain[who], count)
    for mine, its in zip(here, plain, strict=True):
        same(mine, its)


def test_a_step_that_was_interrupted_is_as_if_it_had_not_been(monkeypatch) -> None:
    together = shared()
    here, plain = make(together), make(None)
    assert write(here, 20) == write(plain, 20)
    decoder = together._decoder
    assert decoder is not None
    step = decoder.step

    def interrupted(rows: int) -> None:
        step(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(here, 1)
    monkeypatch.undo()
    same(here, plain)
    assert write(here, 10) == write(plain, 10)


def test_the_state_comes_home_often_enough_to_be_made_again(monkeypatch) -> None:
    monkeypatch.setattr(session, "SETTLED", 4)
    here, plain = make(shared()), make(None)
    assert write(here, 30) == write(plain, 30)
    assert here.position - here._settled.position <= 4
    same(here, plain)


def test_threads_take_turns() -> None:
    together = shared()
    expected = {seed: b"".join(make(None).generate_bytes(40, seed=seed)) for seed in range(4)}
    found: dict[int, bytes] = {}

    def work(seed: int) -> None:
        found[seed] = b"".join(make(together).generate_bytes(40, seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_text_goes_on_though_the_buffers_were_lost_on_the_way() -> None:
    """Another session's step failed while this one's state was sent home: it is made again, and nothing has moved."""
    lm = opinionated()
    plain = lm.session()
    plain.feed(b"hello")
    expected = b"".join(plain.generate_bytes(20, seed=1))
    shared = InPlace(lm.network)
    one, other = (Session(lm.network, lm.codec, str, shared) for _ in range(2))
    one.feed(b"hello")
    text = one.generate_bytes(20, seed=1)
    written = [next(text) for _ in range(5)]
    shared.leave()  # as where the copy runs out of memory
    other.read_ids(np.array([65]))
    one.mark()
    assert b"".join([*written, *text]) == expected
