"""`milonga generate`: the text alone on stdout, as it is written."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from milonga.cli.generate import run_generate
from milonga.errors import UserError
from milonga.inference import load
from milonga.models.pretrained import save_weights
from tests.inference.helpers import opinionated

from .processes import milonga_on_a_terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(opinionated().network, path)
    return str(path)


def expected(model, prompt, count, **settings):
    session = load(model, device="cpu").session()
    session.feed(prompt)
    return "".join(session.generate(count, **settings))


def generate(model, prompt="once", count=30, temperature=0.8, top_k=None, top_p=None, seed=0, json_=False):
    return run_generate(model, prompt, count, temperature, top_k, top_p, seed, "cpu", json_)


class _Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_stdout_holds_the_continuation_and_nothing_else(model, capsys):
    assert generate(model, seed=3) == 0
    done = capsys.readouterr()
    assert done.out == expected(model, b"once", 30, temperature=0.8, seed=3)
    assert done.err == ""


def test_settings_reach_the_sampler(model, capsys):
    generate(model, temperature=0.5, top_k=4, top_p=0.9, seed=1)
    assert capsys.readouterr().out == expected(model, b"once", 30, temperature=0.5, top_k=4, top_p=0.9, seed=1)


def test_json_is_one_document(model, capsys):
    generate(model, json_=True)
    value = json.loads(capsys.readouterr().out)
    assert value["text"] == expected(model, b"once", 30, temperature=0.8)
    assert (value["bytes"], value["prompt_bytes"], value["seed"]) == (30, 4, 0)


def test_a_prompt_on_stdin_may_be_any_bytes(model, capsys, monkeypatch):
    raw = b"\xff\x00 once" * 20000
    monkeypatch.setattr(sys, "stdin", _Stdin(raw))
    generate(model, prompt="-", json_=True)
    assert json.loads(capsys.readouterr().out)["prompt_bytes"] == len(raw)


def test_a_terminal_gets_no_control_characters(model, tmp_path):
    """The model's text is any bytes; a file or a pipe gets them as they are."""
    text = expected(model, b"once", 200, temperature=3.0)
    assert re.search(r"[\x00-\x08\x0e-\x1f]", text), "otherwise this shows nothing"
    settings = ["--prompt", "once", "--bytes", "200", "--temperature", "3"]
    code, shown = milonga_on_a_terminal("generate", model, *settings, folder=tmp_path)
    assert code == 0
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", shown.decode())
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    assert shown.decode().replace("\r\n", "\n") == kept + "\n"


def test_without_a_prompt_the_text_begins_after_a_line_break(model, capsys):
    generate(model, prompt="")
    assert capsys.readouterr().out == expected(model, b"\n", 30, temperature=0.8)


def test_a_prompt_that_is_not_utf8_is_an_error(model):
    with pytest.raises(UserError, match=r"--prompt: character 3 .*--prompt -"):
        generate(model, prompt=b"ab\xffcd".decode("utf-8", "surrogateescape"))


def test_a_reader_that_goes_ends_it_quietly(model):
    command = [str(Path(sys.executable).parent / "milonga"), "generate", model, "--bytes", "100000", "--prompt", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
