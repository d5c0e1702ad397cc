"""Whatever a user gives that is wrong: one clear line (what, where, what to do), exit code 2, nothing saved is lost.

Every row is a real process. An environment without the venv module and an unsupported Python are in `test_setup.py`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, safe_open, save_file

import milonga
from milonga.files import FolderLock, checksum
from milonga.models.pretrained import run_checkpoint

from .conftest import tiny_settings

FIRST, LAST = "run/checkpoints/step-00000002", "run/checkpoints/step-00000004"


@dataclass(frozen=True)
class Bad:
    """A command line, what is spoilt in the folder before it runs, and what the one line must say."""

    name: str
    arguments: list[str | bytes]
    words: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda folder: None


def tiny(*changes):
    return ["train", "demo", "--data", "text.txt", "--out", "new", *tiny_settings(*changes)]


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def recipe(**changes):
    """A YAML file of the tiny run with other settings at the top, under `model` and `training`."""

    def write(folder):
        settings = yaml.safe_load((folder / "run" / "run.yaml").read_text())
        for key, value in changes.items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
        (folder / "mine.yaml").write_text(yaml.safe_dump(settings))

    return write


def cut(name):
    def truncate(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return truncate


def header(name, **changes):
    """A safetensors file with other metadata, else whole."""

    def rewrite(folder):
        with safe_open(str(folder / name), framework="pt") as opened:
            metadata = dict(opened.metadata())
        save_file(load_file(folder / name), folder / name, metadata=metadata | changes)

    return rewrite


def newer_trainer(folder):
    record = json.loads((folder / LAST / "trainer.json").read_text())
    (folder / LAST / "trainer.json").write_text(json.dumps(record | {"format": 99}))


def weights_of_the_other(folder):
    """Whole, with a right checksum, but another architecture's."""
    weights = folder / LAST / "model.safetensors"
    shutil.copy(run_checkpoint(folder / "other"), weights)
    record = json.loads((folder / LAST / "trainer.json").read_text())
    record["files"]["model.safetensors"] = checksum(weights)
    (folder / LAST / "trainer.json").write_text(json.dumps(record))


def tensors_of_the_other(folder):
    """A header that says one architecture, tensors of another."""
    weights = folder / LAST / "model.safetensors"
    with safe_open(str(weights), framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(run_checkpoint(folder / "other")), weights, metadata=metadata)


GENERATE = ["generate", "run", "--bytes", "1"]
RESUME = ["train", "--resume", "run", "--set", "training.steps=6"]
SCORE = ["evaluate", "perplexity", "run"]

