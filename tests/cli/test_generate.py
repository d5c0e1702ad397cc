"""`milonga generate`: the text alone on stdout, as it is written."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from milonga.cli import console, main
from milonga.cli import generate as generate_module
from milonga.cli.generate import run_generate
from milonga.cli.sampling_options import sampling_of
from milonga.cli.speculation import speculation_of
from milonga.errors import UserError
from milonga.inference import Sampling, load
from milonga.models.pretrained import save_weights
from tests.inference.helpers import opinionated, opinionated_subwords

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


def generate(model, prompt="once", count=30, sampling=None, json_=False, **others):
    return run_generate(model, prompt, count, sampling or Sampling(temperature=0.8), "cpu", json_, **others)


class _Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


def test_stdout_holds_the_continuation_and_nothing_else(model, capsys):
    assert generate(model, sampling=Sampling(temperature=0.8, seed=3)) == 0
    done = capsys.readouterr()
    assert done.out == expected(model, b"once", 30, temperature=0.8, seed=3)
    assert done.err == ""


def test_settings_reach_the_sampler(model, capsys):
    generate(model, sampling=Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=1))
    assert capsys.readouterr().out == expected(model, b"once", 30, temperature=0.5, top_k=4, top_p=0.9, seed=1)


def test_every_option_reaches_the_sampler(model, capsys):
    options = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "4"]
    options += ["--repetition-penalty", "1.3", "--repetition-window", "9", "--stop", r"\xe9", "--stop", "zz"]
    options += ["--ban", r"\x00~", "--begin", "And ", "--valid-utf8"]
    code = main.run(["generate", model, "--prompt", "once", "--bytes", "60", "--device", "cpu", *options])
    settings = Sampling(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.3,
        repetition_window=9,
        stop=(b"\xe9", b"zz"),
        banned=b"\x00~",
        forced=b"And ",
        valid_utf8=True,
        seed=4,
    )
    session = load(model, device="cpu").session()
    session.feed(b"once")
    assert code == 0
    assert capsys.readouterr().out == "".join(session.generate(60, settings)) != ""


def test_a_saved_state_is_gone_on_from(model, capsys, tmp_path):
    generate(model, count=50)
    whole = capsys.readouterr().out
    generate(model, count=20, save=str(tmp_path / "a.state"))
    assert whole.startswith(capsys.readouterr().out)
    generate(model, prompt="", count=30, state=str(tmp_path / "a.state"), json_=True)
    facts = json.loads(capsys.readouterr().out)
    assert whole.endswith(facts["text"])
    assert (facts["prompt_bytes"], facts["position_bytes"], facts["bytes"]) == (0, 54, 30)


def test_json_says_how_it_ended(model, capsys):
    generate(model, sampling=Sampling(forced=b"one two. "), count=20, json_=True)
    assert json.loads(capsys.readouterr().out)["stop_reason"] == "length"
    generate(model, sampling=Sampling(forced=b"one two. ", stop=(b". ",)), count=20, json_=True, logprobs=2)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["text"], facts["stop_reason"], facts["stop"], facts["bytes"]) == ("one two", "stop", ". ", 9)
    assert bytes(entry["token"][0] for entry in facts["log2_probabilities"]) == b"one two. "
    assert all(len(entry["alternatives"]) == 2 and entry["log2"] <= 0 for entry in facts["log2_probabilities"])
    with pytest.raises(UserError, match="--json"):
        generate(model, logprobs=2)


def test_a_model_of_subwords_writes_about_as_many_bytes(capsys, monkeypatch):
    lm = opinionated_subwords()
    monkeypatch.setattr(generate_module, "load", lambda run, **_: lm)
    sampling = Sampling(forced=b" the mat the cat the" + b"aSTa", stop=(b"STOP",))
    generate("any", prompt="the cat", count=23, json_=True, sampling=sampling)
    facts = json.loads(capsys.readouterr().out)
    longest = max(len(token) for token in lm.codec.token_bytes)
    assert 23 <= facts["bytes"] < 23 + longest
    assert facts["tokens"] < facts["bytes"] == len(facts["text"]), "what could have become a stop comes out at the end"
    assert (facts["stop_reason"], facts["prompt_bytes"]) == ("length", 7)


def test_kernels_are_loaded_before_the_text_is_timed(model, monkeypatch, capsys):
    """The first step of a process loads what it calls, which takes longer than many steps."""
    lm, read = load(model, device="cpu"), []
    lm.network.register_forward_pre_hook(lambda network, arguments: read.append(arguments[0][0].tolist()))
    monkeypatch.setattr(generate_module, "load", lambda run, **_: lm)
    generate(model, count=3, json_=True)
    before = read.index(list(b"once"))
    assert before > 0 and all(len(tokens) == 1 for tokens in read[:before])
    assert len(read) == before + 1 + json.loads(capsys.readouterr().out)["tokens"]
    assert lm.session().position == 0


def test_weights_and_dtype_are_those_of_load(model, capsys, tmp_path):
    for options, how in (
        (["--weights", "int8"], {"weights": "int8"}),
        (["--weights", "bf16"], {"weights": "bf16"}),
        (["--dtype", "float64"], {"dtype": "float64"}),
    ):
        lm = load(model, device="cpu", **how)
        session = lm.session()
        session.feed(b"once")
        saved = str(tmp_path / "a.state")
        code = main.run(
            ["generate", model, "--prompt", "once", "--bytes", "60", "--device", "cpu", *options, "--save", saved]
        )
        assert code == 0
        assert capsys.readouterr().out == "".join(session.generate(60, temperature=0.8))
        assert np.array_equal(lm.session(saved).logits, session.logits)
        plain = load(model, device="cpu").session()
        plain.feed(b"once")
        "".join(plain.generate(60, temperature=0.8))
        assert not np.array_equal(plain.logits, session.logits)
    for options, words in (
        (["--weights", "int4"], "--weights: must be one of bf16, int8, got 'int4'"),
        (["--dtype", "fp8"], "dtype 'fp8' cannot be used"),
    ):
        assert main.run(["generate", model, "--device", "cpu", *options]) == 2
        assert words in capsys.readouterr().err


def test_a_long_prompt_shows_how_far_it_is(model, capsys, monkeypatch):
    monkeypatch.setattr(console, "AFTER", 0.1)
    monkeypatch.setattr(sys, "stdin", _Stdin(b"once " * 40_000))
    generate(model, prompt="-", json_=True)
    done = capsys.readouterr()
    assert json.loads(done.out)["prompt_bytes"] == 200_000
    assert "reading: 200,000 bytes" in done.err


def test_a_short_prompt_and_text_show_no_progress(model, capsys):
    generate(model, json_=True)
    assert capsys.readouterr().err == ""


def test_a_long_text_in_json_shows_how_far_it_is(model, capsys, monkeypatch):
    monkeypatch.setattr(console, "AFTER", 0.02)
    generate(model, count=150, json_=True)
    done = capsys.readouterr()
    assert json.loads(done.out)["bytes"] == 150
    assert re.search(r"^writing: (\d|\d\d|1[0-4]\d)/150 bytes$", done.err, re.MULTILINE)  # at once, not 10 s later
    assert done.err.endswith("writing: 150/150 bytes\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-folder/a.state", "no-such-folder/a.state: No such file or directory"),
        (".", "that is a folder"),
        ("folder", "folder: Is a directory"),
        ("a\0b", "zero byte"),
    ],
)
def test_a_place_that_cannot_be_saved_to_is_told_before_it_writes(model, capsys, monkeypatch, tmp_path, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=words):
        generate(model, save=name)
    assert capsys.readouterr().out == ""


def test_settings_are_named_as_the_options_are():
    with pytest.raises(UserError, match="--stop: is empty"):
        sampling_of(1.0, None, None, None, 1.0, 64, [""], "", "", False, 0)
    with pytest.raises(UserError, match="--begin: holds b'z', which --ban forbids"):
        sampling_of(1.0, None, None, None, 1.0, 64, [], "az", "zoo", False, 0)


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
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    written, dim, standing = shown.decode().replace("\r\n", "\n").rpartition("\x1b[2m")
    assert written == kept + "\n"
    assert dim and re.match(r"\[204 bytes, [0-9,.]+ bytes/s, state [0-9.]+ [KMG]iB\]", standing)


def test_what_is_interrupted_is_saved(model, tmp_path):
    """All that was shown, and nothing else, is what the saved session has read."""
    path = tmp_path / "kept.state"
    command = [str(Path(sys.executable).parent / "milonga"), "generate", model, "--prompt", "once", "--bytes", "999999"]
    with subprocess.Popen([*command, "--save", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        shown = process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        shown += process.stdout.read()
        assert process.wait(timeout=60) == 130
    session = load(model, device="cpu").session(path)
    text = expected(model, b"once", session.position - 4, temperature=0.8)
    assert text.startswith(shown.decode()) and len(text.encode()) - len(shown) < 8


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


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    lm = opinionated_subwords()
    path = tmp_path_factory.mktemp("subwords") / "model.safetensors"
    save_weights(lm.network, path, {"codec": lm.codec.name, "tokenizer": lm.codec.digest})
    lm.codec.save(path.with_name("tokenizer.json"))
    return str(path)


def test_speculation_writes_what_plain_decoding_writes(model, subwords, capsys):
    for drafter in ("ngram", model, subwords):
        options = ["--prompt", "once", "--bytes", "30", "--device", "cpu", "--json"]
        options += ["--drafter", drafter, "--rule", "greedy", "--draft", "5"]
        assert main.run(["generate", model, *options]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["text"] == expected(model, b"once", 30, temperature=0)
        told = facts["speculation"]
        assert (told["rule"], told["lossless"], told["draft"]) == ("greedy", True, 5)
        assert 0 <= told["accepted"] <= told["drafted"] and told["verifications"] <= 29
        assert told["bytes_per_verification"] == pytest.approx(29 / told["verifications"])
        if drafter == model:
            assert told["acceptance"] == 1
    assert generate(model, speculation=speculation_of("ngram", None, None)) == 0
    assert len(capsys.readouterr().out.encode("utf-8", "replace")) > 0


def test_what_cannot_be_speculated_is_said(model, subwords):
    with pytest.raises(UserError, match="name a run that drafts with --drafter"):
        speculation_of(None, "exact", None)
    with pytest.raises(UserError, match="--rule: must be one of exact, greedy, top_k, got 'fast'"):
        speculation_of("ngram", "fast", None)
    with pytest.raises(UserError, match="has to be a model of bytes"):
        generate(subwords, speculation=speculation_of("ngram", None, None))
    with pytest.raises(UserError, match="not known of drafted bytes"):
        generate(model, json_=True, logprobs=0, speculation=speculation_of("ngram", None, None))
