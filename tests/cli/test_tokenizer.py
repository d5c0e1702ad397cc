"""`milonga tokenizer` in real processes, and what a run of subwords is to the other commands."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer

from milonga.data.bpe import load_tokenizer
from tests.training import runs

from .conftest import tiny_settings


@pytest.fixture(scope="module")
def made(server, tmp_path_factory):
    """A folder with texts, a tokenizer of them and a run of subwords."""
    folder = tmp_path_factory.mktemp("tokenizer")
    runs.write_texts(folder / "texts")
    done = server.run(
        "tokenizer", "train", "--data", "texts", "--vocab-size", "300", "--out", "mine.json", folder=folder
    )
    assert done.code == 0, done.err
    (folder / "shown.txt").write_text(done.out)
    recipe = ["subword-samba-small", "--data", "texts", "--out", "run", "--set", "data.tokenizer=mine.json"]
    done = server.run("train", *recipe, *tiny_settings(), folder=folder)
    assert done.code == 0, done.err
    return folder


def test_train_writes_a_tokenizer_and_says_what_it_does(made):
    shown = (made / "shown.txt").read_text()
    assert re.search(r"vocabulary .*300 tokens", shown)
    assert re.search(r"held-out text .* bytes of \d\.txt", shown)
    assert re.search(r"bytes per token there .*[1-4]\.\d{3}", shown)
    assert Tokenizer.from_file(str(made / "mine.json")).get_vocab_size() == 300
    assert not [path.name for path in made.iterdir() if path.name.startswith(".")]


def test_figures_as_json_and_a_text_to_measure(server, made, tmp_path):
    text = "the cat looked at the moon\n" * 30
    (tmp_path / "other.txt").write_text(text)
    options = ["--data", str(made / "texts"), "--heldout", "other.txt", "--vocab-size", "280", "--json"]
    done = server.run("tokenizer", "train", *options, "--out", "new/a.json", folder=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    codec = load_tokenizer(tmp_path / "new" / "a.json")
    assert (facts["vocab_size"], facts["digest"]) == (280, codec.digest)
    assert facts["heldout"]["bytes"] == len(text)
    assert facts["heldout"]["tokens"] == len(codec.encode(text))
    assert facts["train_bytes"] == sum(path.stat().st_size for path in (made / "texts").iterdir())
    again = server.run("tokenizer", "train", *options, "--out", "b.json", folder=tmp_path)
    assert json.loads(again.out)["digest"] == codec.digest


def test_of_a_single_document_the_end_is_measured(server, made, tmp_path):
    options = ["--data", str(made / "texts" / "0.txt"), "--vocab-size", "270", "--json", "--out", "a.json"]
    done = server.run("tokenizer", "train", *options, folder=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["train_bytes"] + facts["heldout"]["bytes"] == (made / "texts" / "0.txt").stat().st_size


def test_inspect_shows_how_a_text_is_cut(server, made):
    done = server.run("tokenizer", "inspect", "mine.json", "--text", "the cat\x1b", "--json", folder=made)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    codec = load_tokenizer(made / "mine.json")
    assert [token for token, _ in facts["tokens"]] == codec.encode("the cat\x1b").tolist()
    assert facts["tokens"][-1] == [27, "\\x1b"]
    assert sum(facts["lengths"].values()) == 300
    done = server.run("tokenizer", "inspect", "mine.json", "--text", "the cat\x1b", folder=made)
    assert "\x1b" not in done.out
    assert codec.digest in done.out.replace("\n", "")


def test_a_run_of_subwords_is_scored_and_goes_on(server, made, tmp_path):
    shutil.copytree(made, tmp_path / "here")
    folder = tmp_path / "here"
    done = server.run("evaluate", "perplexity", "run", "texts/0.txt", "--json", folder=folder)
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    assert scores["bytes"] == (folder / "texts" / "0.txt").stat().st_size
    assert 1 < scores["bits_per_byte"] < 8
    done = server.run("train", "--resume", "run", "--set", "training.steps=5", folder=folder)
    assert done.code == 0, done.err
    done = server.run("generate", "run", "--prompt", "the cat", "--bytes", "20", folder=folder)
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "texts", "--out", "mine.json"], "mine.json: exists already"),
        (["train", "--data", "texts", "--out", "x.json", "--vocab-size", "256"], "must have 257 to"),
        (["train", "--data", "nowhere", "--out", "x.json", "--vocab-size", "10"], "must have 257 to"),
        (["train", "--data", "texts", "--out", "x.json", "--vocab-size", "9999"], "ask for fewer, or give more text"),
        (["train", "--data", "nowhere", "--out", "x.json"], "nowhere does not exist"),
        (["train", "--data", "texts"], "Missing option '--out'"),
        (["train", "--out", "x.json"], "Missing option '--data'"),
        (["inspect", "nowhere.json"], "cannot read nowhere.json"),
        (["inspect", "texts/0.txt"], "damaged or no tokenizer.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(server, made, arguments, words):
    done = server.run("tokenizer", *arguments, folder=made)
    assert done.code == 2
    assert words in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not (made / "x.json").exists()
