"""Texts written together give what each gives alone, however they join and leave; and none ever sees another."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from milonga.errors import UserError
from milonga.inference.batch import Batch, Event, Ticket
from milonga.inference.sampling import Sampling
from milonga.state import named_tensors
from tests.inference.helpers import CONFIGS, opinionated
from tests.laws.test_laws import SPLIT_BOUND, assert_same_state
from tests.ops.helpers import relative_rms

MODELS = {name: opinionated(config) for name, config in CONFIGS.items()}
every_model = pytest.mark.parametrize("name", list(CONFIGS))
SAMPLINGS = st.one_of(
    st.builds(Sampling, temperature=st.sampled_from([0.0, 0.7, 1.0]), seed=st.integers(0, 99)),
    st.builds(Sampling, top_k=st.just(20), top_p=st.sampled_from([None, 0.8]), seed=st.integers(0, 99)),
    st.builds(Sampling, repetition_penalty=st.just(1.3), min_p=st.just(0.01), seed=st.integers(0, 99)),
    st.builds(Sampling, valid_utf8=st.just(True), seed=st.integers(0, 99)),
)


def alone(lm, start, sampling: Sampling, n: int):
    """The first n bytes that a lone session writes without a limit in sight, and the session behind them."""
    session = lm.session()
    session.rewind(start)
    return b"".join(islice(session.generate_bytes(1 << 30, sampling), n)), session


def collect(events: list[Event], into: dict[Ticket, bytes]) -> list[Ticket]:
    for event in events:
        into[event.ticket] = into.get(event.ticket, b"") + event.data
    return [event.ticket for event in events if event.ended]


@every_model
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("device", [False, True])
def test_together_is_alone(name: str, exact: bool, device: bool) -> None:
    """More texts than rows, prompts of all lengths, settings of all kinds: each is what a session alone writes."""
    lm = MODELS[name]
    batch = lm.batch(max_rows=3, exact=exact)
    pick = np.random.default_rng(5)
    texts, expected = {}, {}
    for index, length in enumerate((0, 1, 5, 6, 7, 40, 300, 2)):
        prompt = pick.integers(0, 256, length).astype(np.uint8)
        sampling = Sampling(temperature=(0.0, 0.8)[index % 2], top_k=(None, 9)[index % 3 == 0], seed=index)
        start = lm.session()
        start.feed(prompt)
        n = 3 + 5 * index
        ticket = batch.join(prompt, sampling, n)
        expected[ticket] = alone(lm, start.mark(), sampling, n)
    ended = []
    while batch.rows or batch.waiting:
        ended += collect(batch.run(7) if device else batch.step(), texts)
        assert batch.rows <= 3
    assert sorted(ended, key=lambda t: t.number) == list(expected)
    for ticket, (text, session) in expected.items():
        assert texts[ticket] == text
        left = batch.leave(ticket)
        assert (left.position, left.pending, left.bytes_read) == (session.position, session.pending, session.bytes_read)
        assert relative_rms(torch.from_numpy(left.logits), torch.from_numpy(session.logits)) <= SPLIT_BOUND
        assert_same_state(left.mark().state, session.mark().state)
        assert left.mark().recent.tolist() == session.mark().recent.tolist()


class Crowd(RuleBasedStateMachine):
    """Sessions join, are written and leave at random; each has a lone twin that writes the same."""

    lm, exact = MODELS["samba"], False

    def __init__(self):
        super().__init__()
        self.batch: Batch = self.lm.batch(max_rows=4, exact=self.exact)
        self.inside: dict[Ticket, tuple[object, Sampling]] = {}
        self.text: dict[Ticket, bytes] = {}
        self.prompts: set[Ticket] = set()
        self.outside = [self.lm.session()]

    @rule(sampling=SAMPLINGS, pick=st.integers(0, 99), prompt=st.binary(max_size=20))
    def join(self, sampling: Sampling, pick: int, prompt: bytes) -> None:
        session = self.outside[pick % len(self.outside)]
        session.feed(prompt)
        ticket = self.batch.join(session, sampling)
        self.inside[ticket], self.text[ticket] = (session.mark(), sampling), b""

    @rule(sampling=SAMPLINGS, prompt=st.binary(min_size=1, max_size=30))
    def join_prompt(self, sampling: Sampling, prompt: bytes) -> None:
        session = self.lm.session()
        session.feed(prompt)
        ticket = self.batch.join(prompt, sampling)
        self.inside[ticket], self.text[ticket] = (session.mark(), sampling), b""
        self.prompts.add(ticket)

    @rule(steps=st.integers(1, 6), device=st.booleans())
    def write(self, steps: int, device: bool) -> None:
        if device:
            collect(self.batch.run(steps), self.text)
        else:
            for _ in range(steps):
                collect(self.batch.step(), self.text)

    @rule(pick=st.integers(0, 99))
    def leave(self, pick: int) -> None:
        if not self.inside:
            return
        ticket = list(self.inside)[pick % len(self.inside)]
        session = self.batch.leave(ticket)
        start, sampling = self.inside.pop(ticket)
        if ticket in self.prompts and not self.text[ticket] and not self.exact:  # nothing of its prompt is read
            assert self.text.pop(ticket) == b"" and session.position == 0
            return
        text, twin = alone(self.lm, start, sampling, len(self.text[ticket]))
        assert self.text.pop(ticket) == text
        assert relative_rms(torch.from_numpy(session.logits), torch.from_numpy(twin.logits)) <= 10 * SPLIT_BOUND
        assert session.position == twin.position and session.pending == twin.pending
        self.outside = [*self.outside[-5:], session]

    @invariant()
    def counts(self) -> None:
        assert self.batch.rows + self.batch.waiting == len(self.inside) and self.batch.rows <= 4


@pytest.mark.parametrize("name", ["samba", "growing"])
@pytest.mark.parametrize("exact", [False, True])
def test_joined_and_left_at_random(name: str, exact: bool) -> None:
    machine = type("Machine", (Crowd,), {"lm": MODELS[name], "exact": exact})
    run_state_machine_as_test(machine, settings=settings(max_examples=6, stateful_step_count=30))


def test_joined_and_left_a_thousand_times() -> None:
    """One session, joined and left 1,000 times among others that come and go, is the lone session."""
    lm, pick = MODELS["samba"], np.random.default_rng(3)
    batch, session = lm.batch(max_rows=3), lm.session()
    session.feed(b"once")
    lone = session.fork()
    others, written = [], b""
    for turn in range(1000):
        sampling = Sampling(temperature=0.9, seed=turn)
        ticket, texts = batch.join(session, sampling), {}
        if pick.random() < 0.4 and len(others) < 2:
            others.append(batch.join(pick.bytes(3), Sampling(seed=turn)))
        if others and pick.random() < 0.4:
            batch.step()
            batch.leave(others.pop(int(pick.integers(len(others)))))
        for _ in range(int(pick.integers(0, 3))):
            collect(batch.step(), texts)
        session = batch.leave(ticket)
        count = session.position - lone.position
        expected = b"".join(lone.generate_bytes(count, sampling))
        assert texts.get(ticket, b"") == expected[count - len(texts.get(ticket, b"")) :]
        written += expected
    assert len(written) > 1000 and session.position == lone.position
    assert relative_rms(torch.from_numpy(session.logits), torch.from_numpy(lone.logits)) <= 10 * SPLIT_BOUND


@every_model
def test_exact_is_the_same_beside_anyone(name: str) -> None:
    """Bit for bit: a text alone in an exact batch, and at another place in a crowd that comes and goes."""
    lm = MODELS[name]

    def logits(crowd: int) -> list[bytes]:
        batch = lm.batch(max_rows=4, exact=True)
        for index in range(crowd):
            batch.join(bytes([index]) * (3 + index), Sampling(seed=index), 4 + 9 * index)
        mine, seen = batch.join(b"It was the best of times", Sampling(seed=7)), []
        while len(seen) < 40:
            ids = [event.data for event in batch.step() if event.ticket == mine]
            if ids:
                row = next(row for row, text in enumerate(batch._rows) if text.ticket == mine)
                seen.append(ids[0] + batch._decoder.logits[row].numpy().tobytes())
        return seen

    assert logits(0) == logits(2) == logits(3)


@every_model
def test_no_text_sees_another(name: str) -> None:
    """NaN in one text's state reaches no other text, and nothing of a text that left is in the buffers."""
    lm = MODELS[name]
    batch = lm.batch(max_rows=3)
    canary = lm.session()
    canary.feed(b"a secret that nobody else may see")
    mine = batch.join(b"mine", Sampling(seed=1))
    poisoned = batch.join(canary, Sampling(seed=2))
    last = batch.join(b"last", Sampling(seed=3))
    texts = {}
    collect(batch.step(), texts)
    row = next(row for row, text in enumerate(batch._rows) if text.ticket == poisoned)
    for _, tensor in named_tensors(batch._decoder.state):
        if tensor.is_floating_point() and tensor.numel():
            tensor[row] = float("nan")
    batch.leave(poisoned)
    for _ in range(9):
        collect(batch.step(), texts)
    for ticket, prompt, seed in ((mine, b"mine", 1), (last, b"last", 3)):
        session = lm.session()
        session.feed(prompt)
        assert texts[ticket] == b"".join(session.generate_bytes(10, Sampling(seed=seed)))
    batch.leave(mine)
    batch.leave(last)
    assert not any(tensor.any() for _, tensor in named_tensors(batch._decoder.state))
    assert not batch._decoder.logits.any() and not batch._decoder.tokens.any()