CASES = [
    # text
    Bad("missing text to score", [*SCORE, "no.txt"], ("no.txt",)),
    Bad("missing text to train on", ["train", "demo", "--data", "no.txt", "--out", "new"], ("no.txt",)),
    Bad("empty file to score", [*SCORE, "empty.txt"], ("empty",), file("empty.txt", b"")),
    Bad("empty file to train on", ["train", "demo", "--data", "e.txt", "--out", "new"], ("e.txt",), file("e.txt", b"")),
    Bad("folder without files", [*SCORE, "bare"], ("bare",), lambda folder: (folder / "bare").mkdir()),
    Bad(
        "folder without text",
        ["train", "demo", "--data", "pictures", "--out", "new"],
        ("pictures",),
        lambda folder: ((folder / "pictures").mkdir(), file("pictures/a.png", b"\x89PNG\r\n\x1a\n\x00\x00")(folder)),
    ),
    Bad("a picture as text", [*SCORE, "a.png"], ("a.png",), file("a.png", b"\x89PNG\r\n\x1a\n\x00\x00")),
    Bad("a glob of nothing", [*SCORE, "*.nothing"], ("*.nothing",)),
    Bad("damaged archive", [*SCORE, "a.txt.xz"], ("a.txt.xz",), file("a.txt.xz", b"\xfd7zXZ\x00 cut")),
    Bad("damaged JSON line", [*SCORE, "a.jsonl"], ("a.jsonl", "1"), file("a.jsonl", b'{"text": "a')),
    # recipes
    Bad("missing recipe file", ["train", "no.yaml"], ("no.yaml",)),
    Bad("no such recipe", ["train", "dmeo"], ("dmeo", "demo")),
    Bad("a recipe that is not YAML", ["train", "bad.yaml"], ("bad.yaml",), file("bad.yaml", b"a: [1\nb: }")),
    Bad("misspelt key", tiny("training.stpes=3"), ("training.stpes", "misspelt")),
    Bad("misspelt group", tiny("trainning.steps=3"), ("trainning", "misspelt")),
    Bad("misspelt key in a file", ["train", "mine.yaml"], ("mine.yaml", "modle"), recipe(modle={"a": 1})),
    Bad("a change without a value", tiny("training.steps"), ("training.steps", "key.path=value")),
    Bad("a word for a number", tiny("training.steps=many"), ("training.steps", "many")),
    Bad("pattern word without a layer", tiny("model.pattern=mamba rnn"), ("'rnn'", "mamba")),
    Bad("empty pattern", tiny("model.pattern="), ("model.pattern",)),
    Bad("unknown kind of layer", tiny("model.layers.swa.kind=lstm"), ("model.layers.swa", "'lstm'", "attention")),
    Bad("window of 0", tiny("model.layers.swa.window=0"), ("model.layers.swa.window", "0")),
    Bad("heads that do not divide the width", tiny("model.layers.swa.heads=5"), ("layers.swa", "5", "16")),
    Bad(
        "heads that do not divide",
        tiny("model.layers.swa.heads=4", "model.layers.swa.kv_heads=3"),
        ("layers.swa", "kv_heads"),
    ),
    Bad("micro-batches that do not divide", tiny("training.accumulation=4"), ("accumulation", "4")),
    Bad("unknown preset", tiny("model=samba-420m"), ("samba-420m", "samba-421m")),
    Bad("a model of tokens", tiny("model=samba-421m"), ("vocab_size", "256")),
    Bad("a device that is not there", ["generate", "run", "--device", "cuda:77"], ("cuda:77", "cpu")),
    Bad("a device without numbers", ["generate", "run", "--device", "meta"], ("meta", "cpu")),
    Bad("no device at all", [*tiny(), "--device", "toaster"], ("toaster",)),
    # runs and checkpoints
    Bad("no such run", ["generate", "nowhere"], ("nowhere",)),
    Bad("a folder without a run", ["generate", "bare"], ("bare",), lambda folder: (folder / "bare").mkdir()),
    Bad("nothing to resume", ["train", "--resume", "nowhere"], ("nowhere",)),
    Bad("a file that is no model", ["generate", "text.txt"], ("text.txt",)),
    Bad("a run that is there already", ["train", "demo", "--out", "run"], ("run", "--resume", "--out")),
    Bad("resumed with another model", [*RESUME, "--set", "model.d_model=32"], ("run", "model.d_model")),
    Bad("truncated weights, generating", GENERATE, (LAST,), cut(f"{LAST}/model.safetensors")),
    Bad("truncated weights, scoring", [*SCORE, "text.txt"], (LAST,), cut(f"{LAST}/model.safetensors")),
    Bad("truncated weights, resuming", RESUME, (LAST, "step-00000002"), cut(f"{LAST}/model.safetensors")),
    Bad("truncated optimizer", RESUME, (LAST, "step-00000002"), cut(f"{LAST}/optimizer.safetensors")),
    Bad("truncated record", RESUME, (LAST, "step-00000002"), cut(f"{LAST}/trainer.json")),
    Bad("another architecture, resuming", RESUME, (LAST, "another architecture"), weights_of_the_other),
    Bad("another architecture, generating", GENERATE, (LAST, "another architecture"), tensors_of_the_other),
    Bad("newer weights", GENERATE, (LAST, "99", "upgrade"), header(f"{LAST}/model.safetensors", format="99")),
    Bad("newer checkpoint", RESUME, (LAST, "99", "upgrade"), newer_trainer),
    Bad("damaged run file", RESUME, ("run.yaml",), file("run/run.yaml", b"a: [1\nb: }")),
    # prompts and sampling
    Bad("prompt that is not UTF-8", [*GENERATE, "--prompt", b"caf\xe9"], ("--prompt", "UTF-8")),
    Bad("no probability at all", [*GENERATE, "--top-p", "0"], ("top_p", "0")),
    # training
    Bad("NaN in the loss", tiny("training.optimizer.lr=1e30"), ("step", "training.optimizer.lr")),
    Bad("a folder that is a file", [*tiny(), "--out", "text.txt"], ("text.txt",)),
    Bad("text that is shorter than a window", tiny("training.window=100000000"), ("window",)),
    # the demo
    Bad("a demo over another run", ["demo", "--out", "mine"], ("mine", "--out"), lambda f: _renamed(f, "mine")),
    Bad("removing what is no demo", ["demo", "--again", "--out", "mine"], ("mine",), lambda f: _renamed(f, "mine")),
    Bad("removing what is no run", ["demo", "--again", "--out", "."], ("run.yaml",)),
]


def _renamed(folder, name):
    """The run under another name."""
    shutil.copytree(folder / "run", folder / name)
    path = folder / name / "run.yaml"
    path.write_text(path.read_text().replace("name: demo", "name: other"))


