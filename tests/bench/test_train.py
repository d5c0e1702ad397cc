"""Training steps, timed on a tiny model."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from milonga.bench import bench_train, peers, train
from milonga.bench.demands import TRAIN
from milonga.bench.models import training_shape, training_shapes
from milonga.bench.train import counted_flops
from milonga.bench.train_rows import TrainRow, figures_of, table
from milonga.models.accounting import flops_per_token

CPU = torch.device("cpu")
TINY = replace(training_shape("byte-samba-small"), batch=2, length=16)


def test_a_step_is_timed_beside_its_products():
    seen = []
    result = bench_train(
        [TINY], CPU, "fp32", compile_=False, budget=0.05, progress=lambda done, total, what: seen.append((done, what))
    )
    (row,) = result.rows
    assert row["tokens_per_second"] == pytest.approx(32 / row["step_ms"] * 1e3)
    assert row["fraction"] == pytest.approx(row["floor_ms"] / row["step_ms"])
    assert 0 < row["utilisation_6nd"] < row["utilisation_counted"], "6ND leaves attention and scan out"
    assert row["steps"] >= 3
    assert 0 < row["loss"] < 8
    assert row["parameters"] == 412_032
    assert any("compiled" in what for _, what in seen)
    assert seen[-1][0] == 1
    json.dumps(result.to_json("milonga bench train"), allow_nan=False)


def test_arithmetic_is_averaged_over_the_positions_of_a_row():
    exact = sum(flops_per_token(TINY.config, place, training=True) for place in range(16)) / 16
    assert counted_flops(TINY) == pytest.approx(32 * exact, rel=1e-3)


def trained(name, rate, gib):
    shape = training_shapes()[name]
    return TrainRow(
        shape=shape,
        who="milonga",
        precision="bf16",
        compiled=True,
        captured=False,
        parameters=1,
        seconds=shape.batch * shape.length / rate,
        spread=0.0,
        steps=9,
        first=1.0,
        peak_bytes=int(gib * 2**30),
        reserved_bytes=int(gib * 2**30) + 1,
        flops_6nd=1.0,
        flops_counted=1.0,
        floor=0.1,
        product_rate=1.0,
        loss=1.0,
    )


def test_rates_and_memory_are_judged_on_the_chip_they_are_asked_of():
    rows = [trained("samba-421m", 160_000, 30.0)]
    rate, memory = figures_of(rows, "NVIDIA H100 80GB HBM3")
    assert (rate.demanded, rate.aim, rate.met, rate.unit) == (155_000, 175_000, True, "tokens/s")
    assert (memory.demanded, memory.met, memory.unit) == (27.8, False, "GiB")
    assert all(figure.demanded is None for figure in figures_of(rows, "Another GPU"))
    (byte_rate, _) = figures_of([trained("byte-samba-30m", 2e6, 1)], None)
    assert byte_rate.unit == "bytes/s"


def test_demands_are_of_shapes_of_record():
    shapes = training_shapes()
    assert all((shapes[name].batch, shapes[name].length) == (batch, length) for name, batch, length in TRAIN)


def peers_note(peers: bool) -> list[str]:
    return list(bench_train([TINY], CPU, "fp32", compile_=False, budget=0, peers=peers).notes)


def test_models_of_packages_that_are_not_there_are_not_asked(monkeypatch):
    monkeypatch.setattr(peers, "INSTALLED", dict.fromkeys(peers.PACKAGES, False))
    assert list(peers.peer_models(TINY.config, "cpu")) == []
    assert "not beside it, since not installed: fla, mamba_ssm, transformers" in peers_note(peers=True)
    assert not any("not installed" in note for note in peers_note(peers=False))


def test_a_package_whose_models_cannot_be_loaded_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "INSTALLED", {**dict.fromkeys(peers.PACKAGES, False), "mamba_ssm": True})
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # what a broken installation does: importing it fails
    result = bench_train([TINY], CPU, "fp32", compile_=False, budget=0)
    assert [row["who"] for row in result.rows] == ["milonga"]
    assert result.notes[0].startswith("mamba_ssm is installed but could not be used: ModuleNotFoundError")


def test_a_peer_is_trained_and_compared(monkeypatch):
    """A model of PyTorch's own in a peer's place: the same batch, its own count of parameters."""

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(256, 256)

        def forward(self, tokens):
            return nn.functional.cross_entropy(self.table(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    monkeypatch.setattr(train, "peer_models", lambda config, device: [("bigram", Bigram())])
    result = bench_train([TINY], CPU, "fp32", compile_=False, budget=0)
    ours, other = result.rows
    assert (ours["who"], other["who"], other["parameters"]) == ("milonga", "bigram", 256 * 256)
    assert other["loss"] > 0
    assert result.figures[-1].what.endswith("against bigram")
    assert result.figures[-1].measured == pytest.approx(ours["tokens_per_second"] / other["tokens_per_second"])


def test_a_row_says_how_kernels_were_launched_and_what_memory_was_held():
    row = trained("samba-421m", 160_000, 30.0)
    shown = table([replace(row, captured=True, compiled=False), row, replace(row, compiled=False)], "training").rows
    assert [cells[1] for cells in shown] == ["milonga, captured", "milonga, compiled", "milonga, launched"]
    assert shown[0][-1] == "30.0 of 30.0 GiB"


def test_on_a_cpu_nothing_is_captured():
    for capture in (True, False):
        result = bench_train([TINY], CPU, "fp32", compile_=False, capture=capture, budget=0, peers=False)
        assert result.rows[0]["captured"] is False
        assert result.settings["capture"] is capture
