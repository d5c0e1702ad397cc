"""A server of command processes, and tiny trained runs, made once."""

import shutil

import pytest

from .processes import Server

# The demo's recipe with a model and steps that take a moment.
TINY = [
    "training.steps=4",
    "training.save_every=2",
    "training.log_every=1",
    "training.window=32",
    "training.batch=2",
    "evaluation.tokens=64",
    "model.d_model=16",
    "model.repeats=1",
    "model.layers.swa.heads=2",
    "model.layers.swa.window=8",
    "model.layers.mlp.d_hidden=16",
]


def tiny_settings(*changes):
    """The `--set` options of a tiny run, with changes."""
    return [word for setting in (*TINY, *changes) for word in ("--set", setting)]


@pytest.fixture(scope="session")
def server():
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def trained(server, tmp_path_factory):
    """A folder with a text, and two tiny runs trained on it: `run`, and `other` of another architecture."""
    folder = tmp_path_factory.mktemp("trained")
    words = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    (folder / "text.txt").write_text("".join(f"{number}. {words}" for number in range(80)))
    for name, changes in (("run", ()), ("other", ("model.d_model=24",))):
        done = server.run("train", "demo", "--data", "text.txt", "--out", name, *tiny_settings(*changes), folder=folder)
        assert done.code == 0, done.err
        assert not any(mark in done.err for mark in ("\x1b", "\r", "Traceback"))
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy of that folder to spoil."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"
