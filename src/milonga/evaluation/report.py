"""The report of a run: one HTML page to look at, and the same figures as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from milonga.evaluation import figures as draw
from milonga.evaluation import report_page as html
from milonga.evaluation.drawing import byte_size
from milonga.evaluation.machine import Machine, describe_machine
from milonga.evaluation.perplexity import COMMANDS, Perplexity
from milonga.evaluation.throughput import Throughput, transformer_cache_bytes
from milonga.files import write_atomically
from milonga.inference import LanguageModel
from milonga.models import ModelConfig

REPORT_HTML, REPORT_JSON = "report.html", "report.json"


@dataclass(frozen=True)
class Sample:
    """A text the model wrote."""

    prompt: str
    text: str
    settings: str  # such as `temperature 0.8, seed 0`


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of the training.

    Attributes:
        name: of the run.
        config: the resolved configuration, as it would be written to YAML.
        metrics: the lines of `metrics.jsonl`.
        seconds: spent training.
        bytes: of text read while training, repeats included.
        window: bytes in a training window; None if unknown.
        command: what made the run.
    """

    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    seconds: float
    bytes: int
    window: int | None
    command: str


@dataclass(frozen=True)
class Report:
    """Everything a report says."""

    training: TrainingFacts
    config: ModelConfig
    parameters: int
    fingerprint: str
    scores: Perplexity
    rates: Throughput
    sample: Sample
    machine: Machine
    date: datetime

    @property
    def state_bytes(self) -> int:
        """What a session holds at the end of the longest document."""
        return self.scores.state_sizes[-1].state_bytes

    def to_json(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        training, seconds = self.training, self.training.seconds
        longest = self.scores.state_sizes[-1].bytes
        return {
            "name": training.name,
            "bits_per_byte": self.scores.bits_per_byte,
            **{f"{name}_bits_per_byte": self.scores.compressor_bits_per_byte(name) for name in COMMANDS},
            "heldout_bytes": self.scores.bytes,
            "context": self.scores.context(),
            "train_seconds": seconds,
            "train_bytes": training.bytes,
            "train_steps": max((line["step"] for line in training.metrics), default=0),
            "bytes_per_second": training.bytes / seconds if seconds > 0 else None,
            "feed_bytes_per_second": self.rates.feed_bytes_per_second,
            "generate_bytes_per_second": self.rates.generate_bytes_per_second,
            "state_bytes": self.state_bytes,
            "transformer_cache_bytes": transformer_cache_bytes(self.config, longest),
            "parameters": self.parameters,
            "fingerprint": self.fingerprint,
            "sample": {"prompt": self.sample.prompt, "text": self.sample.text, "settings": self.sample.settings},
            "command": training.command,
            "date": self.date.isoformat(timespec="seconds"),
            "machine": self.machine.to_json(),
        }


def make_report(
    lm: LanguageModel, training: TrainingFacts, scores: Perplexity, rates: Throughput, sample: Sample
) -> Report:
    """Gather a report about a trained model, here and now."""
    return Report(
        training=training,
        config=ModelConfig.model_validate(lm.network.config),
        parameters=sum(parameter.numel() for parameter in lm.network.parameters()),
        fingerprint=lm.fingerprint,
        scores=scores,
        rates=rates,
        sample=sample,
        machine=describe_machine(),
        date=datetime.now(UTC).astimezone(),
    )


def write_report(run: Path, report: Report) -> Path:
    """Write `report.json` and `report.html` into a run's folder: -> the path of the page.

    Raises:
        UserError: if they cannot be written.
    """
    write_atomically(run / REPORT_JSON, json.dumps(report.to_json(), indent=2) + "\n")
    write_atomically(run / REPORT_HTML, render(report))
    return run / REPORT_HTML


def render(report: Report) -> str:
    """The page."""
    scores, training = report.scores, report.training
    own, xz = scores.bits_per_byte, scores.compressor_bits_per_byte("xz")
    what = scores.documents[0].name if len(scores.documents) == 1 else f"{len(scores.documents)} texts"
    relation = "below" if own < xz else "above"
    return html.page(
        title=f"{own:.2f} bits per byte, {relation} xz’s {xz:.2f}",
        over=f"Milonga · {training.name}",
        lead=(
            f"A model of {_millions(report.parameters)} parameters learned from {_text(training.bytes)} of text in "
            f"{_duration(training.seconds)}, then read {what}, which it had never seen, from the first byte to the "
            f"last, in {byte_size(report.state_bytes)} of memory."
        ),
        headline=html.figures(_headline(report)),
        cards=_cards(report, what),
        footer=f"Made by <code>{escape(training.command)}</code> on {report.date:%d %B %Y at %H:%M}. "
        "The figures are in <code>report.json</code> beside this page.",
    )


def _headline(report: Report) -> list[html.Figure]:
    scores, rates = report.scores, report.rates
    size, unit = byte_size(report.state_bytes).split("\N{NO-BREAK SPACE}")
    return [
        html.Figure(f"{scores.bits_per_byte:.3f}", "bits/byte", "held-out text"),
        html.Figure(f"{scores.compressor_bits_per_byte('xz'):.3f}", "bits/byte", "xz on the same text"),
        html.Figure(_duration(report.training.seconds), "", f"training, {report.machine.cores} cores"),
        html.Figure(f"{rates.feed_bytes_per_second:,.0f}", "bytes/s", "reading"),
        html.Figure(f"{rates.generate_bytes_per_second:,.0f}", "bytes/s", "writing"),
        html.Figure(size, unit, "state, at any length"),
    ]


def _cards(report: Report, what: str) -> list[html.Card]:
    training, scores = report.training, report.scores
    xz = scores.compressor_bits_per_byte("xz")
    beyond = f" Training never showed it more than {training.window:,} bytes in a row." if training.window else ""
    compared = [("this model", scores.bits_per_byte)]
    compared += [(command, scores.compressor_bits_per_byte(name)) for name, command in COMMANDS.items()]
    return [
        html.Card("Learning", "Bits per byte while training.", draw.loss_curve(training.metrics, xz)),
        html.Card(
            "The longer it reads, the better it guesses" if _improves(scores) else "How well it guesses, by position",
            f"Bits per byte of {what}, by how much of it came before.{beyond}",
            draw.context_curve(scores.context(), training.window),
        ),
        _memory_card(report),
        html.Card(
            "Beside compressors",
            f"Bits per byte of {what}, {scores.bytes:,} bytes. Without any model a byte costs 8.",
            html.bars(compared),
        ),
        html.Card(
            "In its own words",
            f"It continues the marked beginning ({report.sample.settings}).",
            html.sample(report.sample.prompt, report.sample.text),
            wide=True,
        ),
        html.Card("The model", "", html.facts(_model_facts(report))),
        html.Card("The machine", "", html.facts(_machine_facts(report))),
        html.Card(
            "Everything the run depends on",
            "",
            "<details><summary>The resolved configuration</summary>"
            + html.preformatted(yaml.safe_dump(dict(training.config), sort_keys=False, allow_unicode=True))
            + "</details>",
            wide=True,
        ),
    ]


def _memory_card(report: Report) -> html.Card:
    measured = [(size.bytes, size.state_bytes) for size in report.scores.state_sizes if size.bytes]
    length = measured[-1][0]
    cache = [(at, transformer_cache_bytes(report.config, at)) for at, _ in measured]
    flat = measured[0][1] == measured[-1][1]
    ratio = cache[-1][1] / measured[-1][1]
    return html.Card(
        "Memory that does not grow" if flat else "Memory against text length",
        f"What is held while reading, measured, beside the keys and values of a Transformer of the same width and depth"
        f" (fp32): {ratio:,.0f} times as much after {length:,} bytes.",
        draw.state_curve(measured, cache, ("this model", "Transformer")),
    )


def _improves(scores: Perplexity) -> bool:
    values = [bucket.bits_per_byte for bucket in scores.buckets]
    return len(values) > 2 and values[-1] < values[0]


def _model_facts(report: Report) -> dict[str, str]:
    config = report.config
    return {
        "Pattern": f"{config.pattern}, {config.repeats} times",
        "Width": f"{config.d_model}",
        "Layers": "; ".join(
            f"{name}: " + ", ".join(f"{key} {value}" for key, value in layer.model_dump(exclude_defaults=True).items())
            if layer.model_dump(exclude_defaults=True)
            else f"{name}: defaults"
            for name, layer in config.layers.items()
        ),
        "Parameters": f"{report.parameters:,}",
        "Training": f"{report.to_json()['train_steps']:,} steps, {_text(report.training.bytes)} of text, "
        f"{report.training.bytes / max(report.training.seconds, 1e-9):,.0f} bytes/s",
        "Fingerprint": report.fingerprint[:16],
    }


def _machine_facts(report: Report) -> dict[str, str]:
    machine = report.machine
    shown = {
        "Processor": f"{machine.cpu}, {machine.cores} cores, threads used: {machine.threads}",
        "GPU": machine.gpu or "none",
        "System": machine.system,
        "Python": machine.python,
    }
    return shown | machine.packages


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _millions(count: int) -> str:
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:.3g} million" if count < 1e9 else f"{count / 1e9:.3g} billion"


def _text(count: int) -> str:
    if count < 1_000_000:
        return f"{count:,} bytes"
    return f"{count / 1e6:,.3g} MB" if count < 1e9 else f"{count / 1e9:,.3g} GB"