def one_line(done):
    """The complaint: the last line on stderr, after any lines of progress, and the only one of its kind."""
    lines = done.err.splitlines()
    assert lines, done
    assert [line for line in lines if line.startswith("milonga: ")] == lines[-1:], done.err
    assert "Traceback" not in done.err
    return lines[-1].removeprefix("milonga: ")


def saved(folder):
    """Every checkpoint's files with their contents."""
    return {path: path.read_bytes() for path in sorted(folder.glob("*/checkpoints/*/*"))}


@pytest.mark.parametrize("bad", CASES, ids=[bad.name for bad in CASES])
def test_bad_input(bad, server, place):
    bad.spoil(place)
    before = saved(place)
    done = server.run(*bad.arguments, folder=place)
    assert done.code == 2, done
    assert done.out == ""
    line = one_line(done)
    for word in bad.words:
        assert word in line
    after = saved(place)
    assert {path: after.get(path) for path in before} == before


def test_two_runs_in_one_folder(server, place):
    with FolderLock(place / "run"):
        done = server.run(*RESUME, folder=place)
        assert done.code == 2
        assert "another run" in one_line(done)
        assert "choose another folder" in one_line(done)
        assert server.run(*GENERATE, folder=place).code == 0, "reading needs no lock"
    assert server.run(*RESUME, folder=place).code == 0


@pytest.mark.parametrize("limit", [0, 300, 20_000])
def test_a_full_disk_while_saving(limit, server, place):
    """No file may grow past the limit, as when the disk is full; the checkpoints that were there stay usable."""
    before = saved(place)
    done = server.run(*RESUME, folder=place, file_limit=limit)
    assert done.code == 2, done
    assert "disk is full" in one_line(done) or "limit" in one_line(done)
    assert {path: content for path, content in saved(place).items() if path in before} == before
    assert not list(place.glob("run/checkpoints/.*"))
    assert server.run(*RESUME, folder=place).code == 0
    assert (place / "run/checkpoints/step-00000006").is_dir()


def test_a_full_disk_at_the_start(server, place):
    done = server.run(*tiny(), folder=place, file_limit=100)
    assert done.code == 2
    assert "new" in one_line(done)
    done = server.run(*tiny(), "--out", "new2", folder=place)
    assert done.code == 0, done.err


@pytest.fixture
def session(place):
    return milonga.load(place / "run").session()


@pytest.mark.parametrize("values", [[0, 256], [-1], [300, 300]])
def test_bytes_out_of_range_in_an_array(values, session):
    with pytest.raises(milonga.UserError, match="255") as caught:
        session.feed(np.array(values))
    assert "\n" not in str(caught.value)
    assert session.position == 0
    with pytest.raises(milonga.UserError, match="255"):
        session.score(np.array(values))


def test_an_array_of_something_else(session):
    with pytest.raises(milonga.UserError):
        session.feed(np.array([1.5]))
    with pytest.raises(milonga.UserError):
        session.feed("\ud800")


def test_a_state_file_of_another_model(place, session):
    session.feed(b"some text")
    session.save(place / "a.state")
    with pytest.raises(milonga.UserError, match=r"a\.state.*model"):
        milonga.load(place / "other").session(place / "a.state")
    assert milonga.load(place / "run").session(place / "a.state").position == 9


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "newer", "a weight file"])
def test_a_state_file_that_cannot_be_read(damage, place, session):
    path = place / "a.state"
    session.feed(b"some text")
    session.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        cut("a.state")(place)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "newer":
        header("a.state", session_format="99")(place)
    else:
        shutil.copy(run_checkpoint(place / "run"), path)
    with pytest.raises(milonga.UserError, match=r"a\.state") as caught:
        milonga.load(place / "run").session(path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_while_saving_a_state(place, session, monkeypatch):
    """The file-size limit is this process's own here."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    session.feed(b"first")
    session.save(place / "a.state")
    before = (place / "a.state").read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        session.feed(b" and more")
        with pytest.raises(milonga.UserError, match=r"a\.state"):
            session.save(place / "a.state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (place / "a.state").read_bytes() == before
    assert {path.name for path in place.iterdir()} == {"run", "other", "text.txt", "a.state"}


def test_a_model_that_predicts_nan(server, place):
    """Weights that are whole and hold NaN: generating says so."""
    weights = place / LAST / "model.safetensors"
    with safe_open(str(weights), framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(weights)
    tensors["norm.weight"] = torch.full_like(tensors["norm.weight"], float("nan"))
    save_file(tensors, weights, metadata=metadata)
    done = server.run(*GENERATE, folder=place)
    assert done.code == 2
    assert "predicts nan" in one_line(done)
