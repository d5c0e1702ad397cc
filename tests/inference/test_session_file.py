"""State files: continue bit for bit, or say in one line why not."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from milonga.data.bpe import BpeCodec
from milonga.errors import UserError
from milonga.inference import LanguageModel, Sampling, Session, session_file
from milonga.state import named_tensors
from tests.inference.helpers import CONFIGS, MAMBA, opinionated, opinionated_subwords
from tests.inference.test_session import MODELS, TEXT, same_place

LM = MODELS["samba"]


@pytest.fixture
def saved(tmp_path):
    s = LM.session()
    s.feed(TEXT[:300])
    s.save(tmp_path / "a.state")
    return s, tmp_path / "a.state"


def refused(path, lm=LM):
    with pytest.raises(UserError) as caught:
        lm.session(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def rewrite(path, change_header=None, change_tensors=None):
    with safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    (change_header or (lambda header: None))(header)
    (change_tensors or (lambda tensors: None))(tensors)
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [0, 1, 300])
def test_a_saved_session_continues_bit_for_bit(name, length, tmp_path):
    lm = MODELS[name]
    s = lm.session()
    s.feed(TEXT[:length])
    s.save(tmp_path / "a.state")
    t = lm.session(tmp_path / "a.state")
    assert same_place(s, t)
    assert np.array_equal(s.score(b"the next byte"), t.score(b"the next byte"))
    assert b"".join(s.generate_bytes(30)) == b"".join(t.generate_bytes(30))
    assert same_place(s, t)


def test_a_character_in_the_making_is_saved(tmp_path):
    s = LM.session()
    s.feed("über€".encode()[:-1])
    s.save(str(tmp_path / "a.state"))
    t = LM.session(str(tmp_path / "a.state"))
    assert t.pending == s.pending == "€".encode()[:-1]


def test_saving_leaves_the_session_as_it_was(saved):
    s, path = saved
    t = LM.session(path)
    s.save(path)
    assert same_place(s, t)


def test_another_models_file_is_refused(saved):
    _, path = saved
    assert "another model" in refused(path, opinionated(seed=1))
    assert "another model" in refused(path, opinionated(MAMBA))


@pytest.mark.parametrize("keep", [0, 5, 8, 200, 0.5, -1])
def test_a_file_cut_short_is_refused(saved, keep):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "cut short" in refused(path)


def test_any_altered_byte_is_noticed(saved):
    _, path = saved
    content = path.read_bytes()
    for at in np.random.default_rng(0).integers(8, len(content), 40).tolist():
        damaged = bytearray(content)
        damaged[at] ^= 0x20
        path.write_bytes(damaged)
        refused(path)
    path.write_bytes(content)
    LM.session(path)


@pytest.mark.parametrize("key", ["position", "pending", "model", "codec"])
def test_an_altered_header_is_noticed(saved, key):
    _, path = saved
    rewrite(path, change_header=lambda header: header.update({key: "12"}))
    assert "altered or damaged" in refused(path)


def test_an_altered_tensor_is_noticed(saved):
    _, path = saved

    def nudge(tensors):
        tensors["next_logits"][3] = torch.nextafter(tensors["next_logits"][3], torch.tensor(9.0))

    rewrite(path, change_tensors=nudge)
    assert "altered or damaged" in refused(path)


def test_a_newer_format_is_named(saved):
    _, path = saved
    rewrite(path, change_header=lambda header: header.update(session_format="3"))
    assert "format 3" in refused(path)
    assert "upgrade" in refused(path)


def test_what_is_no_state_file_is_refused(tmp_path):
    assert "no such state file" in refused(tmp_path / "nowhere.state")
    assert "no such state file" in refused(tmp_path)
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times" * 9)
    assert "not a state file" in refused(tmp_path / "text")
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    assert "not a state file" in refused(tmp_path / "weights")
    save_file({"a": torch.zeros(3)}, tmp_path / "weights", metadata={"session_format": "one"})
    assert "not a state file" in refused(tmp_path / "weights")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        LM.session().save(tmp_path / "no" / "folder" / "a.state")


def test_a_refused_file_leaves_the_session_alone(saved):
    s, path = saved
    before = s.fork()
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError):
        s.restore(path)
    assert same_place(s, before)


def test_a_file_of_the_first_format_still_loads(saved):
    s, path = saved
    known = {"session_format", "model", "codec", "position", "pending", "checksum"}
    with safe_open(str(path), framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if key in known} | {"session_format": "1"}
    tensors = load_file(path)
    del tensors["recent"]
    header["checksum"] = session_file._checksum(tensors, header)
    save_file(tensors, path, metadata=header)
    t = LM.session(path)
    assert (t.position, t.bytes_read, t.sampling) == (300, 300, None)
    assert t.mark().digest is None
    assert np.array_equal(s.score(b"the next byte"), t.score(b"the next byte"))
    t.save(path)
    assert LM.session(path).mark().digest is None


def test_what_was_read_is_saved(saved):
    s, path = saved
    t = LM.session(path)
    assert t.mark().digest == s.mark().digest is not None
    assert np.array_equal(t.mark().recent, s.mark().recent)
    s.feed(TEXT)
    t.feed(TEXT)
    assert t.mark().digest == s.mark().digest
    harsh = Sampling(repetition_penalty=9.0, repetition_window=64, temperature=0)
    assert b"".join(s.generate_bytes(30, harsh)) == b"".join(t.generate_bytes(30, harsh))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_loads_in_another_precision(saved, dtype):
    """The same model in another dtype, as far as its fingerprint says: the state takes that dtype where it should."""
    s, path = saved
    network = opinionated().network.to(dtype)
    t = Session(network, LM.codec, lambda: LM.fingerprint)
    fresh = network.init_state(1)
    t.restore(path)
    for (name, got), (_, like) in zip(named_tensors(t.mark().state), named_tensors(fresh), strict=True):
        assert got.dtype == like.dtype, name
    assert t.position == 300
    expected, got = s.score(b"the next byte"), t.score(b"the next byte")
    assert np.abs(got - expected).max() < (1e-4 if dtype == torch.float64 else 2.0)
    assert t.mark().logits.dtype == torch.promote_types(dtype, torch.float32)


def test_another_tokenizer_is_refused(tmp_path):
    subwords = opinionated_subwords()
    s = subwords.session()
    s.feed(b"the cat")
    s.save(tmp_path / "a.state")
    other = BpeCodec([(b"t", b"h"), (b"th", b"e"), (b"a", b"t"), (b" ", b"the"), (b" ", b"m"), (b" m", b"a")])
    assert other.vocab_size == subwords.codec.vocab_size
    assert "another tokenizer" in refused(tmp_path / "a.state", LanguageModel(subwords.network, other))
    assert subwords.session(tmp_path / "a.state").bytes_read == 7
