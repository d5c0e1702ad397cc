"""A run that was killed, interrupted or stopped by a full disk ends with the bits of one that was not."""

import os
import random
import signal
import time

import pytest

from milonga.errors import UserError
from milonga.training import list_checkpoints, stored_config, train
from milonga.training.checkpoint import read_checkpoint

from . import runs

VARIANTS = {
    "plain": {},
    "accumulation, bf16, muon": {
        "accumulation": 2,
        "precision": "bf16",
        "optimizer": {"name": "muon", "lr": 0.01},
    },
    "carried state": {"data": {"carried": True}},
}


def _config(folder, variant):
    changes = dict(VARIANTS[variant])
    data = changes.pop("data", {})
    return runs.config(folder, data, steps=40, save_every=7, evaluate_every=20, log_every=3, **changes)


def _same(one, other):
    last, again = list_checkpoints(one)[-1], list_checkpoints(other)[-1]
    assert last.name == again.name
    assert runs.contents(last) == runs.contents(again)
    assert runs.without_clock(one) == runs.without_clock(other)
    before, after = read_checkpoint(last).position, read_checkpoint(again).position
    assert before.model_copy(update={"seconds": 0.0}) == after.model_copy(update={"seconds": 0.0})


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_and_resumed_it_is_the_uninterrupted_run(tmp_path, variant):
    made = _config(runs.write_texts(tmp_path / "texts"), variant)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert runs.finish(runs.start(made, whole)) == 0
    moments = random.Random(variant)
    for step in (5, 13, 20, 28):
        process = runs.start(made, broken, resume=(broken / "run.yaml").exists())
        runs.wait_for_step(process, broken, step + moments.randrange(3))
        if moments.random() < 0.5:  # while a checkpoint is being written
            runs.wait_for_save(process, broken)
        else:
            time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert runs.finish(process) == -signal.SIGKILL
    assert runs.finish(runs.start(made, broken, resume=True)) == 0
    assert not list(broken.glob("checkpoints/.*"))
    assert (list_checkpoints(broken)[-1] / "state.safetensors").exists() is (variant == "carried state")
    _same(whole, broken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_before_leaving(tmp_path, number, code):
    made = runs.config(runs.write_texts(tmp_path / "texts"), steps=400, save_every=0, evaluate_every=0, log_every=1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = runs.start(made, stopped)
    runs.wait_for_step(process, stopped, 3)
    os.kill(process.pid, number)
    assert runs.finish(process) == code
    (saved,) = list_checkpoints(stopped)
    step = read_checkpoint(saved).position.step
    assert 3 <= step < 400
    assert runs.without_clock(stopped)[-1]["step"] == step
    shorter = made.with_steps(step + 5)
    assert runs.finish(runs.start(shorter, stopped, resume=True)) == 0
    assert stored_config(stopped).training.steps == step + 5
    assert list_checkpoints(stopped)[-1].name == f"step-{step + 5:08}"
    assert not list(whole.parent.glob("**/*.partial"))


def test_a_stop_in_the_middle_of_an_interval_changes_no_bit(tmp_path):
    made = _config(runs.write_texts(tmp_path / "texts"), "plain")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert runs.finish(runs.start(made, whole)) == 0
    process = runs.start(made, stopped)
    runs.wait_for_step(process, stopped, 9)
    os.kill(process.pid, signal.SIGINT)
    assert runs.finish(process) == 130
    assert runs.finish(runs.start(made, stopped, resume=True)) == 0
    _same(whole, stopped)


def test_a_full_disk_while_saving_leaves_the_checkpoints_before_it_whole(tmp_path):
    made = runs.config(runs.write_texts(tmp_path / "texts"), steps=6, save_every=3)
    run = tmp_path / "run"
    assert runs.finish(runs.start(made, run)) == 0
    before = {path.name: runs.contents(path) for path in list_checkpoints(run)}
    assert list(before) == ["step-00000003", "step-00000006"]
    more = made.with_steps(12)
    assert runs.finish(runs.start(more, run, resume=True, file_limit=8192)) == 2
    line = (run / "error.txt").read_text()
    assert "the disk is full or a file-size limit was met" in line
    assert "\n" not in line
    assert {path.name: runs.contents(path) for path in list_checkpoints(run)} == before
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert runs.finish(runs.start(more, run, resume=True)) == 0
    assert list_checkpoints(run)[-1].name == "step-00000012"


def test_two_runs_in_one_folder_at_once(tmp_path):
    made = runs.config(runs.write_texts(tmp_path / "texts"), steps=100_000, log_every=1)
    run = tmp_path / "run"
    process = runs.start(made, run)
    try:
        runs.wait_for_step(process, run, 1)
        with pytest.raises(UserError, match=rf"another run \(pid {process.pid}\) is writing to"):
            train(made, run, resume=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_a_changed_config_is_named(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    run = tmp_path / "run"
    train(runs.config(texts, steps=2), run)
    with pytest.raises(UserError, match=r"cannot continue with another training\.optimizer\.lr, training\.seed"):
        train(runs.config(texts, steps=2, seed=1, optimizer={"lr": 0.02}), run, resume=True)
    result = train(runs.config(texts, steps=4, keep=1, device="auto"), run, resume=True, device="cpu")
    assert result.step == 4
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004"]


def test_changed_texts_are_noticed(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    run = tmp_path / "run"
    made = runs.config(texts, steps=2)
    train(made, run)
    (texts / "0.txt").write_text("another story\n" * 30)
    with pytest.raises(UserError, match=r"the training data are not those of step-00000002 \(changed: fingerprint\)"):
        train(made.with_steps(3), run, resume=True)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    run = tmp_path / "run"
    train(runs.config(texts, steps=2), run)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run: continue it with milonga train --resume"):
        train(runs.config(texts, steps=2), run)
    with pytest.raises(UserError, match=r"already holds a run with other settings \(training\.seed\)"):
        train(runs.config(texts, steps=2, seed=3), run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_there_is_nothing_to_resume_in_an_empty_place(tmp_path):
    made = runs.config(runs.write_texts(tmp_path / "texts"))
    with pytest.raises(UserError, match=r"nowhere: holds no run \(run\.yaml is missing\); start one with"):
        train(made, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
