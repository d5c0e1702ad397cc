"""Every shell and Python block of README.md and docs/ runs, in order, page by page.

A block that installs or takes minutes stands under a comment `<!-- not run: reason -->`; few may.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from milonga.layers import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*?\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*\Z")
NOT_RUN_AT_MOST = 9


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str | None


def blocks_of(page):
    text = page.read_text()
    for match in FENCE.finditer(text):
        marker = MARKER.search(text[: match.start()])
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
        line = text[: match.start()].count("\n") + 2
        yield Block(page, line, match["language"], code, marker["reason"] if marker else None)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.language in ("bash", "python") and block.not_run is None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what the pages take for granted: a run (a few steps of the demo) and some text of one's own."""
    folder = tmp_path_factory.mktemp("docs")
    paragraph = "Once there was a village by the sea, and in it lived a man who mended nets. It rained.\n"
    (folder / "book.txt").write_text(paragraph * 120)
    (folder / "my_texts").mkdir()
    for number in range(4):
        (folder / "my_texts" / f"{number}.txt").write_text(f"Chapter {number}\n" + paragraph * 200)
    small = "--set training.steps=3 --set training.batch=2 --set training.window=128 --set evaluation.tokens=1024"
    _shell(f"milonga train demo --out runs/demo {small}", folder)
    return folder


@pytest.fixture(autouse=True)
def _own_kinds_are_forgotten():
    """A page may register a kind of layer; other tests look at the table."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


def _shell(code, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", code]
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page", sorted({block.page for block in RUN}), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_blocks_of_a_page_run(page, trained, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    names = {"__name__": "page"}
    for block in RUN:
        if block.page != page:
            continue
        if block.language == "bash":
            _shell(block.code, folder)
        else:
            # as many lines down as in the page, so that a traceback points there
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


def test_every_block_says_its_language():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "json", "text"}
    assert len(RUN) >= 15


def test_few_blocks_are_not_run_and_each_says_why():
    left_out = [block for block in BLOCKS if block.not_run is not None]
    assert len(left_out) <= NOT_RUN_AT_MOST
    markers = sum(page.read_text().count("<!-- not run:") for page in PAGES)
    assert markers == len(left_out), "a marker must stand right above the block it excuses"


def test_the_example_of_a_users_own_loop_is_short():
    (loop,) = [b for b in BLOCKS if b.page.name == "train-on-your-text.md" and b.language == "python"]
    assert len(loop.code.splitlines()) < 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text())):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation
