"""What `generate --drafter` makes: the same text whether the networks run captured or plainly."""

import json

import pytest
from typer.testing import CliRunner

from milonga.cli import main, speculation
from milonga.cli.speculation import NGRAM, decoder_of, speculation_of
from milonga.errors import UserError
from milonga.inference import Sampling, load
from milonga.inference.captured import CapturedRunner
from milonga.inference.draft_length import AdaptiveDraft
from milonga.models.pretrained import save_weights
from tests.inference.helpers import GROWING, opinionated


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
