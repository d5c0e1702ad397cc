"""The report: one page that needs nothing but itself, and the same figures as JSON."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from milonga.evaluation import Throughput, evaluate_perplexity, transformer_cache_bytes
from milonga.evaluation.figures import byte_count, byte_size, context_curve, loss_curve
from milonga.evaluation.machine import describe_machine
from milonga.evaluation.report import Sample, TrainingFacts, make_report, render, write_report
from tests.inference.helpers import SAMBA, opinionated

LM = opinionated()
TEXT = b"No one would have believed in the last years of the nineteenth century. " * 60
METRICS = [
    {"step": 10, "bits_per_byte": 5.5, "bytes": 640},
    {"step": 20, "bits_per_byte": 3.5, "bytes": 1280},
    {"step": 20, "heldout_bits_per_byte": 3.7, "bytes": 1280},
]
NAMESPACE = "{http://www.w3.org/2000/svg}"


def report(metrics=METRICS, text=TEXT, prompt="A <b> & a prompt"):
    scores = evaluate_perplexity(LM, [("The War of the Worlds", [text])])
    facts = TrainingFacts(
        "tiny", {"name": "tiny", "data": {"paths": ["<script>"]}}, metrics, 161.4, 1280, 64, "milonga demo"
    )
    return make_report(LM, facts, scores, Throughput(20000.0, 500.0, 2, "cpu"), Sample(prompt, " out</div>", "seed 0"))


@pytest.fixture(scope="module")
def page():
    return render(report())


def test_json_has_the_promised_keys(tmp_path):
    path = write_report(tmp_path, report())
    assert path == tmp_path / "report.html"
    assert path.read_text().startswith("<!doctype html>")
    figures = json.loads((tmp_path / "report.json").read_text())
    promised = {"bits_per_byte", "xz_bits_per_byte", "train_seconds", "bytes_per_second", "state_bytes", "context"}
    assert promised <= figures.keys()
    assert figures["train_seconds"] == 161.4
    assert figures["bytes_per_second"] == pytest.approx(1280 / 161.4)
    assert figures["state_bytes"] == LM.session().nbytes
    assert figures["transformer_cache_bytes"] == transformer_cache_bytes(SAMBA, len(TEXT))
    assert figures["train_steps"] == 20
    assert [set(entry) >= {"bytes", "bits_per_byte"} for entry in figures["context"]] == [True] * 4
    assert figures["bits_per_byte"] == pytest.approx(LM.session().score(TEXT).mean(), rel=1e-6)
    assert figures["machine"]["cpu"]


class _Tags(HTMLParser):
    VOID = ("meta", "br", "path", "use", "rect", "line")

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(page):
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links)
    assert "@import" not in page
    assert "<script" not in page
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_names.replace("http-equiv", "")
    assert re.findall(r"url\(([^)]*)\)", page) == [u for u in re.findall(r"url\(([^)]*)\)", page) if u.startswith("#")]


def test_names_inside_the_page_are_its_own_and_resolve(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page))
    assert used <= set(ids)


def test_what_comes_from_outside_is_escaped(page):
    assert "<mark>A &lt;b&gt; &amp; a prompt</mark> out&lt;/div&gt;" in page
    assert "&lt;script&gt;" in page


def test_figures_take_their_colours_from_the_page(page):
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("viewBox")
        assert root.get("aria-label")
        assert root.get("width") is None
        assert root.findall(f".//{NAMESPACE}text")
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", picture))
        assert colours <= {"none", *(c for c in colours if c.startswith("var(--"))}
        defined = set(re.findall(r"(--\w+):", page))
        assert {c[4:-1] for c in colours if c.startswith("var(")} <= defined


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


def test_the_loss_curve_has_both_curves_and_xz():
    found = texts(loss_curve(METRICS, 2.56))
    assert {"training text", "held-out text", "xz -9 2.56", "step", "bits per byte"} <= set(found)
    assert "held-out text" not in texts(loss_curve(METRICS[:2], 2.56))
    assert "xz -9 2.56" in texts(loss_curve([], 2.56))


def test_the_context_curve_shows_every_bucket():
    context = [
        {"start": 0, "bytes": 1024, "bits_per_byte": 2.51},
        {"start": 1024, "bytes": 2048, "bits_per_byte": 2.22},
        {"start": 2048, "bytes": 2500, "bits_per_byte": 2.13},
    ]
    assert {"2.51", "2.22", "2.13", "1K", "bytes of text before"} <= set(texts(context_curve(context)))
    assert "3.00" in texts(context_curve([{"start": 0, "bytes": 40, "bits_per_byte": 3.0}]))


def test_pictures_are_the_same_every_time(page):
    first, second = (re.findall(r"<svg.*?</svg>", p, re.DOTALL) for p in (page, render(report())))
    assert first == second


def test_a_run_without_metrics_or_with_a_short_text_has_a_report():
    assert "<svg" in render(report(metrics=[], text=b"short"))


def test_units():
    assert [byte_count(n) for n in (512, 1024, 1536, 1 << 20)] == ["512", "1K", "1.5K", "1M"]
    sizes = [byte_size(n).replace("\N{NO-BREAK SPACE}", " ") for n in (0, 999, 1 << 20, 3.3e9)]
    assert sizes == ["0 bytes", "999 bytes", "1 MiB", "3.07 GiB"]


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine.cores >= 1
    assert {"milonga", "torch", "numpy"} <= machine.packages.keys()
    json.dumps(machine.to_json())
