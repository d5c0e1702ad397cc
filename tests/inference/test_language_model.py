"""Loading a model to read and write with."""

import numpy as np
import pytest
import torch

import milonga
from milonga.data.bpe import TOKENIZER, BpeCodec
from milonga.data.bpe_training import train_bpe
from milonga.errors import UserError
from milonga.inference import LanguageModel
from milonga.inference.language_model import DTYPES
from milonga.models.pretrained import fingerprint, save_weights
from tests.inference.helpers import SAMBA, opinionated


@pytest.fixture
def run(tmp_path):
    lm = opinionated()
    for step in (100, 200):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        with torch.no_grad():
            lm.network.embedding.weight.mul_(1.01)
        save_weights(lm.network, folder / "model.safetensors", {"step": str(step)})
    return lm, tmp_path / "run"


def test_a_run_its_checkpoint_and_its_weight_file_load(run):
    lm, folder = run
    last = folder / "checkpoints" / "step-00000200"
    for path in (folder, str(folder), last, last / "model.safetensors"):
        loaded = milonga.load(path, device="cpu")
        assert loaded.facts["step"] == "200"
        assert loaded.path == last / "model.safetensors"
        assert not loaded.network.training
        assert loaded.device == torch.device("cpu")
        assert b"".join(loaded.session().generate_bytes(20)) == b"".join(lm.session().generate_bytes(20))


def test_the_fingerprint_is_that_of_config_and_weights(run):
    lm, folder = run
    loaded = milonga.load(folder)
    assert loaded.fingerprint == loaded.fingerprint == fingerprint(lm.network)
    assert loaded.fingerprint != milonga.load(folder / "checkpoints" / "step-00000100").fingerprint


def test_weights_load_in_the_dtype_asked_for(run):
    lm, folder = run
    network = milonga.load(folder, device="cpu", dtype="bfloat16").network
    for (name, got), exact in zip(network.state_dict().items(), lm.network.state_dict().values(), strict=True):
        kept = "norm" in name or "scan." in name
        assert got.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(got, exact.to(got.dtype))
    with pytest.raises(UserError, match="dtype 'int8' cannot be used; choose from"):
        milonga.load(folder, dtype="int8")


@pytest.mark.parametrize("rounding", [{"dtype": "bfloat16"}, {"weights": "bf16"}, {"weights": "int8"}])
def test_a_state_goes_on_in_any_rounding_of_its_model(run, rounding, tmp_path):
    """Fed in fp32, continued in fewer bits, and back: the text is nearly as likely, and the file is not refused."""
    _, folder = run
    full, rounded = milonga.load(folder, device="cpu"), milonga.load(folder, device="cpu", **rounding)
    assert rounded.fingerprint == full.fingerprint
    session = full.session()
    session.feed(b"some text to begin with ")
    session.save(tmp_path / "a.state")
    other = rounded.session(tmp_path / "a.state")
    assert other.position == session.position
    bits = [s.score(b"and some more of it").mean() for s in (session, other)]
    assert bits[0] != bits[1] and abs(bits[0] - bits[1]) < 0.02 * bits[0]
    other.save(tmp_path / "b.state")
    assert full.session(tmp_path / "b.state").position == other.position


def test_stored_weights_take_less_memory_and_write_the_same_text_as_long_as_it_is_likely(run):
    _, folder = run
    full, stored = milonga.load(folder, device="cpu"), milonga.load(folder, device="cpu", weights="int8")
    kinds = {type(module).__name__ for module in stored.network.modules()}
    assert "StoredLinear" in kinds and "Linear" not in kinds
    ids = np.frombuffer(b"a text of some length, read twice", np.uint8)
    differences = full.session().score(ids) - stored.session().score(ids)
    assert 0 < np.abs(differences).max() < 0.3
    assert (full.storage, stored.storage) == (None, "int8")


def test_a_storage_that_cannot_be_used_is_refused_on_loading(run):
    _, folder = run
    with pytest.raises(UserError, match=r"^weights 'int4' cannot be used; choose from bf16, int8$"):
        milonga.load(folder, device="cpu", weights="int4")
    for dtype in ("float64", "float16"):
        with pytest.raises(UserError, match=f"weights 'bf16' cannot be used beside dtype '{dtype}': give"):
            milonga.load(folder, device="cpu", weights="bf16", dtype=dtype)


@pytest.mark.parametrize("storage", [None, "bf16", "int8"])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_whatever_loads_reads_and_writes(run, storage, dtype):
    if storage == "bf16" and dtype in ("float64", "float16"):
        return  # refused, as tested above
    lm = milonga.load(run[1], device="cpu", dtype=dtype, weights=storage)
    assert lm.storage == storage
    session = lm.session()
    bits = session.score(b"a text of more than a few bytes")  # other products than for single bytes
    assert np.isfinite(bits).all()
    assert len(list(session.generate_bytes(3))) == 3


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        milonga.load(tmp_path / "nowhere")
    save_weights(opinionated().network, tmp_path / "model.safetensors")
    for device in ("abacus", "cuda:97"):
        with pytest.raises(UserError, match="device"):
            milonga.load(tmp_path, device=device)


def test_a_vocabulary_that_is_not_bytes_is_refused(tmp_path):
    save_weights(SAMBA.replace(vocab_size=300).build(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="300 tokens"):
        milonga.load(tmp_path)
    with pytest.raises(UserError, match="300 tokens"):
        LanguageModel(SAMBA.replace(vocab_size=300).build())


TEXT = b"low lower lowest, new newer newest; wide wider widest. " * 3


def subword_run(folder, codec: BpeCodec) -> None:
    facts = {"codec": codec.name, "tokenizer": codec.digest}
    save_weights(SAMBA.replace(vocab_size=codec.vocab_size).build(), folder / "model.safetensors", facts)
    codec.save(folder / TOKENIZER)


def test_a_model_of_subwords_comes_with_its_tokenizer(tmp_path):
    codec = train_bpe([[TEXT]], 270)
    subword_run(tmp_path, codec)
    lm = milonga.load(tmp_path)
    assert lm.codec == codec
    assert lm.codec.decode(lm.codec.encode(TEXT)) == TEXT
    assert milonga.load(tmp_path / "model.safetensors").codec == codec
    with pytest.raises(UserError, match=r"has 270 tokens, that of its text codec \(bytes\) 256"):
        LanguageModel(lm.network)


def test_a_missing_or_another_tokenizer_is_refused(tmp_path):
    subword_run(tmp_path, train_bpe([[TEXT]], 270))
    (tmp_path / TOKENIZER).unlink()
    with pytest.raises(UserError, match=r"tokenizer.json does not lie beside it"):
        milonga.load(tmp_path)
    train_bpe([[TEXT[::-1]]], 270).save(tmp_path / TOKENIZER)
    with pytest.raises(UserError, match="not the tokenizer that the model beside it was trained with"):
        milonga.load(tmp_path)
    save_weights(SAMBA.build(), tmp_path / "model.safetensors", {"codec": "unigram"})
    with pytest.raises(UserError, match="text codec 'unigram' is not known"):
        milonga.load(tmp_path)
