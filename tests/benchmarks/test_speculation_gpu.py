"""The benchmark of speculation that trains its own pair: a tiny one, from texts to figures."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from milonga.errors import UserError
from milonga.models.accounting import parameter_count

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = ["--verifier-size", "16x1", "--drafter-size", "16x1", "--vocabulary", "270", "--batch", "2", "--window", "64"]
SIZES += [
    "--minutes",
    "1",
    "--measure-seconds",
    "57",
    "--evaluate",
    "256",
    "--prompts",
    "2",
    "--bytes",
    "12",
    "--draft",
    "4",
]
WORDS = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
PRICE = "price of a round, in plain steps"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speculation_gpu

    return speculation_gpu


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speculation_models

    return speculation_models


def test_trained_and_measured_in_one_go(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    text = "".join(f"{number}. {WORDS}" for number in range(300))
    with tarfile.open(data / "books-train-0.tar.xz", "w:xz") as archive:
        for number in range(2):
            member = tarfile.TarInfo(f"book{number}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (data / "books-valid.txt").write_text(text[:5000])
    command = [sys.executable, BENCHMARKS / "speculation_gpu.py", "--data", data, "--out", "out", *SIZES]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", "figures.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = {each["what"]: each["measured"] for each in json.loads((tmp_path / "figures.json").read_text())}
    assert 0 < figures["verifier: held-out text"] < 9 and 0 < figures["drafter: held-out text"] < 9
    for name in ("subwords", "n-gram"):
        assert figures[f"greedy, {name}: texts identical to plain, of 2"] == 2
        for rule in ("greedy", "exact"):
            what, plain = f"{rule}, {name}", figures[f"{rule}: plain decoding, 2 prompts, 12 bytes"]
            assert figures[f"{what}: speed-up"] == pytest.approx(figures[f"{what}: speed"] / plain)
            bytes_, price = (figures[f"{what}: {part}"] for part in ("bytes for each verification", PRICE))
            assert 1 <= bytes_ <= 5 and figures[f"{what}: speed-up predicted"] == pytest.approx(bytes_ / price)
            assert f"{what}: acceptance" in done.stdout


def test_texts_are_cut_to_the_size_asked_for(models, tmp_path):
    for number in range(2):
        (tmp_path / f"train-{number}.txt").write_text(WORDS * (1 + 99 * number))
    (tmp_path / "valid.txt").write_text(WORDS * 20)
    texts = dict(models.documents(tmp_path, "train", 1000))
    assert {name: len(text) for name, text in texts.items()} == {"train-0.txt": len(WORDS), "train-1.txt": 500}
    with pytest.raises(UserError, match="no file there has 'test'"):
        list(models.documents(tmp_path, "test", 1000))
    train, valid = models.write_texts(tmp_path, tmp_path / "out", 0.01)
    assert sum(path.stat().st_size for path in train.glob("*.txt")) == 5000 + len(WORDS)
    assert sum(path.stat().st_size for path in valid.glob("*.txt")) == 1000
    assert [len(prompt) for prompt in models.prompts(valid, 4)] == [models.PROMPT] * 4
    with pytest.raises(UserError, match="too few for 900 prompts"):
        models.prompts(valid, 900)


def test_sizes(benchmark, models, tmp_path):
    given = benchmark.arguments().parse_args(["--data", str(tmp_path), "--out", str(tmp_path), "--device", "cpu"])
    config = models.settings("verifier", given.verifier_size, 1.0, given, None)
    assert parameter_count(config.model) >= 100e6
    with pytest.raises(UserError, match="WIDTHxREPEATS"):
        models.settings("verifier", "large", 1.0, given, None)


@pytest.mark.parametrize(("acceptance", "draft", "expected"), [(0.0, 8, 1.0), (1.0, 8, 9.0), (0.5, 2, 1.75)])
def test_bytes_expected_of_a_verification(benchmark, acceptance, draft, expected):
    assert benchmark.expected_bytes(acceptance, draft) == pytest.approx(expected)
