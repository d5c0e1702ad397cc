"""Runs from their first step to their last."""

import json
import math
import signal
import sys
import threading

import pytest
import torch
import yaml

import milonga
from milonga.errors import UserError
from milonga.models import Network
from milonga.training import RunConfig, list_checkpoints, read_metrics, stored_config, train
from milonga.training.metrics import MetricsLog

from . import runs


@pytest.fixture
def texts(tmp_path):
    return runs.write_texts(tmp_path / "texts", documents=8, lines=20)


def test_a_run_learns_and_writes_what_it_did(texts, tmp_path):
    reports = []
    made = runs.config(texts, steps=60, evaluate_every=25, save_every=25, log_every=20)
    result = train(made, tmp_path / "run", progress=reports.append)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [20, 25, 40, 50, 60, 60]
    losses = [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]
    assert losses[-1] < 0.75 * losses[0] < 8
    heldout = [line["heldout_bits_per_byte"] for line in lines if "heldout_bits_per_byte" in line]
    assert heldout[-1] < heldout[0] < 8
    assert (result.step, result.bits_per_byte, result.train_bits_per_byte) == (60, heldout[-1], losses[-1])
    assert result.bytes == lines[-1]["bytes"] == 60 * 4 * 24
    assert result.bytes_per_second == pytest.approx(result.bytes / result.seconds)
    assert stored_config(tmp_path / "run") == made
    assert result.checkpoint == list_checkpoints(tmp_path / "run")[-1]
    training = [report for report in reports if report.phase == "training"]
    assert [report.done for report in training] == list(range(1, 61))
    assert {report.total for report in training} == {60}
    assert all(report.seconds_left >= 0 and report.bytes_per_second > 0 for report in training)
    assert {report.phase for report in reports} == {"reading", "training", "evaluating", "saving"}
    assert milonga.load(tmp_path / "run").facts["step"] == "60"


def test_the_heldout_figure_is_what_the_saved_weights_give(texts, tmp_path):
    result = train(runs.config(texts, steps=5), tmp_path / "run")
    network = milonga.load(result.checkpoint).network
    evaluated = runs.config(texts, steps=5)
    from milonga.data.prepare import prepare
    from milonga.training.heldout import HeldOut

    held = prepare(evaluated.data, tmp_path / "again", seed=evaluated.training.seed)[1]
    windows = HeldOut(held, window=24, batch=4, tokens=256, isolate=True)
    assert windows.bits_per_byte(network, device=torch.device("cpu")) == result.bits_per_byte
    nats = tokens = 0
    for index in range(windows.count):
        batch = windows.batch(index)
        logits = network(batch.tokens, segments=batch.segments).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        nats, tokens = nats + losses.item(), tokens + int((batch.targets != -100).sum())
    assert tokens <= 256
    assert nats / tokens / math.log(2) == pytest.approx(result.bits_per_byte, rel=1e-5)


