"""Drafting and deciding on a GPU: launches."""

from torch import Tensor

from milonga.ops.speculation import triton_kernels
from milonga.ops.speculation.reference import Draft, DraftInputs, VerdictInputs, Verdicts, Vocabulary


def _power(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def _warps(block: int) -> int:
    """So many that a lane holds 16 sums, where there are so many: a program has a multiprocessor for itself, but what
    sums over warps costs each of them."""
    return max(4, min(32, block // 512))


def begin_draft_(behind: Tensor, inputs: DraftInputs, vocabulary: Vocabulary, draft: Draft, greedy: bool) -> None:
    """As `milonga.ops.speculation.begin_draft_`."""
    batch, pieces, size = behind.shape
    block = _power(size)
    triton_kernels.begin_draft[(batch,)](
        behind, inputs.length, inputs.last, inputs.limit, inputs.end, inputs.temperature, inputs.length.stride(0),
        vocabulary.order, draft.keep, draft.first, draft.count, draft.drawn, draft.live, pieces, size,
        BLOCK=block, GREEDY=greedy, num_warps=_warps(block),
    )  # fmt: skip


def draw_token_(
    logits: Tensor, inputs: DraftInputs, vocabulary: Vocabulary, draft: Draft, first: bool, greedy: bool
) -> None:
    """As `milonga.ops.speculation.draw_token_`."""
    batch, pieces, size = logits.shape
    block, longest = _power(size), vocabulary.text.shape[1]
    triton_kernels.draw_token[(batch,)](
        logits, inputs.limit, inputs.tokens, inputs.dice, inputs.temperature, inputs.limit.stride(0),
        vocabulary.order, vocabulary.lengths, vocabulary.text, vocabulary.node, draft.text, draft.node, draft.step,
        draft.text.stride(0), draft.count, draft.live, draft.drawn, draft.next, draft.keep, draft.first, draft.sums,
        batch, pieces, size, longest, BLOCK=block, LB=_power(longest), FIRST=first, GREEDY=greedy,
        num_warps=_warps(block),
    )  # fmt: skip


def decide_(
    logits: Tensor,
    text: Tensor,
    count: Tensor,
    draft: Draft | None,
    vocabulary: Vocabulary | None,
    inputs: VerdictInputs,
    verdicts: Verdicts,
    greedy: bool,
) -> None:
    """As `milonga.ops.speculation.decide_`."""
    batch, time, _ = logits.shape
    sure = draft is None or vocabulary is None
    none = (text, text, text, text, 0, 0)
    parts = none
    if draft is not None and vocabulary is not None:
        parts = draft.node, draft.step, draft.sums, vocabulary.bounds, draft.node.stride(0), len(vocabulary.order)
    node, step, sums, bounds, row, size = parts
    triton_kernels.decide[(batch,)](
        logits, text, text.stride(0), count, count.stride(0), node, step, row, sums, bounds,
        inputs.active, inputs.accept, inputs.draw, inputs.temperature,
        inputs.active.stride(0), verdicts.result, verdicts.result.stride(0), verdicts.keep,
        batch, time, size, TB=_power(time), GREEDY=greedy, SURE=sure, num_warps=8,
    )  # fmt: skip
