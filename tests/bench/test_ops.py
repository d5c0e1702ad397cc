"""`bench_ops`: every op measured on a small shape, peers that are there and peers that are not, wrong shapes."""

import json
import subprocess
import sys

import pytest
import torch

from milonga.bench import bench_ops, peers
from milonga.bench.cases import OPS
from milonga.bench.demands import OP_MILLISECONDS
from milonga.bench.ops import OpRow, figures_of, parse_dtype, parse_ops, parse_shape
from milonga.bench.timing import Failure, Timing
from milonga.bench.work import Floor, Work
from milonga.errors import UserError

CPU = torch.device("cpu")
SMALL = {
    "scan": (1, 9, 32),
    "conv": (1, 9, 32),
    "attention": (1, 9, 4, 2, 8, 3),
    "norm": (1, 9, 32),
    "swiglu": (1, 9, 32),
    "rotary": (1, 9, 3, 8),
    "loss": (1, 9, 32, 50),
    "linear": (1, 9, 32, 48),
}


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_measured_beside_its_peers(name):
    result = bench_ops([OPS[name]], [SMALL[name]], torch.float32, CPU)
    ours = [row for row in result.rows if row["backend"] is not None]
    assert [row["pass"] for row in ours] == ["forward", "both"]
    others = [row for row in result.rows if row["backend"] is None]
    installed = [package for package in peers.OF_OP[name] if peers.INSTALLED[package] and package != "torch"]
    assert others or not installed
    for row in result.rows:
        assert row["failed"] is None, row
        assert row["ms"] > 0
        assert row["floor_ms"] > 0
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert tuple(row["shape"].values())[: len(SMALL[name])] == SMALL[name]
    for row in others:
        assert row["difference"] < 1e-4, "a peer computes what we compute"
        mine = next(one for one in ours if one["pass"] == row["pass"])
        assert row["times_ours"] == pytest.approx(row["ms"] / mine["ms"])
    json.dumps(result.to_json("milonga bench ops"), allow_nan=False)


def test_absent_peers_are_not_asked(monkeypatch):
    monkeypatch.setattr(peers, "INSTALLED", dict.fromkeys(peers.PACKAGES, False))
    result = bench_ops([OPS["scan"]], [SMALL["scan"]], torch.float32, CPU, "forward")
    assert [row["who"] for row in result.rows] == ["milonga"]
    assert list(result.notes) == ["not beside it, since not installed: mamba_ssm, mambapy, transformers"]


def test_a_peer_that_cannot_be_loaded_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers, "INSTALLED", {**dict.fromkeys(peers.PACKAGES, False), "mamba_ssm": True})
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # what a broken installation does: importing it fails
    result = bench_ops([OPS["scan"]], [SMALL["scan"]], torch.float32, CPU, "forward")
    assert [row["who"] for row in result.rows] == ["milonga"]
    broken, missing = result.notes
    assert broken.startswith("mamba_ssm is installed but could not be used: ModuleNotFoundError")
    assert "mamba_ssm" not in missing


def test_no_peers_when_none_are_wanted():
    result = bench_ops([OPS["norm"]], [SMALL["norm"]], torch.float32, CPU, "forward", peers=False)
    assert [row["who"] for row in result.rows] == ["milonga"]


def test_no_peer_is_imported_before_it_is_asked():
    code = "import sys, milonga.bench; print([n for n in ('mambapy', 'transformers', 'fla') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("scan", (1, 2), "scan takes B,T,E\\[,N\\], got 1,2"),
        ("norm", (1, 2, 3, 4), "norm takes B,T,D, got 1,2,3,4"),
        ("scan", (1, 0, 3), "T of scan must be at least 1, got 0"),
        ("attention", (1, 4, 3, 2, 8), "G of attention must divide H"),
        ("rotary", (1, 4, 3, 7), "K of rotary must be even"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(name, numbers, said):
    with pytest.raises(UserError, match=said):
        bench_ops([OPS[name]], [numbers], torch.float32, CPU)


def test_inputs_larger_than_memory_are_refused():
    with pytest.raises(UserError, match="do not fit into memory"):
        bench_ops([OPS["norm"]], [(1, 1 << 22, 1 << 22)], torch.float32, CPU)


def test_names_are_checked():
    assert [op.name for op in parse_ops("conv, scan,conv")] == ["conv", "scan"]
    assert parse_ops(None) == list(OPS.values())
    assert parse_shape("8, 4096,3072") == (8, 4096, 3072)
    assert parse_dtype(None, CPU) == torch.float32
    for wrong in ("scam", ","):
        with pytest.raises(UserError, match="--op"):
            parse_ops(wrong)
    for wrong in ("8,x", "", "8;4", "-1,2,3"):
        with pytest.raises(UserError, match="--shape"):
            parse_shape(wrong)
    with pytest.raises(UserError, match="--dtype"):
        parse_dtype("fp8", CPU)
    with pytest.raises(UserError, match="--pass"):
        bench_ops([OPS["norm"]], [SMALL["norm"]], torch.float32, CPU, "backward")


def row(who, milliseconds, backend=None, *, ratio=None, both=False, op="scan", shape=(8, 4096, 3072, 16)):
    seconds = milliseconds / 1e3
    timing = Timing(seconds, seconds, 0.01, 9, 1.0, 1e-4, 0)
    letters = dict(zip(OPS[op].letters, shape, strict=True))
    return OpRow(op, letters, "bf16", both, who, backend, timing, ratio, None, (Work(1),), Floor(seconds / 2, "bytes"))


def test_figures_say_what_is_demanded_of_one_chip_only():
    rows = [row("milonga", 0.7, "triton"), row("mamba_ssm", 1.74, ratio=1.74 / 0.7)]
    ours, against = figures_of(rows, "NVIDIA H100 80GB HBM3")
    assert (ours.demanded, ours.aim, ours.met) == (0.75, 0.6, True)
    assert ours.measured == pytest.approx(0.7)
    assert (against.measured, against.demanded) == (pytest.approx(1.74 / 0.7), None)
    assert figures_of(rows, "Another GPU")[0].demanded is None
    assert figures_of(rows, None)[0].demanded is None


def test_attention_must_be_as_fast_as_the_fastest_beside_it():
    shape = (8, 4096, 12, 12, 128, 2048)
    rows = [row("milonga", 1.0, "triton", op="attention", shape=shape)]
    rows += [row(name, 1, ratio=ratio, op="attention", shape=shape) for name, ratio in (("flex", 0.9), ("sdpa", 3.0))]
    against = figures_of(rows, "NVIDIA H100")[1]
    assert against.what.endswith("against flex")
    assert (against.measured, against.demanded, against.met) == (0.9, 1.0, False)


def test_demands_are_of_shapes_that_are_measured():
    for op, shape, _ in OP_MILLISECONDS:
        assert shape in OPS[op].on_gpu


def test_a_failed_row_has_no_numbers():
    failed = OpRow("scan", {"B": 1}, "fp32", False, "x", None, Failure("out of memory"), None, None, (Work(1),), None)
    told = failed.to_json()
    assert told["failed"] == "out of memory"
    assert (told["ms"], told["fraction"], told["floor_ms"]) == (None, None, None)
