"""The command line as such: lazy imports, help, version, output, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import milonga as package
from milonga.cli import main

from .processes import milonga, milonga_on_a_terminal, script

HEAVY = ("torch", "numba", "numpy", "triton", "matplotlib", "milonga.models")
HELPS = [
    ["--help"],
    [],
    ["train", "--help"],
    ["demo", "--help"],
    ["generate", "--help"],
    ["chat", "--help"],
    ["evaluate", "--help"],
    ["evaluate", "perplexity", "--help"],
    ["tokenizer", "--help"],
    ["tokenizer", "train", "--help"],
    ["tokenizer", "inspect", "--help"],
    ["bench", "--help"],
    *(["bench", name, "--help"] for name in ("ops", "train", "prefill", "decode", "first-use")),
    ["presets", "--help"],
    ["doctor", "--help"],
]
GROUPS = ("evaluate", "tokenizer", "bench")


def python(code, *arguments, folder="."):
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_no_command_loads_what_is_slow():
    code = f"""
import sys
from milonga.cli.main import run
for arguments in {[*HELPS, ["--version"], ["no-such-command"], ["train", "--no-such-option"]]!r}:
    run(arguments)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


def test_import_milonga_is_lazy_and_load_does_not_need_numba():
    assert python(f"import sys, milonga; print([n for n in {HEAVY!r} if n in sys.modules])").strip() == "[]"
    assert python(
        "import sys, milonga; milonga.load; print('numba' in sys.modules, 'torch' in sys.modules)"
    ).split() == [
        "False",
        "True",
    ]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_every_help_shows_how_to_start(arguments, capsys):
    assert main.run(arguments) == 0
    out = capsys.readouterr().out
    assert "Example:\n" in out or "Start with:" in out
    assert re.search(r"^  +(Start with: )?milonga ", out, re.MULTILINE)


@pytest.mark.parametrize("arguments", [h for h in HELPS if len(h) > 1 and h[-2] not in {*GROUPS, "chat"}], ids=" ".join)
def test_every_command_with_figures_gives_json(arguments, capsys):
    main.run(arguments)
    assert "--json" in capsys.readouterr().out


def test_version(tmp_path):
    assert milonga("--version", folder=tmp_path) == (0, f"milonga {package.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["presets"], ["presets", "--json"]], ids=" ".join
)
def test_head_ends_quietly(arguments, tmp_path):
    """The reader takes one line of the output and goes, as `| head -1` does."""
    producer = subprocess.Popen(
        [script(), *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    producer.stdout.read(1)
    producer.stdout.close()
    assert producer.stderr.read() == b""
    assert producer.wait(timeout=60) == 0
    producer.stderr.close()


def test_a_reader_that_is_gone_from_the_start(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([script(), "--help"], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_presets_as_a_table_and_as_json(tmp_path):
    table = milonga("presets", folder=tmp_path, environment={"FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"})
    assert (table.code, table.err) == (0, "")
    assert "samba-421m" in table.out
    assert "421.8M" in table.out
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", table.out), "control characters off a terminal"
    every = json.loads(milonga("presets", "--json", folder=tmp_path).out)
    (samba,) = (fact for fact in every if fact["name"] == "samba-1.7b")
    assert round(samba["parameters"], -6) == 1_742_000_000
    assert samba["state_bytes"] == samba["state_bytes_at_1m"]
    (llama,) = (fact for fact in every if fact["name"] == "llama-3-1.6b")
    assert llama["state_bytes_at_1m"] > 2**34 > 1000 > llama["state_bytes"]


def test_on_a_terminal_tables_are_styled(tmp_path):
    code, shown = milonga_on_a_terminal("presets", folder=tmp_path)
    assert code == 0
    assert b"\x1b[" in shown
    assert b"samba-421m" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? (see milonga --help)"),
        (["train"], "give a RECIPE to train, or --resume RUN"),
        (["train", "demo", "--resume", "runs/x"], "not both"),
        (["train", "demo", "--sett", "a=1"], "No such option: --sett"),
        (["generate"], "Missing argument 'RUN'"),
        (["generate", "x", "--bytes", "many"], "'--bytes'"),
        (["generate", "x", "--bytes", "-1"], "'--bytes'"),
        (["generate", "x", "--temperature", "-1"], "'--temperature'"),
        (["generate", "x", "--top-k", "0"], "'--top-k'"),
        (["evaluate"], "Missing command"),
        (["evaluate", "perplexity", "x"], "Missing argument 'FILES"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line_and_say_where_to_look(arguments, words, capsys):
    assert main.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("milonga: ")
    assert err.count("\n") == 1
    assert words in err
    assert "--help)" in err


def _raising(error, monkeypatch):
    def command(json_):
        raise error

    from milonga.cli import presets

    monkeypatch.setattr(presets, "run_presets", command)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    _raising(ValueError("a fault"), monkeypatch)
    with pytest.raises(ValueError, match="a fault"):
        main.run(["presets"])


def test_ctrl_c_is_130(monkeypatch, capsys):
    _raising(KeyboardInterrupt(), monkeypatch)
    assert main.run(["presets"]) == 130
    assert capsys.readouterr().err == "milonga: interrupted\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "runs/x/metrics.jsonl"), "runs/x/metrics.jsonl: the disk is full"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: no permission"),
        (package.UserError("first\nsecond"), "milonga: first second"),
    ],
)
def test_what_the_user_can_mend_is_a_line(error, words, monkeypatch, capsys):
    _raising(error, monkeypatch)
    assert main.run(["presets"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_doctor_fails_if_an_op_is_wrong(monkeypatch, capsys):
    from milonga.cli import doctor, selftest

    case = next(case for case in selftest.cases() if case.op == "swiglu")

    def off_by_a_little(tensors, backend):
        (y,) = case.run(tensors, backend)
        return [y if tensors[0].dtype == doctor.torch.float64 else y * 1.0001]

    wrong = selftest.Case(case.op, case.bound, case.inputs, off_by_a_little)
    monkeypatch.setattr(doctor, "cases", lambda: [case, wrong])
    assert main.run(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [test["passed"] for test in facts["self_test"]] == [True, False]
    assert facts["self_test"][1]["forward_error"] == pytest.approx(1e-4, rel=0.01)
    assert facts["passed"] is False


def test_doctor(tmp_path):
    done = milonga("doctor", "--json", folder=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["passed"] is True
    assert facts["packages"]["torch"]
    assert {test["op"] for test in facts["self_test"]} == set(facts["backends"])
    for test in facts["self_test"]:
        assert 0 < test["forward_error"] <= test["bound"] <= 1e-5
        assert 0 < test["gradient_error"] <= test["bound"]
    assert facts["backends"]["selective_scan"]["cpu float32"] == "cpu"
    assert list(Path(tmp_path).iterdir()) == []
