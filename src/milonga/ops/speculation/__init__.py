"""Speculative decoding between the passes of its two models: drawing a draft's tokens, and deciding which bytes stand.

In plain PyTorch each of these is some thirty kernels of a microsecond's work; here each is one, a program for each row.
They write into buffers and read nothing back.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from milonga.ops.backend import choice, kernels
from milonga.ops.speculation.reference import (
    Draft,
    DraftInputs,
    VerdictInputs,
    Verdicts,
    Vocabulary,
    begin_draft_reference,
    conditionals,
    decide_exact,
    decide_greedy,
    decide_reference,
    draw_ranks,
    draw_token_reference,
    pick,
    sure_conditionals,
    write_verdicts,
)

LARGEST = 1 << 15  # tokens of a vocabulary that one program takes at once


def _runs(logits: Tensor, inputs: DraftInputs | VerdictInputs, backend: str) -> bool:
    """Whether the kernels run."""
    fits = logits.dtype == torch.float32 and logits.shape[-1] <= LARGEST and logits.is_contiguous()
    if backend == "auto" and not fits:
        return False
    runs = choice("speculation", backend, logits.device.type, logits.dtype) == "triton"
    if runs and not fits:
        got = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}, strides {list(logits.stride())}"
        raise ValueError(
            f"speculation: the kernels take contiguous float32 logits of at most {LARGEST} tokens, got {got}"
        )
    if runs and len({column.stride() for column in inputs}) > 1 and logits.shape[0] > 1:
        got = [list(column.stride()) for column in inputs]
        raise ValueError(f"speculation: the kernels take inputs that are columns of one array, got strides {got}")
    return runs


def begin_draft_(
    behind: Float[Tensor, "B P V"],
    inputs: DraftInputs,
    vocabulary: Vocabulary,
    draft: Draft,
    greedy: bool,
    *,
    backend: str = "auto",
) -> None:
    """Decide of each row whether the last token that was read again goes on behind its bytes: a token is drawn among
    those that begin with them, and if it is another one, so it does.

    Args:
        behind: logits before the first of these tokens, behind it, ...
        inputs: of the host.
        vocabulary: the V tokens.
        draft: `keep` and `first` are set, `count`, `drawn` and `live` made those of an empty draft.
        greedy: draw the likeliest.
        backend: `auto`, `reference` or `triton`.

    Raises:
        ValueError: if the backend cannot run here, or not on such logits and inputs.
    """
    run = kernels("speculation", "triton").begin_draft_ if _runs(behind, inputs, backend) else begin_draft_reference
    run(behind, inputs, vocabulary, draft, greedy)


def draw_token_(
    logits: Float[Tensor, "B P V"],
    inputs: DraftInputs,
    vocabulary: Vocabulary,
    draft: Draft,
    first: bool,
    greedy: bool,
    *,
    backend: str = "auto",
) -> None:
    """Draw a token of each row, put down its bytes behind the draft, as many as may come, and what it was drawn from.

    Args:
        logits: with `first` those of `begin_draft_`, of which number `keep` is taken; else the first is.
        first: draw from `first`; else from all tokens.
        inputs, vocabulary, draft, greedy, backend: as there. No more tokens are drawn than `draft.sums` has room for.

    Raises:
        ValueError: if the backend cannot run here, or not on such logits and inputs.
    """
    run = kernels("speculation", "triton").draw_token_ if _runs(logits, inputs, backend) else draw_token_reference
    run(logits, inputs, vocabulary, draft, first, greedy)


def decide_(
    logits: Float[Tensor, "B T V"],
    text: Int[Tensor, "B L"],
    count: Int[Tensor, " B"],
    draft: Draft | None,
    vocabulary: Vocabulary | None,
    inputs: VerdictInputs,
    verdicts: Verdicts,
    greedy: bool,
    *,
    backend: str = "auto",
) -> None:
    """Which bytes of each row's draft stand, and the verifier's own behind them.

    Args:
        logits: fp32 or more, of 256 bytes, before each drafted byte and behind the last: T = L + 1, L from 1.
        text: the draft, columns of a larger array.
        count: its bytes, at most L.
        draft, vocabulary: what it was drawn from; None for bytes without dice.
        inputs: of the host.
        verdicts: set.
        greedy: bytes stand that are the likeliest; else by rejection sampling, from `softmax(logits / temperature)`.
        backend: `auto`, `reference` or `triton`.

    Raises:
        ValueError: if the logits are not `[B L+1 256]`, or the backend cannot run here, or not on such logits and
            inputs.
    """
    expected = [text.shape[0], text.shape[1] + 1, 256]
    if list(logits.shape) != expected or text.shape[1] < 1:
        got = list(logits.shape)
        raise ValueError(f"speculation: logits must be [B L+1 256], L from 1, expected {expected}, got {got}")
    run = kernels("speculation", "triton").decide_ if _runs(logits, inputs, backend) else decide_reference
    run(logits, text, count, draft, vocabulary, inputs, verdicts, greedy)


__all__ = [
    "LARGEST",
    "Draft",
    "DraftInputs",
    "VerdictInputs",
    "Verdicts",
    "Vocabulary",
    "begin_draft_",
    "conditionals",
    "decide_",
    "decide_exact",
    "decide_greedy",
    "draw_ranks",
    "draw_token_",
    "pick",
    "sure_conditionals",
    "write_verdicts",
]