def test_the_same_config_gives_the_same_run_whatever_the_caller_drew_before(texts, tmp_path):
    made = runs.config(texts, steps=6)
    train(made, tmp_path / "one")
    torch.rand(100)
    drawn = torch.get_rng_state()
    train(made, tmp_path / "two")
    assert torch.equal(torch.get_rng_state(), drawn)
    one, two = (runs.contents(list_checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert one == two
    train(runs.config(texts, steps=6, seed=1), tmp_path / "three")
    assert runs.contents(list_checkpoints(tmp_path / "three")[-1]) != one


def test_minutes_become_a_number_of_steps_before_step_0_and_leave_the_weights_alone(texts, tmp_path):
    made = runs.config(texts, steps=None, minutes=0.01)
    train(made, tmp_path / "run")
    stored = stored_config(tmp_path / "run")
    steps = stored.training.steps
    assert steps >= 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == steps
    train(stored, tmp_path / "again")
    one, two = (runs.contents(list_checkpoints(tmp_path / name)[-1]) for name in ("run", "again"))
    assert one == two
    assert runs.without_clock(tmp_path / "run") == runs.without_clock(tmp_path / "again")
    assert train(made, tmp_path / "run", resume=True).step == steps


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(texts, tmp_path):
    schedule = {"warmup_steps": 5, "from_zero": True}
    made = runs.config(texts, steps=20, save_every=1, log_every=1, optimizer={"lr": 1e25}, schedule=schedule)
    with pytest.raises(UserError) as caught:
        train(made, tmp_path / "run")
    line = str(caught.value)
    last = list_checkpoints(tmp_path / "run")[-1]
    step = int(last.name.removeprefix("step-"))
    assert line.startswith(f"step {step}: ")
    assert f"{last} is good and was kept" in line
    assert "training.optimizer.lr=3e+24" in line
    assert read_metrics(tmp_path / "run")[-1]["step"] == step


def test_nothing_held_out(texts, tmp_path):
    result = train(runs.config(texts, {"heldout": []}, steps=3), tmp_path / "run")
    assert result.bits_per_byte is None
    assert not [line for line in read_metrics(tmp_path / "run") if "heldout_bits_per_byte" in line]


def test_a_held_out_text_shorter_than_a_window(texts, tmp_path):
    (tmp_path / "short.txt").write_text("short, yes")
    result = train(runs.config(texts, {"heldout": [str(tmp_path / "short.txt")]}, steps=2), tmp_path / "run")
    assert 4 < result.bits_per_byte < 12


def test_data_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"missing does not exist"):
        train(runs.config(tmp_path / "missing"), tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_tensorboard_asked_for_and_not_installed(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"TensorBoard is not installed: pip install 'milonga\[tensorboard\]'"):
        train(runs.config(texts, steps=2, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_compiling_without_a_compiler(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        train(runs.config(texts, steps=2, compile=True), tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.filterwarnings("default")  # of other people's protocol buffers
def test_tensorboard_writes_event_files(texts, tmp_path):
    pytest.importorskip("tensorboard")
    train(runs.config(texts, steps=2, tensorboard=True), tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"heldout_bits_per_byte" in events.read_bytes()


def test_compiled_it_takes_the_same_steps(texts, tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        return torch._dynamo.optimize("aot_eager")(network)

    monkeypatch.setattr(torch, "compile", compile_eagerly)  # Inductor needs a C++ compiler
    plain = train(runs.config(texts, {"isolate": False}, steps=3), tmp_path / "plain")
    made = train(runs.config(texts, {"isolate": False}, steps=3, compile=True), tmp_path / "compiled")
    assert isinstance(compiled[0], Network)
    assert made.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-5)


def test_a_loop_of_ones_own(texts):
    """The pieces are usable one by one."""
    from milonga.training import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate, training_step

    made = RunConfig.parse(runs.settings(texts), "test")
    from milonga.data.corpus import Corpus
    from milonga.data.windows import WindowSampler

    sampler = WindowSampler(Corpus.build([texts], texts.parent / "cache"), window=24, batch=4, seed=0)
    network = made.model.build(seed=0)
    optimizer = build_optimizer(network, OptimizerConfig(lr=0.01))
    losses = []
    for step in range(30):
        lr = learning_rate(step, 30, 0.01, ScheduleConfig(warmup_steps=3))
        result = training_step(network, optimizer, sampler.batch(step), device=torch.device("cpu"), lr=lr)
        losses.append(result.nats / result.tokens)
    assert losses[-1] < 0.8 * losses[0]


def test_metrics_are_cut_after_a_step_and_half_a_line_is_left_out(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in range(5):
            log.write({"step": step, "bits_per_byte": 0.1 * step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "bits')
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    with MetricsLog(tmp_path, 2) as log:
        log.write({"step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path / "elsewhere")


def test_run_yaml_is_what_a_recipe_is(texts, tmp_path):
    train(runs.config(texts, steps=2), tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["training"]["steps"] == 2
    assert train(RunConfig.load(tmp_path / "run" / "run.yaml"), tmp_path / "copy").step == 2


def test_a_run_in_another_thread_leaves_signals_alone(texts, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results = []
    worker = threading.Thread(target=lambda: results.append(train(runs.config(texts, steps=2), tmp_path / "run")))
    worker.start()
    worker.join(60)
    assert [result.step for result in results] == [2]
    assert signal.getsignal(signal.SIGINT) is before
