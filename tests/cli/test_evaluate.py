"""`milonga evaluate perplexity`: tables or JSON."""

import gzip
import json

import pytest

from milonga.cli.evaluate import run_evaluate_perplexity
from milonga.errors import UserError
from milonga.inference import load
from milonga.models.pretrained import save_weights
from tests.inference.helpers import opinionated

TEXT = b"The boat went out and the boat came home again. " * 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_weights(opinionated().network, folder / "model.safetensors")
    (folder / "boat.txt").write_bytes(TEXT)
    (folder / "more").mkdir()
    (folder / "more" / "sea.txt.gz").write_bytes(gzip.compress(TEXT[:700]))
    (folder / "more" / "picture.png").write_bytes(b"\x89PNG\0\0\0\0" * 9)
    return folder


def run(place, *files, json_=False):
    return run_evaluate_perplexity(str(place / "model.safetensors"), [str(place / f) for f in files], "cpu", json_)


def test_json_is_one_document_with_every_figure(place, capsys):
    assert run(place, "boat.txt", json_=True) == 0
    done = capsys.readouterr()
    value = json.loads(done.out)
    bits = load(place / "model.safetensors", device="cpu").session().score(TEXT)
    assert value["bits_per_byte"] == pytest.approx(bits.mean(), rel=1e-6)
    assert value["bytes"] == len(TEXT)
    assert [entry["count"] for entry in value["context"]] == [1024, 1024, len(TEXT) - 2048]
    assert value["xz_bits_per_byte"] < 1
    assert "\x1b" not in done.err


def test_tables_name_the_compressors_and_the_buckets(place, capsys):
    assert run(place, "boat.txt") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("boat.txt", "2,400 bytes", "gzip -9", "bzip2 -9", "xz -9", "1,024", "2,048"))
    assert "\x1b" not in out


def test_folders_and_compressed_files_are_documents_and_pictures_are_left_out(place, capsys):
    assert run(place, "boat.txt", "more", json_=True) == 0
    done = capsys.readouterr()
    assert {d["name"]: d["bytes"] for d in json.loads(done.out)["documents"]} == {"boat.txt": 2400, "sea.txt.gz": 700}
    assert "picture.png" in done.err
    assert run(place, "boat.txt", "more") == 0
    assert "by document" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\0\0\0\0"], ids=["missing", "empty", "no text"])
def test_a_text_that_is_none_is_named(place, content):
    path = place / "strange.txt"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"strange\.txt"):
        run(place, "strange.txt")
