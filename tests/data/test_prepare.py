"""From a recipe's data section to text."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from milonga.data.config import DataConfig
from milonga.data.prepare import prepare
from milonga.errors import UserError
from tests.data.helpers import STORY, make_corpus, story_codec


def test_a_config_comes_back_from_json():
    for config in (
        DataConfig(paths=["a", "b*"], heldout=0.1, separator="\n", isolate=False),
        DataConfig(paths="a", heldout="b", carried=True),
        DataConfig(paths=["bundled:train"], heldout=[]),
    ):
        assert DataConfig.model_validate_json(config.model_dump_json()) == config
    assert DataConfig(paths="a", heldout="b").heldout == ["b"]
    assert DataConfig(paths="a").heldout == 0.05


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"paths": []}, "paths"),
        ({"paths": "a", "pathz": "b"}, "pathz"),
        ({"paths": "a", "heldout": 1.5}, "heldout"),
        ({"paths": "document:a"}, "paths"),
        ({"paths": "a", "text_field": ""}, "text_field"),
    ],
)
def test_wrong_settings_are_named(settings: dict, where: str):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**settings)
    assert caught.value.errors()[0]["loc"][0] == where


def test_held_out_files_documents_fractions_and_nothing(tmp_path: Path):
    make_corpus(tmp_path, [b"aaaa", b"bbb", b"cc", b"d"])
    texts = str(tmp_path / "texts")

    def names(**settings) -> tuple[list[str], list[str] | None]:
        train, held = prepare(DataConfig(paths=texts, separator="\n", **settings), tmp_path / "prepared")
        assert train.separator == b"\n"
        return list(train.names), None if held is None else list(held.names)

    assert names(heldout=[]) == (["0000.txt", "0001.txt", "0002.txt", "0003.txt"], None)
    assert names(heldout=f"{texts}/0002.txt") == (["0000.txt", "0001.txt", "0003.txt"], ["0002.txt"])
    assert names(heldout="document:*[13].txt") == (["0000.txt", "0002.txt"], ["0001.txt", "0003.txt"])
    train, held = names(heldout=0.3)
    assert held
    assert sorted(train + held) == ["0000.txt", "0001.txt", "0002.txt", "0003.txt"]
    with pytest.raises(UserError, match="either files or documents"):
        names(heldout=["document:a", "b"])


def test_the_demo_text(tmp_path: Path):
    train, held = prepare(DataConfig(paths="bundled:train", heldout="bundled:heldout"), tmp_path)
    assert (train.documents, train.bytes) == (9, 6_135_330)
    assert held is not None
    assert (held.documents, held.bytes) == (1, 337_055)


def test_one_file_needs_a_decision(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("my own words " * 20)
    config = DataConfig(paths=str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="a single document"):
        prepare(config, tmp_path / "prepared")
    train, held = prepare(config.model_copy(update={"heldout_tail": True}), tmp_path / "prepared")
    assert held is not None
    assert (train.bytes, held.bytes) == (247, 13)


def test_a_tokenizer_named_in_the_config_encodes_both_parts(tmp_path: Path):
    codec = story_codec()
    codec.save(tmp_path / "mine.json")
    make_corpus(tmp_path, [STORY, STORY[:50], STORY[9:]])
    config = DataConfig(paths=[str(tmp_path / "texts")], heldout=0.1, tokenizer=str(tmp_path / "mine.json"))
    train, held = prepare(config, tmp_path / "prepared")
    assert held is not None
    assert train.codec == held.codec == codec
    assert codec.decode(held.document(0)) == STORY[:50]
    plain, _ = prepare(config.model_copy(update={"tokenizer": None}), tmp_path / "plain")
    assert list(plain.names) == list(train.names)
    assert plain.length > train.length
    with pytest.raises(UserError, match="tokenizer: cannot read"):
        prepare(config.model_copy(update={"tokenizer": "nowhere.json"}), tmp_path / "prepared")