def test_stops_and_lengths_end_texts() -> None:
    lm = MODELS["samba"]
    session = lm.session()
    session.feed(b"abc")
    whole = b"".join(session.fork().generate_bytes(60, Sampling(seed=4)))
    stop = whole[20:22]
    batch = lm.batch(max_rows=2)
    tickets = [
        batch.join(session, Sampling(seed=4, stop=(stop,)), 60),
        batch.join(session, Sampling(seed=4, stop=(b"never written, surely",)), 60),
        batch.join(session, Sampling(seed=4), 0),
    ]
    texts, why = {}, {}
    for event in batch.events():
        texts[event.ticket] = texts.get(event.ticket, b"") + event.data
        why[event.ticket] = event.ended or why.get(event.ticket)
    assert texts == {tickets[0]: whole[: whole.index(stop)], tickets[1]: whole, tickets[2]: b""}
    assert why == {tickets[0]: "stop", tickets[1]: "length", tickets[2]: "length"}
    assert [batch.leave(ticket).position for ticket in tickets] == [3 + whole.index(stop) + 2, 63, 3]


def test_a_text_that_waits_can_leave() -> None:
    lm = MODELS["mamba"]
    batch = lm.batch(max_rows=1)
    first, second, prompt = batch.join(lm.session()), batch.join(lm.session()), batch.join(b"unread")
    batch.step()
    assert batch.leave(second).position == 0
    assert batch.leave(prompt).position == 0
    batch.leave(first)
    with pytest.raises(UserError, match="no text"):
        batch.leave(first)


