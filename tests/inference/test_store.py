"""The store of states: what is reused, why not more, and that answers do not depend on it."""

import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import milonga
from milonga.errors import UserError
from milonga.inference import Reuse, Sampling, StateStore
from milonga.inference import session as session_module
from milonga.inference.language_model import DTYPES
from milonga.inference.store import _snapshots
from milonga.models.pretrained import save_weights
from tests.inference.helpers import GROWING, opinionated, opinionated_subwords
from tests.inference.test_session import TEXT, assert_same_bits, same_place

LM, OTHER, SUBWORDS = opinionated(), opinionated(seed=1), opinionated_subwords()
STATE = LM.session().nbytes
PIECE = 16


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(session_module, "PIECE", PIECE)


def cold(text, lm=LM):
    session = lm.session()
    session.feed(text)
    return session


def large():
    return StateStore(1000 * STATE)


def test_a_text_met_again_is_not_read_again():
    store = large()
    first, reuse = store.session_for(LM, TEXT[:300])
    assert reuse == Reuse(0, 300, "no entry")
    again, reuse = store.session_for(LM, TEXT[:300])
    assert reuse == Reuse(300, 0, "nothing to read")
    assert str(reuse) == "300 bytes reused, 0 recomputed: nothing to read"
    assert same_place(first, again)
    assert same_place(again, cold(TEXT[:300]))


def test_snapshots_stand_at_doubling_distances_the_ends_of_turns_and_the_end():
    assert _snapshots(0, [300], 16) == [16, 32, 64, 128, 256, 288, 300]
    assert _snapshots(0, [100, 101, 300], 16) == [16, 32, 64, 96, 128, 256, 288, 300]
    assert _snapshots(128, [300], 16) == [256, 288, 300]
    assert _snapshots(0, [3], 16) == [3]
    assert _snapshots(0, [], 16) == _snapshots(0, [0], 16) == _snapshots(7, [7], 16) == []


def test_a_longer_text_goes_on_from_the_last_cut_before_the_end_of_a_turn():
    store = large()
    store.session_for(LM, TEXT[:300])
    session, reuse = store.session_for(LM, TEXT[:300], TEXT[300:420])
    assert reuse == Reuse(288, 132, "no exact entry between bytes 288 and 300; new from byte 300 on")
    assert same_place(session, cold(TEXT[:420]))
    _, reuse = store.session_for(LM, TEXT[:310])
    assert reuse == Reuse(288, 22, "no exact entry nearer to the end")


def test_a_text_that_diverges_says_where():
    store = large()
    store.session_for(LM, TEXT[:400])
    changed = bytearray(TEXT[:400])
    changed[200] ^= 1
    session, reuse = store.session_for(LM, bytes(changed))
    assert reuse == Reuse(128, 272, "no entry between bytes 128 and 200; diverges at byte 200")
    assert same_place(session, cold(bytes(changed)))
    _, reuse = store.session_for(LM, b"#" + TEXT[:40])
    assert reuse == Reuse(0, 41, "no entry")


def test_an_evicted_state_is_called_so_and_recomputed_to_the_same():
    store = StateStore(9 * STATE)
    store.session_for(LM, TEXT[:300])
    for other in range(4):
        store.session_for(LM, bytes([other]) * 300)
    session, reuse = store.session_for(LM, TEXT[:300])
    assert reuse == Reuse(0, 300, "evicted")
    assert same_place(session, cold(TEXT[:300]))


def test_the_store_keeps_to_its_limit_and_drops_what_was_used_longest_ago():
    store = StateStore(9 * STATE)
    for text in range(20):
        store.session_for(LM, TEXT[:16])
        store.session_for(LM, bytes([text]) * 32)
        assert store.nbytes <= store.limit_bytes
    assert store.session_for(LM, TEXT[:16])[1].recomputed == 0, "was used all the time"
    assert 4 <= len(store) <= 9


