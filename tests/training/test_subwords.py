"""Runs of subwords: the tokenizer stays with them, and every figure is in bits per byte."""

import math
import shutil
from itertools import pairwise

import pytest
import torch

import milonga
from milonga.data.bpe import TOKENIZER, load_tokenizer
from milonga.data.bpe_training import train_bpe
from milonga.errors import UserError
from milonga.evaluation import evaluate_perplexity
from milonga.files import FolderLock
from milonga.training import RunConfig, list_checkpoints, read_metrics, train
from milonga.training.start import open_run

from . import runs


def tokenizer(folder, vocab_size=300):
    """A tokenizer of the texts in `folder`, as a file beside it."""
    codec = train_bpe(([path.read_bytes()] for path in sorted(folder.glob("*.txt"))), vocab_size)
    path = folder.parent / f"{vocab_size}.json"
    codec.save(path)
    return path, codec


def subwords(folder, path, data=None, **training):
    made = runs.settings(folder, **training)
    made["data"] |= {"tokenizer": str(path)} | (data or {})
    made["model"]["vocab_size"] = load_tokenizer(path).vocab_size
    return RunConfig.parse(made, "test")


def opened(made, folder):
    """A new run before its first step."""
    with FolderLock(folder):
        return open_run(made, folder, torch.device("cpu"), resume=False, progress=lambda _: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subwords")
    path, codec = tokenizer(runs.write_texts(folder / "texts"))
    result = train(subwords(folder / "texts", path, steps=20, log_every=1), folder / "run")
    return folder, codec, result


def test_a_run_keeps_its_tokenizer_and_loads_with_it(trained):
    folder, codec, result = trained
    (last,) = list_checkpoints(folder / "run")[-1:]
    assert load_tokenizer(folder / "run" / TOKENIZER) == load_tokenizer(last / TOKENIZER) == codec
    lm = milonga.load(folder / "run")
    assert lm.codec == codec
    assert (lm.facts["codec"], lm.facts["tokenizer"]) == ("bpe", codec.digest)
    assert lm.facts["bytes"] == str(result.bytes)
    shutil.copytree(last, folder / "elsewhere")
    assert milonga.load(folder / "elsewhere").codec == codec


def test_losses_are_shared_out_to_the_bytes_of_their_targets(trained):
    folder, codec, result = trained
    made = subwords(folder / "texts", folder / "300.json", steps=20, log_every=1)
    run = opened(made, folder / "again")
    batch = run.sampler.batch(0)
    targets = batch.targets.flatten()
    losses = run.network(batch.tokens, segments=batch.segments, targets=batch.targets).losses.flatten()
    text = codec.decode(targets[targets != -100])
    lines = read_metrics(folder / "run")
    assert lines[0]["bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / len(text), rel=1e-4)
    assert lines[0]["bytes"] == len(codec.decode(batch.tokens.flatten()))
    assert result.bytes == sum(run.sampler.batch(step).bytes for step in range(20)) == lines[-1]["bytes"]
    assert result.bits_per_byte < 0.9 * lines[0]["bits_per_byte"]


def test_held_out_bits_are_those_of_a_session(trained, tmp_path):
    folder, codec, _ = trained
    text = (folder / "texts" / "0.txt").read_bytes()[:100]
    (tmp_path / "heldout.txt").write_bytes(text)
    data = {"heldout": [str(tmp_path / "heldout.txt")], "isolate": False}
    run = opened(subwords(folder / "texts", folder / "300.json", data=data, window=500), tmp_path / "run")
    lm = milonga.inference.LanguageModel(run.network, codec)
    bits = lm.session().score(text)
    scores = evaluate_perplexity(lm, [("text", [text[:3], text[3:]])])
    assert scores.bytes == len(text)
    assert scores.bits_per_byte == pytest.approx(bits.sum() / len(text), rel=1e-6)
    assert sum(bucket.bits for bucket in scores.buckets) == pytest.approx(bits.sum(), rel=1e-6)
    # one window, once round the text: each token given those from where it began
    measured = run.heldout.bits_per_byte(run.network, device=torch.device("cpu"))
    ids = codec.encode(text).tolist()
    began = run.heldout.sampler.positions(0)[0]
    ids = [*ids[began:], *ids[: began + 1]]
    session, bits = lm.session(), 0.0
    for token, following in pairwise(ids):
        session.read_ids([token])
        bits -= float(torch.from_numpy(session.logits).log_softmax(-1)[following]) / math.log(2)
    assert run.heldout.count == 1
    assert measured == pytest.approx(bits / len(text), rel=1e-5)


def test_a_run_goes_on_with_the_tokenizer_it_kept(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    path, codec = tokenizer(texts)
    made = subwords(texts, path, steps=4, save_every=2)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(made, whole)
    train(made.with_steps(2), run)
    path.unlink()
    train(made, run, resume=True)
    assert milonga.load(run).codec == codec
    train_bpe([[b"quite another text, quite another text"]], 260).save(path)
    with pytest.raises(UserError, match=r"cannot continue with another tokenizer: .*300.json has changed"):
        train(made.with_steps(5), run, resume=True)
    path.unlink()
    other = train_bpe([[p.read_bytes()[::-1]] for p in sorted(texts.glob("*.txt"))], 300)
    other.save(run / TOKENIZER)
    with pytest.raises(UserError, match=r"not those of step-00000004 \(changed: tokenizer, fingerprint\)"):
        train(made.with_steps(5), run, resume=True)


def test_a_vocabulary_of_another_size_is_named_with_both(tmp_path):
    texts = runs.write_texts(tmp_path / "texts")
    path, _ = tokenizer(texts)
    settings = runs.settings(texts)
    settings["data"]["tokenizer"] = str(path)
    with pytest.raises(UserError, match=r"vocab_size is 256, but the tokenizer .*300.json has 300 tokens"):
        train(RunConfig.parse(settings, "test"), tmp_path / "run")
    settings["model"]["vocab_size"], settings["data"]["tokenizer"] = 300, None
    with pytest.raises(UserError, match=r"must be 256, .* for subwords set data.tokenizer"):
        RunConfig.parse(settings, "test")


def test_a_recipe_may_leave_the_vocabulary_to_the_tokenizer(tmp_path):
    path, _ = tokenizer(runs.write_texts(tmp_path / "texts"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\n"
        "model: {d_model: 16, pattern: mamba, layers: {mamba: {kind: mamba}}}\n"
        f"data: {{paths: [{tmp_path / 'texts'}]}}\n"
        "training: {steps: 1}\n"
    )
    assert RunConfig.load(recipe, [f"data.tokenizer={path}"]).model.vocab_size == 300
    with pytest.raises(UserError, match=r"model.vocab_size: is required"):
        RunConfig.load(recipe)
    with pytest.raises(UserError, match=r"tokenizer: cannot read .*nowhere.json"):
        RunConfig.load(recipe, ["data.tokenizer=nowhere.json"])