def test_a_text_can_leave_amid_its_prompt() -> None:
    """The session stands behind what was read, and goes on from there as any other."""
    lm, text = MODELS["samba"], bytes(range(256)) * 3
    batch = lm.batch(max_rows=2)
    beside, long = batch.join(b"a", Sampling(seed=1)), batch.join(text, Sampling(seed=2))
    batch.step()
    session = batch.leave(long)
    assert 0 < session.position < len(text)
    session.feed(text[session.position :])
    whole = lm.session()
    whole.feed(text)
    assert relative_rms(torch.from_numpy(session.logits), torch.from_numpy(whole.logits)) <= SPLIT_BOUND
    batch.step()
    assert batch.leave(beside).position == 3 and batch.rows == batch.waiting == 0


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_one_broken_text_ends_alone(device: bool, exact: bool) -> None:
    """NaN in the logits of one row, with one before it, one after it, and one that moves up into its row."""
    lm = MODELS["samba"]
    batch = lm.batch(max_rows=4, exact=exact)
    tickets = [batch.join(b"text %d" % index, Sampling(seed=index), 30) for index in range(4)]
    texts, events = {}, []
    for _ in range(3):
        collect(batch.step(), texts)
    batch._decoder.logits[1].fill_(float("nan"))
    while batch.rows:
        events += batch.run(7) if device else batch.step()
    collect(events, texts)
    broken = [event for event in events if event.ended == "error"]
    assert [event.ticket for event in broken] == [tickets[1]]
    assert "predicts nan" in broken[0].error and len(texts[tickets[1]]) == 3
    assert batch.leave(tickets[1]).position == 6 + 3
    for index in (0, 2, 3):
        session = lm.session()
        session.feed(b"text %d" % index)
        assert texts[tickets[index]] == b"".join(session.generate_bytes(30, Sampling(seed=index)))
        assert batch.leave(tickets[index]).position == 36