def test_a_store_too_small_is_an_error():
    with pytest.raises(UserError, match=f"takes {STATE} bytes, the limit is {STATE - 1}"):
        StateStore(STATE - 1).session_for(LM, TEXT[:9])
    for limit in (0, -5):
        with pytest.raises(UserError, match="at least 1 byte"):
            StateStore(limit)
    with pytest.raises(UserError, match="the limit is"):
        StateStore(STATE // 2).keep(LM, cold(TEXT[:9]))


def test_a_store_of_one_state_still_gives_the_right_answer():
    store = StateStore(STATE)
    for text in (TEXT[:300], TEXT[:300], TEXT[:310], b"other"):
        assert same_place(store.session_for(LM, text)[0], cold(text))
        assert store.nbytes <= STATE


def test_states_that_grow_past_the_limit_are_not_kept():
    lm = opinionated(GROWING)
    store = StateStore(3 * cold(TEXT[:16], lm).nbytes)
    session, _ = store.session_for(lm, TEXT)
    assert same_place(session, cold(TEXT, lm))
    _, reuse = store.session_for(lm, TEXT)
    assert 0 < reuse.reused <= 128
    assert store.nbytes <= store.limit_bytes
    said = r"no entry nearer to the end; not kept from byte (\d+) on: the state takes (\d+) bytes, the limit is (\d+)"
    at, takes, limit = map(int, re.fullmatch(said, reuse.reason).groups())
    assert limit == store.limit_bytes
    assert reuse.reused < at
    assert cold(TEXT[:at], lm).nbytes == takes > store.limit_bytes


def test_a_store_that_holds_only_the_state_of_an_empty_text_says_that_it_keeps_nothing():
    lm = opinionated(GROWING)
    store = StateStore(lm.session().nbytes)
    takes = cold(TEXT[:PIECE], lm).nbytes
    for why in ("no entry", "no entry nearer to the end"):
        session, reuse = store.session_for(lm, TEXT[:300])
        said = f"{why}; not kept from byte 16 on: the state takes {takes} bytes, the limit is {store.limit_bytes}"
        assert reuse == Reuse(0, 300, said)
        assert same_place(session, cold(TEXT[:300], lm))
        assert len(store) == 0


@pytest.mark.parametrize("spare", [0, 40, 300, STATE - 1])
def test_the_texts_of_requests_leave_room_for_a_state(spare):
    """However little is left beside one state, a text met again is not read again, and the limit holds."""
    store, text = StateStore(STATE + spare), TEXT[: STATE // 10]
    store.session_for(LM, text)
    for _ in range(3):
        session, reuse = store.session_for(LM, text)
        assert reuse == Reuse(len(text), 0, "nothing to read")
        assert same_place(session, cold(text))
        assert len(store) == 1
        assert store.nbytes <= store.limit_bytes


def test_a_state_that_only_other_requests_may_have_is_not_said_to_be_missing():
    store = large()
    store.keep(LM, cold(TEXT[:100]))
    _, reuse = store.session_for(LM, TEXT[:110])
    assert reuse == Reuse(0, 110, "no exact entry between bytes 0 and 100; new from byte 100 on")
    assert large().session_for(LM, TEXT[:110])[1].reason == "no entry"


def test_an_evicted_state_that_the_request_could_not_have_used_is_no_reason():
    """The end of a text, off the cuts, serves requests that end there, not those that go on."""
    store = StateStore(4 * STATE)
    store.session_for(LM, TEXT[:40])
    for other in range(9):
        store.session_for(LM, bytes([other]) * 8)
        store.session_for(LM, TEXT[:32])  # stays
    assert store.session_for(LM, TEXT[:44])[1].reason != "evicted"
    assert store.session_for(LM, TEXT[:40])[1].reason == "evicted"


def test_no_text_is_a_fresh_session():
    store = large()
    for turns in ((), (b"",), ("", b"")):
        session, reuse = store.session_for(LM, *turns)
        assert reuse == Reuse(0, 0, "nothing to read")
        assert same_place(session, LM.session())


def test_a_state_is_served_to_no_other_model_nor_tokenizer():
    store = large()
    store.session_for(LM, TEXT[:200])
    session, reuse = store.session_for(OTHER, TEXT[:200])
    assert reuse == Reuse(0, 200, "no entry")
    assert same_place(session, cold(TEXT[:200], OTHER))
    with pytest.raises(UserError, match="another model"):
        store.keep(OTHER, cold(TEXT[:20]))


def test_a_state_is_served_to_no_other_dtype_nor_storage_of_weights(tmp_path):
    """Every precision in which one file loads is a model of its own, while its saved states go on in any."""
    save_weights(LM.network, tmp_path / "model.safetensors")
    kinds = [{}, {"weights": "bf16"}, {"weights": "int8"}]
    kinds += [{"dtype": dtype} for dtype in DTYPES if dtype != "float32"]
    kinds += [{"dtype": "bfloat16", "weights": "int8"}, {"dtype": "float64", "weights": "int8"}]
    models = [milonga.load(tmp_path, device="cpu", **kind) for kind in kinds]
    store = large()
    for lm in models:
        session, reuse = store.session_for(lm, TEXT[:200])
        assert reuse == Reuse(0, 200, "no entry")
        assert same_place(session, cold(TEXT[:200], lm))
    for lm in models:
        session, reuse = store.session_for(lm, TEXT[:200])
        assert reuse.recomputed == 0
        assert same_place(session, cold(TEXT[:200], lm))
    session.save(tmp_path / "a.state")
    assert {lm.session(tmp_path / "a.state").position for lm in models} == {200}


def test_another_copy_of_the_same_model_is_the_same_model():
    store = large()
    store.session_for(LM, TEXT[:200])
    copy = opinionated()
    session, reuse = store.session_for(copy, TEXT[:200])
    assert reuse.recomputed == 0
    assert same_place(session, cold(TEXT[:200]))
    session.feed(b"more")
    session.rewind(copy.session().mark())


def test_texts_of_subwords_are_counted_in_bytes():
    store, text = large(), "the cat sat on the mat. " * 20
    _, reuse = store.session_for(SUBWORDS, text)
    assert reuse == Reuse(0, 480, "no entry")
    session, reuse = store.session_for(SUBWORDS, text, "And more.")
    assert reuse.reused + reuse.recomputed == 489 == session.bytes_read
    assert reuse.reason == f"no exact entry between bytes {reuse.reused} and 480; new from byte 480 on"
    assert 480 - 16 * 4 <= reuse.reused <= 480
    assert same_place(session, store.session_for(SUBWORDS, text, "And more.")[0])
    _, reuse = store.session_for(SUBWORDS, text[:240] + "#" + text[241:])
    assert re.fullmatch(rf"no entry between bytes {reuse.reused} and (2\d\d); diverges at byte \1", reuse.reason)


def test_a_written_turn_is_reused_where_rounding_does_not_matter():
    store = large()
    session, _ = store.session_for(LM, TEXT[:100])
    reply = b"".join(session.generate_bytes(50, Sampling(seed=1)))
    store.keep(LM, session)
    exact, reuse = store.session_for(LM, TEXT[:100], reply, b"more")
    assert reuse == Reuse(96, 58, "no exact entry between bytes 96 and 150; new from byte 150 on")
    assert same_place(exact, cold(TEXT[:100] + reply + b"more"))
    near, reuse = store.session_for(LM, TEXT[:100], reply, b"less!", exact=False)
    assert reuse == Reuse(150, 5, "new from byte 150 on")
    assert_same_bits(near.score(TEXT[:200]), cold(TEXT[:100] + reply + b"less!").score(TEXT[:200]))
    # what was read behind it is not exact either
    again, reuse = store.session_for(LM, TEXT[:100], reply, b"less!")
    assert reuse.recomputed > 0
    assert same_place(again, cold(TEXT[:100] + reply + b"less!"))


def test_what_a_session_does_later_does_not_reach_the_store():
    store = large()
    session, _ = store.session_for(LM, TEXT[:200])
    session.feed(b"a secret")
    list(session.generate(20))
    other, reuse = store.session_for(LM, TEXT[:200])
    assert reuse.recomputed == 0
    assert same_place(other, cold(TEXT[:200]))


def test_an_interrupted_request_leaves_what_it_has_read():
    store = large()

    def stop(read):
        if read >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.session_for(LM, TEXT[:300], progress=stop)
    session, reuse = store.session_for(LM, TEXT[:300])
    assert reuse.reused == 64
    assert same_place(session, cold(TEXT[:300]))


def test_progress_counts_what_is_read():
    store, seen = large(), []
    store.session_for(LM, TEXT[:100])
    _, reuse = store.session_for(LM, TEXT[:333], progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == reuse.recomputed == 333 - 96


def test_several_threads_share_a_store():
    store, wrong = StateStore(12 * STATE), []

    def ask(number):
        random = np.random.default_rng(number)
        for _ in range(12):
            text = TEXT[: int(random.integers(1, 200))] + bytes([number % 3]) * int(random.integers(0, 40))
            if not same_place(store.session_for(LM, text)[0], cold(text)):
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.nbytes <= store.limit_bytes


class Canaries(RuleBasedStateMachine):
    """Many requests, related and not, of two models, with sessions that go on and are kept: nobody ever gets anything
    but what a cold run gives, so no byte of one text shows in another's predictions."""

    def __init__(self):
        super().__init__()
        self.store = StateStore(14 * STATE)
        self.texts = [b"canary one " * 4, b"canary two " * 4, TEXT[:90]]

    @rule(data=st.data(), other=st.booleans(), exact=st.booleans())
    def request(self, data, other, exact):
        lm = OTHER if other else LM
        text = data.draw(st.sampled_from(self.texts))[: data.draw(st.integers(0, 90))]
        text += data.draw(st.sampled_from([b"", b"x", b"canary three" * 3]))
        cut = data.draw(st.integers(0, len(text)))
        session, reuse = self.store.session_for(lm, text[:cut], text[cut:], exact=exact)
        assert reuse.reused + reuse.recomputed == session.position == len(text)
        expected = cold(text, lm)
        if exact:
            assert same_place(session, expected)
        else:
            assert torch.allclose(session.mark().logits, expected.mark().logits, rtol=1e-4, atol=1e-3)
        written = b"".join(session.generate_bytes(data.draw(st.integers(0, 9))))
        if data.draw(st.booleans()):
            self.store.keep(lm, session)
        self.texts = [*self.texts[-4:], text + written]

    @invariant()
    def within_its_limit(self):
        assert self.store.nbytes <= self.store.limit_bytes


TestCanaries = Canaries.TestCase
TestCanaries.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)


@given(st.integers(0, 120), st.integers(0, 120), st.integers(0, 120))
@settings(max_examples=25)
def test_cached_and_cold_are_the_same_bits_wherever_texts_part(shared, one, two):
    store = large()
    texts = [TEXT[:shared] + b"1" * one, TEXT[:shared] + b"2" * two]
    for text in [*texts, *texts]:
        session, _ = store.session_for(LM, text)
        assert same_place(session, cold(text))
