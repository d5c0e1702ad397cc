"""First use: fresh processes with caches of their own."""

import os
import tempfile

import pytest
import torch

from milonga.bench import bench_first_use
from milonga.bench.first_use import CACHES, figures_of, parse_parts
from milonga.errors import UserError


def test_a_cold_process_fills_the_caches_and_a_warm_one_finds_them(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {name: os.environ.get(name) for name in CACHES}
    result = bench_first_use(["ops:norm"], torch.device("cpu"), "fp32", compile_=False)
    rows = {(row["what"], row["caches"]): row for row in result.rows}
    names = ("op norm", "all")
    assert set(rows) == {(what, caches) for what in names for caches in ("cold", "warm")}
    for caches in ("cold", "warm"):
        assert rows["all", caches]["seconds"] == rows["op norm", caches]["seconds"]
    assert all(row["seconds"] > 0 for row in result.rows)
    assert rows["all", "cold"]["cache_files"] == rows["all", "warm"]["cache_files"] > 0, "nothing is compiled twice"
    assert {name: os.environ.get(name) for name in CACHES} == before
    assert not any(tmp_path.iterdir()), "the folders are removed"
    assert [figure.what for figure in result.figures] == [
        "first use of ops:norm, cold caches",
        "first use of ops:norm, warm caches",
    ]


def test_a_process_that_fails_is_said():
    with pytest.raises(UserError, match="first-use: the process that ran train failed"):
        bench_first_use(["train"], torch.device("cuda:7"), "bf16", compile_=True)


def test_parts_are_checked():
    assert parse_parts(None) == ["ops", "train", "prefill"]
    assert parse_parts("ops:scan+conv, train") == ["ops:scan+conv", "train"]
    for wrong in ("op", "ops:scam", "train:scan", ","):
        with pytest.raises(UserError, match="--what"):
            parse_parts(wrong)


def test_seconds_are_judged_on_one_chip():
    rows = [{"part": "ops", "what": "all", "caches": caches, "seconds": 5.0} for caches in ("cold", "warm")]
    cold, warm = figures_of(rows, "NVIDIA H100")
    assert (cold.demanded, cold.met) == (30, True)
    assert (warm.demanded, warm.met) == (3, False)
    assert all(figure.demanded is None for figure in figures_of(rows, None))
