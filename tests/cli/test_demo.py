"""The demo, with a tiny model in place of its own: interrupted, continued, shown again, started over."""

import json
import re
import signal
import subprocess
import time

import pytest
import yaml

from .conftest import tiny_settings
from .processes import script

STEPS = 300


@pytest.fixture(scope="module")
def begun(server, tmp_path_factory):
    """A demo of a tiny model on a small text, at step 2 of 300."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text("".join(f"{number}. It rained, and the rain went on.\n" for number in range(200)))
    (folder / "held.txt").write_text("".join(f"{number}: the rain, and then the sun.\n" for number in range(200)))
    settings = tiny_settings("training.steps=2", "training.save_every=0", "data.heldout=[held.txt]")
    done = server.run("train", "demo", "--data", "text.txt", "--out", "run", *settings, folder=folder)
    assert done.code == 0, done.err
    path = folder / "run" / "run.yaml"
    config = yaml.safe_load(path.read_text())
    config["training"]["steps"] = STEPS
    path.write_text(yaml.safe_dump(config))
    return folder


def _steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_interrupted_continued_shown_again(begun, server):
    run = begun / "run"
    process = subprocess.Popen(
        [script(), "demo", "--out", "run"], cwd=begun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while max(_steps(run)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "continuing the demo in run; to start over: milonga demo --out run --again" in err
    assert err.splitlines()[-1] == "milonga: stopped and saved; milonga demo --out run continues here"
    stopped = max(_steps(run))
    assert 5 <= stopped < STEPS
    assert not (run / "report.json").exists()

    done = server.run("demo", "--out", "run", folder=begun)
    assert done.code == 0, done.err
    assert _steps(run).count(stopped) == 1, "the continued run went on behind the last step"
    assert max(_steps(run)) == STEPS
    assert "continuing the demo" in done.err
    assert done.out.startswith("No one would have believed in the last years of the nineteenth century that ")
    assert done.out.endswith("report: run/report.html\n")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.out + done.err), "control characters off a terminal"
    figures = json.loads((run / "report.json").read_text())
    assert {"bits_per_byte", "xz_bits_per_byte", "train_seconds", "bytes_per_second", "state_bytes"} <= set(figures)
    assert figures["context"][0]["bytes"] == 1024
    assert figures["train_steps"] == STEPS
    assert f"{figures['bits_per_byte']:.3f}" in done.out
    assert (run / "report.html").read_text().startswith("<!")

    again = server.run("demo", "--out", "run", folder=begun)
    assert (again.code, again.out) == (0, done.out)
    assert again.err == "this demo is finished; to start over: milonga demo --out run --again\n"
    assert max(_steps(run)) == STEPS
    shown = json.loads(server.run("demo", "--out", "run", "--json", folder=begun).out)
    assert shown == figures | {"report": "run/report.html"}


def test_started_over(begun, server):
    """`--again` removes the demo at that place before it begins anew; here the new one cannot be written."""
    (begun / "elsewhere").mkdir()
    (begun / "run").rename(begun / "elsewhere" / "run")
    done = server.run("demo", "--out", "elsewhere/run", "--again", folder=begun, file_limit=100)
    assert done.code == 2
    assert "elsewhere/run" in done.err
    assert not (begun / "elsewhere" / "run" / "checkpoints").exists()
