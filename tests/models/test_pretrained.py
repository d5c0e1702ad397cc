import json
import struct
from pathlib import Path

import pytest
import torch

from milonga.errors import UserError
from milonga.models.pretrained import fingerprint, load_tensors, load_weights, run_checkpoint, save_weights
from tests.laws.subjects import MODELS


@pytest.mark.parametrize("name", list(MODELS))
def test_round_trip(tmp_path: Path, name: str) -> None:
    network = MODELS[name].build(seed=4)
    save_weights(network, tmp_path / "w", {"note": "x"})
    again, header = load_weights(tmp_path / "w")
    assert header["note"] == "x" and again.config == network.config
    state, expected = again.state_dict(), network.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert (again.head.weight is again.embedding.weight) is network.config.tied
    assert fingerprint(again) == fingerprint(network)
    assert fingerprint(MODELS[name].build(seed=5)) != fingerprint(network)


def test_initialisation_survives_a_failed_save(tmp_path: Path) -> None:
    network = MODELS["model-samba"].build()
    with pytest.raises(UserError, match="nowhere"):
        save_weights(network, tmp_path / "nowhere" / "w")
    assert list(tmp_path.iterdir()) == []


def _rewrite_header(path: Path, **changes: str) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "w"
    network = MODELS["model-samba"].build()
    save_weights(network, path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut short"):
            load_weights(path)
    path.write_bytes(whole)
    _rewrite_header(path, format="2")
    with pytest.raises(UserError, match="written in format 2, this version reads up to 1"):
        load_weights(path)
    path.write_bytes(whole)
    _rewrite_header(path, config=MODELS["model-mamba"].model_dump_json())
    with pytest.raises(UserError, match="another architecture"):
        load_weights(path)
    path.write_bytes(whole)
    _rewrite_header(path, config='{"vocab_size": 0}')
    with pytest.raises(UserError, match="cannot be built: model"):
        load_weights(path)
    (tmp_path / "other").write_bytes(b"hello, this is no weight file at all")
    with pytest.raises(UserError):
        load_weights(tmp_path / "other")
    path.write_bytes(whole)
    with pytest.raises(UserError, match="another architecture"):
        load_tensors(MODELS["model-samba"].replace(d_model=48).build(), path)


def test_run_checkpoint_takes_the_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        run_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        run_checkpoint(tmp_path)
    network = MODELS["model-samba"].build()
    for step in (9, 100, 20):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_weights(network, folder / "model.safetensors")
    last = run_checkpoint(tmp_path)
    assert last.parent.name == "step-00000100"
    assert run_checkpoint(last.parent) == last == run_checkpoint(last)
