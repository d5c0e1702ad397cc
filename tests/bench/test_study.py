"""The throughput study: prompts and generation of small models, and what is made of the times."""

import json

import pytest
import torch

from milonga.bench import bench_decode, bench_prefill, paper
from milonga.bench.decode import DecodeRow, decode_figures, whole_generation
from milonga.bench.models import STUDY, study_model
from milonga.bench.prefill import PrefillRow, prefill_figures
from milonga.bench.study import as_published, attempt
from milonga.errors import UserError
from milonga.evaluation.decoding import DecodeTime, PrefillTime

CPU = torch.device("cpu")
MODELS = {name: study_model(name, small=True) for name in ("samba", "transformer")}


def test_prompts_of_every_length_have_the_same_total():
    result = bench_prefill(MODELS, [8, 32], 32, CPU, torch.float32, repeats=1)
    assert [(row["model"], row["length"], row["batch"]) for row in result.rows] == [
        ("samba", 8, 4),
        ("samba", 32, 1),
        ("transformer", 8, 4),
        ("transformer", 32, 1),
    ]
    for row in result.rows:
        assert row["tokens_per_second"] == pytest.approx(32 / row["ms"] * 1e3)
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert [row["times_transformer"] for row in result.rows[2:]] == [1.0, 1.0]
    assert result.rows[0]["times_transformer"] == pytest.approx(result.rows[2]["ms"] / result.rows[0]["ms"])
    assert {figure.what for figure in result.figures} >= {"prefill samba, 1 x 32, over transformer"}
    json.dumps(result.to_json("milonga bench prefill"), allow_nan=False)


def test_a_total_that_a_length_does_not_divide_is_said_and_one_below_it_refused():
    result = bench_prefill({"samba": MODELS["samba"]}, [8, 12, 16], 32, CPU, torch.float32, repeats=1)
    assert [(row["length"], row["batch"], row["tokens"]) for row in result.rows] == [
        (8, 4, 32),
        (12, 2, 24),
        (16, 2, 32),
    ]
    assert result.notes[1:] == ["2 x 12: 24 tokens, as prompts of 12 do not make 32"]
    with pytest.raises(UserError, match="a prompt of 33 tokens is longer than all rows together, 32; give --total 33"):
        bench_prefill(MODELS, [8, 33], 32, CPU, torch.float32, repeats=1)


def test_generation_is_measured_at_positions():
    result = bench_decode(MODELS, [4, 16], 2, CPU, torch.float32, steps=2, repeats=1)
    assert [(row["model"], row["position"]) for row in result.rows] == [
        (name, position) for name in MODELS for position in (0, 4, 16)
    ]
    for row in result.rows:
        assert row["step_ms"] > 0
        assert row["captured"] is False
        assert (row["tokens_per_second"] is None) == (row["position"] == 0)
    json.dumps(result.to_json("milonga bench decode"), allow_nan=False)


def test_a_whole_generation_is_the_sum_of_its_steps():
    assert whole_generation([(0, 2.0), (10, 4.0)]) == 30  # ten steps of three milliseconds on average
    assert whole_generation([(0, 1.0), (4, 1.0), (8, 3.0)]) == 4 + 8


def step(milliseconds, floor=1.0):
    return DecodeTime(milliseconds, 0.0, floor, 1, 1, 1.0, 16, 0, True, "none", "bfloat16", "cpu")


def test_ratios_of_generation_are_judged():
    samba = DecodeRow("samba", 16, {0: step(2.0), 65536: step(2.0)})
    transformer = DecodeRow("transformer", 16, {0: step(2.0), 65536: step(12.0, floor=9.0)})
    assert samba.rate(65536) == pytest.approx(16 / 2e-3)
    whole, there, floor = decode_figures([samba, transformer], "NVIDIA H100 80GB HBM3")
    assert (whole.measured, whole.demanded, whole.aim) == (pytest.approx(3.5), 3.0, 3.64)
    assert (there.measured, there.demanded, there.met) == (pytest.approx(6.0), 5.0, True)
    assert (floor.measured, floor.demanded) == (pytest.approx(0.75), 0.7)
    assert all(figure.demanded is None for figure in decode_figures([samba, transformer], "Another GPU"))


def test_a_length_without_all_its_positions_has_no_rate():
    row = DecodeRow("samba", 16, {0: step(2.0), 4: "out of memory", 8: step(3.0)})
    assert row.rate(8) is None
    assert row.rate(4) is None
    assert row.rate(0) is None
    assert decode_figures([row], None) == []


def read(model, milliseconds):
    outcome = PrefillTime(milliseconds, 0.0, 131072, 1, 8192, 0, "bfloat16", "cuda")
    return PrefillRow(model, 131072, 1, outcome, 0.5)


def test_the_longest_prompt_is_judged():
    rows = [read("samba", 850), read("transformer", 5100), read("mamba", 700)]
    ours, over, baseline, other = prefill_figures(rows, "NVIDIA H100")
    assert (ours.demanded, ours.aim, ours.met) == (900, 820, True)
    assert (over.measured, over.demanded) == (pytest.approx(6.0), 4.0)
    assert (baseline.demanded, baseline.met) == (6137, True)
    assert other.demanded is None


def test_a_model_that_does_not_fit_is_left_out():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert attempt(greedy) == "out of memory"
    assert attempt(lambda: 3) == 3


def test_what_no_memory_holds_is_told_from_other_faults():
    for shape in ((1 << 40, 1 << 10), (1 << 40, 1 << 20, 1 << 10)):
        assert attempt(lambda shape=shape: torch.empty(shape)) == "out of memory"

    def faulty():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(faulty)


def test_published_figures_stand_beside_the_papers_shapes_only():
    assert as_published(MODELS) == set()
    assert as_published({name: study_model(name, small=False) for name in STUDY}) == set(STUDY)


def test_the_published_ratio_is_that_of_the_published_curves():
    ratio = paper.GENERATION["samba"][65536] / paper.GENERATION["transformer"][65536]
    assert ratio == pytest.approx(paper.GENERATION_RATIO, abs=0.02)
