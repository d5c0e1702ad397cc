"""The Triton kernels of `speculation` under Triton's interpreter, on CPU tensors, against the definitions.

Run by `test_triton_interpreted.py` in a process of its own: the interpreter must be chosen before Triton is imported.
"""

import numpy as np
import pytest
import torch

from milonga.data.byte_trie import ByteSortedVocabulary
from milonga.ops.speculation import Draft, DraftInputs, VerdictInputs, Verdicts, Vocabulary, triton
from milonga.ops.speculation import reference as definition
from tests.ops.interpreter import prepare

prepare()

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"abcd", b"ba", b"bab", b" t", b" the", b"he", b"cab"]
LIMIT = 15
EXACT = 1e-6  # probabilities: the kernels take exponentials in fp32


def vocabulary() -> Vocabulary:
    sorted_ = ByteSortedVocabulary(TOKENS)
    tokens = [TOKENS[token] for token in sorted_.order]
    text = np.zeros((len(tokens), sorted_.longest), np.int64)
    node, prefixes, bounds = np.zeros_like(text), {}, []
    for place, token in enumerate(tokens):
        text[place, : len(token)] = list(token)
        for depth in range(len(token)):
            if token[:depth] not in prefixes:
                prefixes[token[:depth]] = len(bounds)
                bounds.append(sorted_.bounds(*sorted_.range(token[:depth]), depth)[1:].astype(np.int32))
            node[place, depth] = prefixes[token[:depth]]
    lengths = np.array([len(token) for token in tokens])
    return Vocabulary(*map(torch.from_numpy, (sorted_.order, lengths, text, node, np.stack(bounds))))


def draft_of(rows: int, tokens: int = 6) -> Draft:
    wide = [torch.zeros(rows, LIMIT + 1, dtype=torch.int64) for _ in range(3)]
    numbers = [torch.zeros(rows, dtype=torch.int64) for _ in range(3)]
    sums = torch.zeros(tokens, rows, len(TOKENS) + 1, dtype=torch.float64)
    others = [torch.zeros(rows, 1, dtype=torch.int64), numbers[0].clone(), torch.zeros(rows, 3, dtype=torch.int64)]
    return Draft(*wide, *numbers, *others, sums)


def inputs_of(rows: int, size: int) -> DraftInputs:
    """As columns of one array; the last token of some rows may go on."""
    sorted_ = ByteSortedVocabulary(TOKENS)
    whole = torch.zeros(rows, LIMIT + 20, dtype=torch.int64)
    for row in range(rows):
        token = (257, 97, 261, 256)[row % 4]
        lo, hi = sorted_.range(TOKENS[token])
        longer = int(sorted_.bounds(lo, hi, len(TOKENS[token]))[1])
        ends = torch.tensor([3, token, lo, longer, hi, len(TOKENS[token]), LIMIT - 3 * row, 5])
        whole[row, :8] = ends
    floats = whole[:, 8:].view(torch.float64)
    floats.copy_(torch.rand(rows, LIMIT + 12))
    floats[:, LIMIT + 2] = 0.8
    return DraftInputs(
        whole[:, :1], whole[:, 1:6], whole[:, 6:7], whole[:, 7:8],
        floats[:, : LIMIT + 1], floats[:, LIMIT + 1 : LIMIT + 2], floats[:, LIMIT + 2 : LIMIT + 3],
    )  # fmt: skip


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_draft(greedy: bool, rows: int) -> None:
    """Token after token, and what each was drawn from."""
    tables, mine, theirs = vocabulary(), draft_of(rows), draft_of(rows)
    behind, inputs = torch.randn(rows, 5, len(TOKENS)) * 3, inputs_of(rows, len(TOKENS))
    behind[:, :, 256:] += 6  # longer tokens are likely
    triton.begin_draft_(behind, inputs, tables, mine, greedy)
    definition.begin_draft_reference(behind, inputs, tables, theirs, greedy)
    logits = behind
    for number in range(5):
        triton.draw_token_(logits, inputs, tables, mine, number == 0, greedy)
        definition.draw_token_reference(logits, inputs, tables, theirs, number == 0, greedy)
        for name in ("count", "live", "drawn", "next", "keep", "first"):
            assert torch.equal(mine._asdict()[name], theirs._asdict()[name]), name
        logits = torch.randn(rows, 1, len(TOKENS)) * 3
        logits[:, :, 256:] += 6
    assert mine.count.max() > 5
    for row, count in enumerate(mine.count.tolist()):
        for ours, others in zip(mine[:3], theirs[:3], strict=True):
            assert torch.equal(ours[row, :count], others[row, :count])
    if not greedy:
        assert (mine.sums[:5] - theirs.sums[:5]).abs().max() <= EXACT


@pytest.mark.parametrize("kind", ["greedy", "sure", "drawn"])
@pytest.mark.parametrize("seed", range(4))
def test_a_decision(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    rows, length = 3, (8, 16)[seed % 2]
    tables, draft = vocabulary(), draft_of(rows)
    inputs = inputs_of(rows, len(TOKENS))
    behind = torch.randn(rows, 5, len(TOKENS)) * 2
    definition.begin_draft_reference(behind, inputs, tables, draft, False)
    for number in range(5):
        definition.draw_token_reference(behind, inputs, tables, draft, number == 0, False)
    text = draft.text[:, : length - 1]
    logits = torch.randn(rows, length, 256)
    chance = torch.rand(rows, length - 1) < (0.5 + 0.15 * seed)
    logits[:, :-1].scatter_add_(2, text[..., None], 9.0 * chance[..., None])  # most drafted bytes are likely
    if seed == 3:
        logits[1, 0, 5] = float("nan")
    numbers = torch.rand(rows, 2 * LIMIT + 4, dtype=torch.float64)
    numbers[:, -1] = 0.7
    active = torch.ones(rows, LIMIT * 2 + 4, dtype=torch.int64)[:, :1]
    active[2] = 0
    told = VerdictInputs(active, numbers[:, : LIMIT + 1], numbers[:, LIMIT + 1 : -1], numbers[:, -1:])
    drawn = (draft, tables) if kind == "drawn" else (None, None)
    found = []
    for decide in (triton.decide_, definition.decide_reference):
        verdicts = Verdicts(torch.zeros(rows, LIMIT + 5, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))
        count = draft.count.clamp_max(length - 1)
        decide(logits, text, count, *drawn, told, verdicts, kind == "greedy")
        found.append(verdicts)
    broken = found[1].result[:, 3] > 0
    assert broken[1] == (seed == 3)
    assert torch.equal(found[0].result[:, [0, 2, 3, 4]], found[1].result[:, [0, 2, 3, 4]])
    assert torch.equal(found[0].result[~broken], found[1].result[~broken])
    assert torch.equal(found[0].keep, found[1].keep) and found[0].keep[2] == 0


def test_running_sums_never_step_back():
    """Also where most tokens have next to no mass: what lies between two equal sums is never drawn."""
    torch.manual_seed(1)
    for _ in range(12):
        mine, inputs = draft_of(1), inputs_of(1, len(TOKENS))
        inputs.temperature.fill_(0.15)
        mine.first.copy_(torch.tensor([[0, len(TOKENS), 0]]))
        triton.draw_token_(torch.randn(1, 5, len(TOKENS)) * 3, inputs, vocabulary(), mine, True, False)
        steps = mine.sums[0, 0].diff()
        assert steps.min() >= 0 and (steps == 0).any() and mine.sums[0, 0, -1] == 1
