"""What `generate --drafter` makes: the same text whether the networks run captured or plainly."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from milonga.cli import main, speculation
from milonga.cli.speculation import NGRAM, decoder_of, speculation_facts, speculation_line, speculation_of
from milonga.errors import UserError
from milonga.inference import Sampling, load
from milonga.inference.captured import CapturedRunner
from milonga.inference.draft_length import AdaptiveDraft
from milonga.models.pretrained import save_weights
from tests.inference.helpers import GROWING, SAMBA, opinionated

from .processes import milonga_on_a_terminal

TIMED = ("draft_seconds", "verify_seconds", "plain_step_seconds", "predicted_speedup")


@pytest.mark.parametrize("rule", ["greedy", "exact"])
@pytest.mark.parametrize(("kind", "draft"), [("model", "4"), (NGRAM, "4"), (NGRAM, "adaptive")])
def test_captured_and_plain_write_the_same(kind, draft, rule, tmp_path, monkeypatch):
    for name, seed in (("verifier", 0), ("drafter", 1)):
        save_weights(opinionated(GROWING, seed=seed).network, tmp_path / f"{name}.safetensors")
    lm = load(tmp_path / "verifier.safetensors", device="cpu")
    asked = speculation_of(NGRAM if kind == NGRAM else str(tmp_path / "drafter.safetensors"), rule, draft)
    assert asked is not None
    texts, made = [], []
    for captured in (False, True):
        if captured:  # as on a GPU
            monkeypatch.setattr(
                speculation, "runner_for", lambda network: made.append(CapturedRunner(network)) or made[-1]
            )
        session = lm.session()
        session.feed(b"It was the best of times, " * 3)
        texts.append(b"".join(decoder_of(lm, asked).generate_bytes(session, 20, Sampling(seed=3), context=b"times, ")))
    assert texts[0] == texts[1] and len(texts[0]) == 20
    assert [runner.network is lm.network for runner in made] == ([True] if kind == NGRAM else [False, True])


def test_an_adaptive_draft_is_asked_for_by_name(tmp_path, capsys):
    """It follows the text, and the JSON says what it went by."""
    save_weights(opinionated(GROWING).network, path := tmp_path / "model.safetensors")
    options = ["--prompt", "once", "--bytes", "60", "--device", "cpu", "--json", "--drafter", str(path)]
    told = {}
    for draft in ("4", "adaptive", "adaptive"):
        assert main.run(["generate", str(path), *options, "--rule", "greedy", "--draft", draft]) == 0
        facts = json.loads(capsys.readouterr().out)
        told.setdefault(draft, []).append((facts["text"], facts["speculation"]))
        timed = {name: facts["speculation"].pop(name) for name in TIMED}
        assert all(seconds > 0 for seconds in timed.values())
        price = (timed["draft_seconds"] + timed["verify_seconds"]) / facts["speculation"]["verifications"]
        gain = facts["speculation"]["bytes_per_verification"] * timed["plain_step_seconds"] / price
        assert timed["predicted_speedup"] == pytest.approx(gain)
    (text, fixed), (first, adaptive), (second, again) = [*told["4"], *told["adaptive"]]
    assert text == first == second and adaptive == again
    assert fixed["draft"] == 4
    assert adaptive["draft"] == {"adaptive": {"round": 2.0, "token": 0.2, "longest": 8}}
    assert adaptive["bytes_per_verification"] > fixed["bytes_per_verification"]  # all stand: longer ones pay


@pytest.mark.parametrize("draft", ["0", "-1", "many", "8.5", "", "Adaptive", "9" * 5000])
def test_a_draft_that_is_no_length_is_said_in_a_line(draft, capsys):
    with pytest.raises(UserError, match="--draft: must be a number of bytes, 1 or more, or adaptive, got"):
        speculation_of(NGRAM, None, draft)
    assert main.run(["generate", "nowhere", "--drafter", NGRAM, f"--draft={draft}"]) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err.count("\n") == 1


def test_the_help_says_the_prices_of_an_adaptive_draft():
    shown = CliRunner().invoke(main.app, ["generate", "--help"], env={"COLUMNS": "200"}, terminal_width=200).output
    words = " ".join(shown.replace("│", " ").split())
    rule = speculation_of(NGRAM, None, "adaptive").draft
    assert rule == AdaptiveDraft()
    assert f"a round costs {rule.round:g} plain steps and each drafted token {rule.token:g} more" in words


@pytest.mark.parametrize(("rule", "lossy"), [("greedy", ""), ("top_k", ", lossy: not the model's own text")])
def test_a_terminal_is_told_what_the_drafts_brought(rule, lossy, tmp_path):
    """And whether the text is the model's own; nothing of it goes to a file."""
    save_weights(opinionated(SAMBA).network, path := tmp_path / "model.safetensors")
    options = ["--prompt", "abc abc abc", "--bytes", "60", "--device", "cpu", "--drafter", str(path), "--rule", rule]
    code, shown = milonga_on_a_terminal("generate", path, *options, folder=tmp_path)
    assert code == 0
    last = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode(errors="replace")).replace("\r\n", "\n").splitlines()[-1]
    pattern = r"\[drafted: 100 % stood, [78]\.\d bytes a verification, about [0-9.e+]+x plain decoding" + lossy + r"\]"
    assert re.fullmatch(pattern if rule == "greedy" else pattern.replace("100", r"\d+").replace("[78]", r"\d"), last)


@pytest.mark.parametrize("n", [0, 1, 20])
def test_what_is_reported_changes_nothing_of_the_session(n):
    """Also behind a text whose settings would leave nothing to write, and where there is nothing to report."""
    lm = opinionated(SAMBA)
    decoder = decoder_of(lm, speculation_of(NGRAM, "exact", None))
    session = lm.session()
    session.feed(b"abc abc abc")
    list(decoder.generate_bytes(session, n, Sampling(seed=3, banned=bytes(range(255)), stop=(b"\xff" * 30,))))
    mark, logits, sampling = session.mark(), session.logits, session.sampling
    facts, line = speculation_facts(decoder, session), speculation_line(decoder, session)
    assert session.mark() is mark and session.sampling == sampling
    np.testing.assert_array_equal(session.logits, logits)
    if n < 2:
        assert np.isnan(facts["predicted_speedup"]) and line == "[drafted: nothing]"
    else:
        assert facts["predicted_speedup"] > 0 and "stood" in line


def test_a_draft_follows_from_what_the_loaded_session_remembers(tmp_path, capsys):
    """A text that goes on after a state file is drafted as if it had never been saved."""
    save_weights(opinionated(SAMBA).network, path := tmp_path / "model.safetensors")
    lm, text = load(path, device="cpu"), b"the cat sat on the mat. " * 8
    session = lm.session()
    session.feed(text)
    session.save(tmp_path / "kept.state")
    drafted = []
    options = ["--bytes", "10", "--device", "cpu", "--json", "--drafter", NGRAM, "--draft", "8", "--begin", "t"]
    for more in (["--load", str(tmp_path / "kept.state")], ["--prompt", text.decode()], ["--prompt", "unseen"]):
        assert main.run(["generate", str(path), *options, *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        drafted.append((facts["text"], facts["speculation"]["drafted"], facts["speculation"]["accepted"]))
    assert drafted[0] == drafted[1] and drafted[0][1] >= 8
    assert drafted[2][1] == 0
