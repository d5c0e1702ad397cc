"""`milonga bench` in real processes, on small shapes."""

import json
import re

import pytest

from . import processes

OPS = ["bench", "ops", "--op", "scan,norm", "--shape", "1,9,32"]
TRAIN = ["bench", "train", "--batch", "1", "--length", "16", "--seconds", "0"]
PREFILL = ["bench", "prefill", "--model", "samba,transformer", "--lengths", "8,32", "--total", "32"]
DECODE = ["bench", "decode", "--model", "samba,transformer", "--lengths", "4,8", "--batch", "2", "--steps", "2"]
KEYS = {"bench", "command", "date", "machine", "settings", "ceilings", "rows", "figures", "notes"}


@pytest.fixture(scope="module")
def server():
    made = processes.Server()
    yield made
    made.close()


def test_ops_as_a_table(server, tmp_path):
    done = server.run(*OPS, folder=tmp_path)
    assert done.code == 0, done.err
    assert re.search(
        r"norm B1 T9 D32 +│ both +│ milonga \(cpu\) +│ +[\d.e+]+ +│ +\d+% +│ +[\d.e-]+ \w+ +│ +\d+%", done.out
    )
    assert "mambapy" in done.out
    assert "x ours" in done.out
    assert "measuring: 4/4 measurements" in done.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.out + done.err)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_written_where_it_is_asked_for(server, tmp_path):
    wanted = ["--out", "made/bench", "--plot", "ops.png", "--json", "ops.json"]
    done = server.run(*OPS, "--no-peers", *wanted, folder=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "ops.json").read_text())
    assert set(facts) == KEYS
    assert facts == json.loads((tmp_path / "made" / "bench" / "bench.json").read_text())
    assert facts["command"] == " ".join(["milonga", *OPS, "--no-peers", *wanted])
    assert facts["machine"]["packages"]["torch"]
    assert {row["who"] for row in facts["rows"]} == {"milonga"}
    assert {"what", "measured", "demanded", "unit", "at_least", "aim", "met"} == set(facts["figures"][0])
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "made" / "bench" / "bench.html").read_text()
    assert "<svg" in page
    assert "scan B1 T9 E32 N16" in page


@pytest.mark.parametrize("arguments", [TRAIN, PREFILL, DECODE], ids=lambda words: words[1])
def test_json_goes_to_stdout_alone(server, tmp_path, arguments):
    done = server.run(*arguments, "--json", "-", "--plot", "plot.svg", folder=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert set(facts) == KEYS
    assert facts["bench"] == arguments[1]
    assert len(facts["rows"]) == {"train": 1, "prefill": 4, "decode": 6}[arguments[1]]
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_recipe_is_measured_with_its_own_batch(server, tmp_path):
    done = server.run("bench", "train", "--recipe", "demo", *TRAIN[2:4], *TRAIN[6:], "--json", "-", folder=tmp_path)
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["rows"]
    assert (row["model"], row["batch"], row["length"], row["precision"]) == ("demo", 1, 512, "fp32")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ops", "--op", "scam"], "--op: no op 'scam'; choose from scan, conv"),
        (["ops", "--op", "scan", "--shape", "1,2"], "--shape: scan takes B,T,E[,N], got 1,2"),
        (["ops", "--op", "scan", "--shape", "one"], "--shape: expected whole numbers"),
        (["ops", "--op", "scan", "--shape", "9999999999999,2,3"], "--shape: expected whole numbers"),
        (["ops", "--op", "conv", "--shape", "1,8,8,9"], "--shape: W of conv must be at most 8, got 9"),
        (
            ["ops", "--op", "attention", "--shape", "1,8,4,3,8"],
            "--shape: G of attention must divide H, got H 4 and G 3",
        ),
        (["ops", "--json", "nowhere/a.json"], "cannot write nowhere/a.json: No such file or directory"),
        (["ops", "--json", "."], "cannot write .: that is a folder; name a file in it"),
        (["ops", "--plot", "nowhere/a.svg"], "cannot write nowhere/a.svg: No such file or directory"),
        (["train", "--length", "1000000000000"], "--length: must be below 1000000000000, got 1000000000000"),
        (["decode", "--batch", "99999999999999999999"], "--batch: must be below 1000000000000"),
        (["prefill", "--lengths", "9999999999999K"], "--lengths: expected lengths such as 4096 or 4K"),
        (["ops", "--dtype", "fp8"], "--dtype: no dtype 'fp8'; choose from bf16, fp16, fp32"),
        (["ops", "--pass", "backward"], "--pass: expected one of forward, both, all"),
        (["ops", "--device", "cuda:63"], "device 'cuda:63' cannot be used here"),
        (["ops", "--plot", "a.jpg"], "--plot: the name must end in .png or .svg"),
        (["train", "--preset", "samba-420m"], "preset 'samba-420m' does not exist"),
        (["train", "--precision", "fp8"], "--precision: expected bf16 or fp32, got 'fp8'"),
        (["train", "--recipe", "nothing"], "no recipe 'nothing'"),
        (["train", "--recipe", "demo", "--preset", "samba-421m"], "not both"),
        (["train", "--batch", "0"], "--batch"),
        (["prefill", "--lengths", "1K,two"], "--lengths: expected lengths such as 4096 or 4K, got 'two'"),
        (["prefill", "--total", "0"], "--total: expected lengths such as 4096 or 4K, got '0'"),
        (["prefill", "--lengths", "64,512", "--total", "256"], "--lengths: a prompt of 512 tokens is longer than all"),
        (["decode", "--model", "gpt"], "the study's models are samba, swa, mamba, transformer"),
        (["first-use", "--what", "everything"], "--what: no part 'everything'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(server, tmp_path, arguments, words):
    done = server.run("bench", *arguments, folder=tmp_path)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("milonga: ")
    assert done.err.count("\n") == 1
    assert words in done.err
