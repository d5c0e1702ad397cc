"""The benchmark of long texts: a tiny one, and whether it would see what it looks for."""

import argparse
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from milonga.errors import UserError
from milonga.models.pretrained import save_weights
from milonga.ops.selective_scan import selective_scan_reference
from tests.inference.helpers import opinionated

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = ["--fed", "4000", "--first", "2000", "--drift", "2000", "--generated", "40"]


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    return soak


def test_a_short_soak(tmp_path):
    words = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    (tmp_path / "text.txt").write_text("".join(f"{number}. {words}" for number in range(40)))
    save_weights(opinionated().network, tmp_path / "samba.safetensors")
    command = [sys.executable, BENCHMARKS / "soak.py", "samba.safetensors", "--text", "text.txt"]
    command += [*SIZES, "--out", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    figures = {figure["what"]: figure["measured"] for figure in json.loads(done.stdout)}
    assert figures["float64 run against the definition, 2000 bytes"] < 1e-12
    assert 1e-9 < figures["recurrent state, worst layer, 1,000 to 2,000 bytes"] < 1e-5
    curves = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert curves["marks"] == [1000, 2000]
    assert {name.split(".")[1] for name in curves["drift"]} == {"ssm", "conv", "k", "v"}
    assert curves["memory"][0][0] == 2000 and curves["memory"][-1][0] == 4040
    assert "<svg" in (tmp_path / "out" / "soak-drift.svg").read_text()
    assert "<svg" in (tmp_path / "out" / "soak-memory.svg").read_text()


@pytest.mark.parametrize(("fed", "first", "drifted"), [(1500, 10, 2000), (3000, 3500, 2000), (3000, 10, 1000)])
def test_sizes_that_do_not_fit_are_refused(soak, fed, first, drifted):
    sizes = argparse.Namespace(fed=fed, first=first, drift=drifted)
    with pytest.raises(UserError, match="--fed no less than --drift and --first"):
        soak.measure(sizes)


def test_the_compiled_scan_is_the_definition_in_pieces_too(soak):
    time, width, states = 150, 6, 4
    make = torch.Generator().manual_seed(1)
    x, dt, z = (torch.randn(1, time, width, generator=make, dtype=torch.float64) for _ in range(3))
    B, C = (torch.randn(1, time, states, generator=make, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(width, states, generator=make, dtype=torch.float64)
    D, bias = (torch.randn(width, generator=make, dtype=torch.float64) for _ in range(2))
    initial = torch.randn(1, width, states, generator=make, dtype=torch.float64)
    y, final = selective_scan_reference(x, dt, A, B, C, D, z, bias, initial)
    scan, state, outputs, kept = soak.ExactScan(1), initial, [], initial.clone()
    for part in (slice(0, 1), slice(1, 70), slice(70, 150)):
        piece, state = scan(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], D=D, z=z[:, part], dt_bias=bias, initial=state
        )
        outputs.append(piece)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-13)
    assert torch.equal(initial, kept)
    rate = (torch.nn.functional.softplus(dt + bias).mean(1)[0][:, None] * -A).min()
    assert scan.slowest_half_life() == pytest.approx(np.log(2) / float(rate))


@pytest.mark.parametrize(("power", "seen"), [(0.0, False), (0.5, True), (1.0, True)])
def test_a_drift_is_told_from_noise(soak, tmp_path, power, seen):
    random = np.random.default_rng(0)
    marks = soak.marks_until(100_000)
    assert marks == [1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]
    for mark, position in [(m, p) for m in marks for p in soak.places([m])]:
        exact = random.standard_normal((8, 4))
        error = 1e-7 * (mark / 1000) ** power * random.standard_normal((8, 4))
        np.savez(soak.stored_state(tmp_path, "exact", position), **{"0.ssm": exact})
        np.savez(soak.stored_state(tmp_path, "session", position), **{"0.ssm": exact + error})
    errors = soak.drift(marks, tmp_path)["0.ssm"]
    assert errors[0] == pytest.approx(1e-7, rel=0.2)
    factor = soak.factor_per_decade(marks, errors)
    assert factor == pytest.approx(10**power, rel=0.1)
    assert (factor > soak.TREND) == seen


def test_memory_that_is_kept_is_seen(soak):
    memory = soak.Memory(10)
    memory.look(9)
    memory.look(10)
    size = 16 << 20
    kept = mmap.mmap(-1, size)  # pages of its own: the heap may have some left from other tests
    np.frombuffer(kept, dtype=np.uint8)[:] = 1
    memory.look(20)
    assert len(memory.looks) == 2
    assert memory.growth() >= 0.99 * size
