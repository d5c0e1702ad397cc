"""Loading a model to read and write with."""

import pytest
import torch

import milonga
from milonga.errors import UserError
from milonga.inference import LanguageModel
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
