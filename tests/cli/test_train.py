"""`milonga train` in real processes."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from milonga.training import list_checkpoints, read_metrics, stored_config
from tests.training import runs

from . import processes


@pytest.fixture(scope="module")
def server():
    made = processes.Server()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path):
    """A working folder with texts and a recipe over them."""
    runs.write_texts(tmp_path / "texts")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(runs.settings("texts", steps=4)))
    return tmp_path


def test_it_trains_and_says_what_came_out(server, folder):
    done = server.run("train", "tiny.yaml", folder=folder)
    assert done.code == 0, done.err
    assert "runs/tiny" in done.out
    assert re.search(r"held-out text .*\d\.\d{3} bits per byte", done.out)
    assert "training: 4/4 steps" in done.err
    assert "bits/byte" in done.err
    assert "bytes/s" in done.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.out + done.err)
    assert stored_config(folder / "runs" / "tiny").training.steps == 4


def test_json_alone_is_on_stdout(server, folder):
    done = server.run("train", "tiny.yaml", "--out", "here", "--json", "--device", "cpu", folder=folder)
    result = json.loads(done.out)
    assert (result["run"], result["step"], result["bytes"]) == ("here", 4, 4 * 4 * 24)
    assert result["bits_per_byte"] > 0
    assert result["checkpoint"] == "here/checkpoints/step-00000004"


def test_ones_own_text_in_one_command(server, folder):
    (folder / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 40)
    small = ["--set", "training.steps=2", "--set", "training.batch=2", "--set", "training.window=32"]
    done = server.run("train", "demo", "--data", "book.txt", "--out", "mine", *small, folder=folder)
    assert done.code == 0, done.err
    assert "one document: its last 5% is held out" in done.err
    data = stored_config(folder / "mine").data
    assert (data.paths, data.heldout, data.heldout_tail) == (["book.txt"], 0.05, True)
    again = server.run("train", "demo", "--data", "book.txt", "--out", "mine", *small, folder=folder)
    assert again.code == 2
    assert "mine already holds a run: continue it" in again.err
    (folder / "texts" / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    done = server.run("train", "demo", "--data", "texts", "--out", "many", *small, folder=folder)
    assert done.code == 0, done.err
    assert "left out, for they hold no text: cover.png\n" in done.err
    assert stored_config(folder / "many").data.heldout_tail is False
    done = server.run("train", "--resume", "mine", "--set", "training.steps=3", folder=folder)
    assert done.code == 0, done.err
    assert read_metrics(folder / "mine")[-1]["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "tiny.yaml", "--set", "training.step=3"], "tiny.yaml: training.step: no such setting (misspelt?)"),
        (["train", "dmo"], "no recipe 'dmo': there are demo, "),
        (["train", "samba-421m"], "samba-421m: names no text to train on: give a file, a folder or a glob with --data"),
        (["train", "tiny.yaml", "--data", "nowhere"], "nowhere does not exist"),
        (["train", "--resume", "nowhere"], "nowhere: holds no run"),
        (["train", "--resume", "nowhere", "--out", "x"], "leave out --data and --out"),
        (["train", "tiny.yaml", "--device", "warp"], "device 'warp' cannot be used here"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(server, folder, arguments, line):
    done = server.run(*arguments, folder=folder)
    assert done.code == 2
    assert done.out == ""
    said = [text for text in done.err.splitlines() if text.startswith("milonga: ")]
    assert len(said) == 1
    assert line in said[0]
    assert "Traceback" not in done.err


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(server, folder):
    assert server.run("train", "tiny.yaml", folder=folder).code == 0
    before = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    done = server.run("train", "tiny.yaml", "--set", "training.seed=5", folder=folder)
    assert done.code == 2
    assert "runs/tiny already holds a run with other settings (training.seed)" in done.err
    assert "milonga train --resume runs/tiny" in done.err
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before
    done = server.run("train", "--resume", "runs/tiny", "--set", "training.seed=5", folder=folder)
    assert done.code == 2
    assert "cannot continue with another training.seed" in done.err


def test_ctrl_c_saves_and_says_how_to_continue(folder):
    arguments = [
        "train",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "training.steps=100000",
        "--set",
        "training.log_every=1",
    ]
    process = subprocess.Popen(
        [processes.script(), *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not (folder / "run" / "metrics.jsonl").exists() or not read_metrics(folder / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("milonga: stopped after step ")
    assert err.splitlines()[-1].endswith("continue with: milonga train --resume run")
    assert len(list_checkpoints(folder / "run")) >= 1
