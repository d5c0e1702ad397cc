"""Checkpoints that are whole, and what is said of those that are not."""

import json
import shutil

import pytest

from milonga.errors import UserError
from milonga.models.pretrained import load_weights, run_checkpoint
from milonga.training import list_checkpoints, train
from milonga.training.checkpoint import last_checkpoint, read_checkpoint

from . import runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    made = runs.config(runs.write_texts(folder / "texts"), steps=12, save_every=3, keep=3)
    train(made, folder / "run")
    return folder / "run", made


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_last_ones_are_kept_and_read_as_weights(run):
    assert [path.name for path in list_checkpoints(run)] == ["step-00000006", "step-00000009", "step-00000012"]
    assert sorted(path.name for path in list_checkpoints(run)[-1].iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    network, facts = load_weights(run_checkpoint(run))
    assert (facts["run"], facts["step"]) == ("tiny", "12")
    stored = read_checkpoint(list_checkpoints(run)[-1]).config
    assert network.config == runs.RunConfig.parse(stored, "checkpoint").model


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))


def _remove(path):
    path.unlink()


TENSORS = ("model.safetensors", "optimizer.safetensors")
DAMAGES = [(name, damage) for name in TENSORS for damage in (_truncate, _flip, _remove)]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES, ("trainer.json", _truncate), ("trainer.json", _remove)])
def test_a_damaged_checkpoint_is_named_with_the_older_one_that_is_good(trained, run, name, damage):
    newest = list_checkpoints(run)[-1]
    damage(newest / name)
    with pytest.raises(UserError) as caught:
        train(trained[1].with_steps(15), run, resume=True)
    line = str(caught.value)
    assert f"{newest} is damaged" in line
    assert name in line
    assert f"step-00000009 before it is whole: remove {newest} and resume again" in line
    assert "\n" not in line
    shutil.rmtree(newest)  # as it says
    assert train(trained[1].with_steps(15), run, resume=True).step == 15


def test_where_none_is_whole_it_says_so(run):
    for path in list_checkpoints(run):
        _truncate(path / "optimizer.safetensors")
    with pytest.raises(UserError, match="no older checkpoint is whole"):
        last_checkpoint(run)


def test_a_newer_format(run):
    path = list_checkpoints(run)[-1] / "trainer.json"
    record = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="written in format 99, this version reads up to 1; upgrade milonga"):
        last_checkpoint(run)


def test_weights_of_another_architecture(trained, run, tmp_path):
    other = runs.settings(run.parent / "texts", steps=12)
    other["model"]["d_model"] = 32
    texts = runs.write_texts(tmp_path / "texts")
    other["data"]["paths"] = [str(texts)]
    train(runs.RunConfig.parse(other, "test"), tmp_path / "other")
    newest = list_checkpoints(run)[-1]
    shutil.copy(list_checkpoints(tmp_path / "other")[-1] / "model.safetensors", newest / "model.safetensors")
    record = json.loads((newest / "trainer.json").read_text())
    wrong = list_checkpoints(tmp_path / "other")[-1] / "trainer.json"
    record["files"]["model.safetensors"] = json.loads(wrong.read_text())["files"]["model.safetensors"]
    (newest / "trainer.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="weights of another architecture"):
        train(trained[1].with_steps(15), run, resume=True)


def test_remains_of_a_killed_process_are_cleared_away(trained, run):
    remains = run / "checkpoints" / ".step-00000015.partial"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    train(trained[1].with_steps(13), run, resume=True)
    assert not remains.exists()


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path) == []