def test_nan_within_a_run_ends_the_text() -> None:
    """The state of one row is damaged: the run that comes to NaN says so at its end."""
    lm = MODELS["samba"]
    batch = lm.batch(max_rows=3)
    tickets = [batch.join(b"text %d" % index, Sampling(seed=index), 40) for index in range(3)]
    texts = {}
    collect(batch.run(5), texts)
    for _, tensor in named_tensors(batch._decoder.state):
        if tensor.is_floating_point() and tensor.numel():
            tensor[2] = float("nan")
    events = batch.run(9)
    assert [(event.ticket, event.ended) for event in events if event.ended] == [(tickets[2], "error")]
    collect(events, texts)
    while batch.rows:
        collect(batch.run(9), texts)
    for index in (0, 1):
        session = lm.session()
        session.feed(b"text %d" % index)
        assert texts[tickets[index]] == b"".join(session.generate_bytes(40, Sampling(seed=index)))


@pytest.mark.parametrize("exact", [False, True])
def test_what_cannot_be_written_is_refused_at_once(exact: bool) -> None:
    lm = MODELS["samba"]
    batch = lm.batch(max_rows=2, exact=exact)
    mine = batch.join(b"mine", Sampling(seed=1), 10)
    for bad in (Sampling(valid_utf8=True, forced=b"\xff"), Sampling(banned=bytes(range(256)))):
        for text in (b"a prompt", lm.session()):
            with pytest.raises(UserError, match=r"not valid UTF-8|nothing is left"):
                batch.join(text, bad)
    half = batch.join("\u00e9".encode()[:1], Sampling(valid_utf8=True, forced="\u00e9".encode()[1:], seed=2), 5)
    texts = {}
    while batch.rows or batch.waiting:
        collect(batch.step(), texts)
    assert texts[half].startswith(b"\xa9") and len(texts[mine]) == 10


def test_of_ended_texts_the_newest_are_kept() -> None:
    lm = MODELS["mamba"]
    batch = lm.batch(max_rows=2, keep=2)
    tickets = [batch.join(lm.session(), n=index) for index in range(4)]
    ended = [event.ticket for event in batch.events() if event.ended]
    assert sorted(ended, key=lambda ticket: ticket.number) == tickets
    assert [batch.leave(ticket).position for ticket in tickets[2:]] == [2, 3]
    for ticket in tickets[:2]:
        with pytest.raises(UserError, match="no text"):
            batch.leave(ticket)
    with pytest.raises(UserError, match="keep"):
        lm.batch(keep=-1)


def test_bad_input() -> None:
    lm = MODELS["samba"]
    batch = lm.batch(max_rows=2)
    assert batch.step() == []
    with pytest.raises(UserError, match="at least 1"):
        lm.batch(max_rows=0)
    with pytest.raises(UserError, match="0 or more"):
        batch.join(b"a", n=-1)
    with pytest.raises(UserError, match=r"batch: the number of tokens must be a whole number, got 2\.5"):
        batch.join(b"a", n=2.5)
    with pytest.raises(UserError, match="steps"):
        batch.run(0)
    with pytest.raises(ValueError, match="another model"):
        batch.join(MODELS["mamba"].session())
    assert batch.rows == batch.waiting == 0


def test_a_session_taken_out_forces_only_what_is_left():
    lm = opinionated()
    batch = lm.batch(max_rows=2)
    ticket = batch.join(b"once", Sampling(forced=b"abcdef", seed=3))
    for _ in range(4):
        batch.step()
    session = batch.leave(ticket)
    assert session.sampling == Sampling(forced=b"ef", seed=3)
    assert next(session.generate_bytes(1, session.sampling)) == b"e"
