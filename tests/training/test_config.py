"""Recipes, settings by path, and the lines that wrong ones give."""

import pytest
import yaml

from milonga.data.bpe import BpeCodec
from milonga.errors import UserError
from milonga.models import preset
from milonga.training import RunConfig, recipe_names
from milonga.training.config import changed_keys, read_recipe, set_key

from . import runs


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(runs.settings(tmp_path / "texts")))
    return path


def test_packaged_recipes():
    assert {"demo", "samba-421m", "samba-1.3b", "mambabyte-353m", "subword-samba-small"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_a_config_and_has_its_own_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BpeCodec([(b"a", b"b")]).save("tokenizer.json")
    text = [] if name == "demo" else ["data.paths=books"]
    made = RunConfig.load(name, text)
    assert made.name == name
    if made.data.tokenizer is None:
        assert made.model.vocab_size == 256
    else:
        assert made.model.vocab_size == {"subword-samba-small": 257, "subword-samba-421m": 32000}[name]
    assert RunConfig.parse(yaml.safe_load(made.dump()), "dump") == made


def test_the_papers_recipes():
    samba, mambabyte = (RunConfig.load(name, ["data.paths=books"]) for name in ("samba-421m", "mambabyte-353m"))
    assert samba.model == preset("samba-421m").replace(vocab_size=256)
    assert mambabyte.model == preset("mambabyte-353m")
    assert RunConfig.load("subword-samba-421m", ["data.paths=books"]).model == preset("samba-421m")
    training = samba.training
    assert training.batch * training.window * training.steps == pytest.approx(20e9, rel=1e-3)
    assert training.optimizer.decay == "all"
    assert training.schedule.warmup(training.steps) == 95
    assert mambabyte.training.batch * mambabyte.training.window * mambabyte.training.steps == pytest.approx(
        31.46e9, rel=1e-3
    )


def test_settings_by_path(recipe):
    changes = ["training.optimizer.lr=1e-4", "model.layers.swa.window=9", "data.paths=[a, b]", "training.compile=true"]
    made = RunConfig.load(recipe, changes)
    assert made.training.optimizer.lr == 1e-4
    assert made.model.layers["swa"].window == 9
    assert made.data.paths == ["a", "b"]
    assert made.training.compile is True
    assert RunConfig.load(recipe, ["model=mambabyte-353m"]).model == preset("mambabyte-353m")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("training.step=3", "training.step: no such setting (misspelt?)"),
        ("training.optimiser.lr=1", "training.optimiser: no such setting (misspelt?)"),
        ("model.layers.swa.windw=1", "model.layers.swa.windw: no such setting (misspelt?)"),
        ("model.layers.swa.window=0", "model.layers.swa.window: Input should be greater than 0"),
        ("model.layers.swa.heads=3", "model: layers.swa: attention: heads must divide d_model"),
        ("model.pattern=mamba moe", "pattern word 'moe' has no layer"),
        ("training.batch=0", "training.batch: Input should be greater than 0, got 0"),
        ("training.accumulation=3", "training: accumulation must divide batch, got batch 4 and accumulation 3"),
        ("training.steps=null", "training: say how long: set steps, or minutes"),
        ("training.device=tpu", "training.device: "),
        ("training.steps.x=1", "--set training.steps.x=1: training.steps is 12, not a group of settings"),
        ("training.steps", "--set training.steps: expected key.path=value"),
        ("training..steps=1", "expected key.path=value"),
        ("training.steps=[", "the value is not YAML"),
        ("model.vocab_size=32000", "model.vocab_size must be 256, because text is read as bytes"),
        ("model=mambabyte-354m", "preset 'mambabyte-354m' does not exist"),
        ("name=../x", "name: "),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(recipe, change, line):
    with pytest.raises(UserError) as caught:
        RunConfig.load(recipe, [change])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'demmo': there are .*demo"):
        read_recipe("demmo")
    with pytest.raises(UserError, match="no such recipe file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match="not YAML") as caught:
        read_recipe(tmp_path / "broken.yaml")
    assert "\n" not in str(caught.value)


def test_a_group_may_be_made_by_setting_one_of_its_keys():
    settings = {"a": None}
    set_key(settings, "a.b.c=[1, x]")
    set_key(settings, "d=")
    assert settings == {"a": {"b": {"c": [1, "x"]}}, "d": None}


def test_changed_keys(tmp_path):
    one = runs.config(tmp_path)
    free = runs.config(tmp_path, steps=99, minutes=1, device="auto", keep=9, tensorboard=True)
    assert changed_keys(one, free) == []
    other = runs.config(tmp_path, {"carried": True}, optimizer={"lr": 0.5})
    assert changed_keys(one, other) == ["data.carried", "training.optimizer.lr"]
