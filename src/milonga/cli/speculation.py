"""Speculative decoding on the command line: what the options ask for, and what came of it."""

import dataclasses
import math
import re
import statistics
from dataclasses import dataclass

from milonga.errors import UserError
from milonga.inference import LanguageModel, Session, load
from milonga.inference.acceptance import RULES, Rule
from milonga.inference.captured import runner_for
from milonga.inference.draft_length import ADAPTIVE, AdaptiveDraft, DraftLength
from milonga.inference.drafters import NgramDrafter
from milonga.inference.model_drafter import ModelDrafter
from milonga.inference.speculative import DRAFT, SpeculativeDecoder
from milonga.inference.speculative_rows import SpeculationStats

NGRAM = "ngram"
# The last bytes of a prompt, which the drafter reads too.
CONTEXT = 1 << 16
# Plain steps that are timed behind a text to compare with: so many, or fewer where they take this many seconds.
STEPS, ENOUGH = 24, 0.5
# Of these the first are not counted: they compile, and bring the state to where steps run.
WARM = 2


@dataclass(frozen=True)
class Speculation:
    """What `--drafter`, `--rule` and `--draft` say."""

    drafter: str  # a run, or `ngram`
    rule: Rule
    draft: DraftLength


def speculation_of(drafter: str | None, rule: str | None, draft: str | None) -> Speculation | None:
    """What the options ask for; None without `--drafter`.

    Raises:
        UserError: if the others come without it, there is no such rule, or a draft is neither a number nor `adaptive`.
    """
    if drafter is None:
        for option, value in (("--rule", rule), ("--draft", draft)):
            if value is not None:
                raise UserError(f"{option}: says how to use a draft; name a run that drafts with --drafter, or ngram")
        return None
    for known in RULES:
        if known == (rule or RULES[0]):
            return Speculation(drafter, known, _length(draft))
    raise UserError(f"--rule: must be one of {', '.join(RULES)}, got '{rule}'")


def _length(draft: str | None) -> DraftLength:
    """What `--draft` says. Adaptive drafts have the default prices: ones that are timed would make the text depend on
    the clock."""
    if draft is None:
        return DRAFT
    if draft == ADAPTIVE:
        return AdaptiveDraft()
    if not re.fullmatch("[0-9]{1,9}", draft) or int(draft) < 1:
        raise UserError(f"--draft: must be a number of bytes, 1 or more, or {ADAPTIVE}, got '{draft}'")
    return int(draft)


def decoder_of(lm: LanguageModel, asked: Speculation) -> SpeculativeDecoder:
    """The decoder, its drafter on the verifier's device; on a GPU both are captured. For one text at a time.

    Raises:
        UserError: if there is no model to draft with, or the two cannot work together.
    """
    model = None if asked.drafter == NGRAM else load(asked.drafter, device=lm.device)
    drafter = NgramDrafter() if model is None else ModelDrafter(model, runner_for(model.network))
    return SpeculativeDecoder(lm, drafter, rule=asked.rule, draft=asked.draft, runner=runner_for(lm.network))


def step_seconds(session: Session) -> float:
    """What one byte of plain decoding takes here: the median of a few steps of a fork, with the settings of the text
    that the session wrote last. The session stays as it is."""
    assert session.sampling is not None
    free = dataclasses.replace(session.sampling, stop=(), banned=b"", forced=b"", valid_utf8=False)
    steps, times, before = session.fork().generate_bytes(STEPS, free), [], 0.0
    for _ in steps:
        times.append(steps.seconds - before)
        before = steps.seconds
        if before > ENOUGH and len(times) > WARM:
            break
    steps.close()
    return statistics.median(times[WARM:])


def speedup(decoder: SpeculativeDecoder, session: Session) -> tuple[float, float]:
    """-> (seconds of a plain step, how many times as fast as those the text was written); NaN where nothing was
    verified, and where timing is interrupted: the text is there."""
    if not decoder.stats.rounds:
        return math.nan, math.nan
    try:
        seconds = step_seconds(session)
    except (KeyboardInterrupt, UserError):
        return math.nan, math.nan
    return seconds, decoder.stats.predicted_speedup(seconds)


def speculation_line(decoder: SpeculativeDecoder, session: Session) -> str:
    """What came of it, in a line for people."""
    stats = decoder.stats
    parts = [f"{stats.acceptance:.0%} stood".replace("%", " %") if stats.examined else "nothing"]
    if stats.rounds:
        _, times = speedup(decoder, session)
        parts.append(f"{stats.bytes_per_verification:.1f} bytes a verification")
        parts += [] if math.isnan(times) else [f"about {times:.2g}x plain decoding"]
    if decoder.rule == "top_k":
        parts.append("lossy: not the model's own text")
    return f"[drafted: {', '.join(parts)}]"


def speculation_facts(decoder: SpeculativeDecoder, session: Session) -> dict[str, object]:
    """What came of it in the text that the session wrote; JSON-ready."""
    stats: SpeculationStats = decoder.stats
    length = decoder.draft
    step, times = speedup(decoder, session)
    return {
        "rule": decoder.rule,
        "lossless": decoder.rule != "top_k",
        "draft": {"adaptive": dataclasses.asdict(length)} if isinstance(length, AdaptiveDraft) else length,
        "drafted": stats.drafted,
        "examined": stats.examined,
        "accepted": stats.accepted,
        "acceptance": stats.acceptance,
        "verifications": stats.verifications,
        "bytes_per_verification": stats.bytes_per_verification,
        "redone": stats.redone,
        "replayed": stats.replayed,
        "draft_seconds": stats.draft_seconds,
        "verify_seconds": stats.verify_seconds,
        "plain_step_seconds": step,
        "predicted_speedup": times,
    }
