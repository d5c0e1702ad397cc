"""The definitions of drafting and deciding on a device, in plain PyTorch. Nothing is read back."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor


class Vocabulary(NamedTuple):
    """V tokens sorted by their bytes. Tokens that begin with the same bytes stand together, in a range of places."""

    order: Tensor  # int64 [V], ids by place
    lengths: Tensor  # int64 [V], bytes of the token at each place
    text: Tensor  # int64 [V longest], its bytes
    node: Tensor  # int64 [V longest]: of each of its bytes a row of `bounds`
    bounds: Tensor  # int32 [N 257]: places bounds[n, b]..bounds[n, b + 1] hold the tokens that go on with byte b


class DraftInputs(NamedTuple):
    """What the host says of a draft of B rows; columns of one array."""

    length: Tensor  # int64 [B 1], tokens that were read again
    last: Tensor  # int64 [B 5]: the last of them; its range's begin, that of longer ones, its end; its bytes
    limit: Tensor  # int64 [B 1], bytes at most
    tokens: Tensor  # int64 [B 1], tokens at most
    dice: Tensor  # float64 [B L+1], uniform numbers by the draft's bytes before the token
    end: Tensor  # float64 [B 1], one that decides whether the last token goes on
    temperature: Tensor  # float64 [B 1]


class Draft(NamedTuple):
    """A draft of B rows in progress. Column L of the first three is never read."""

    text: Tensor  # int64 [B L+1]
    node: Tensor  # int64 [B L+1], of each byte, see `Vocabulary`
    step: Tensor  # int64 [B L+1], and which of the drawn tokens it belongs to
    count: Tensor  # int64 [B]
    live: Tensor  # int64 [B], 1 where more is to be drawn
    drawn: Tensor  # int64 [B], tokens drawn so far
    next: Tensor  # int64 [B 1], the token drawn last
    keep: Tensor  # int64 [B], tokens read again that have ended
    first: Tensor  # int64 [B 3]: the range that the first token is drawn from, and its bytes that stand in the text
    sums: Tensor  # float64 [M B V+1], running sums of probability that each token was drawn from; none if greedy


class VerdictInputs(NamedTuple):
    """What the host says of a verification of B rows; columns of one array."""

    active: Tensor  # int64 [B 1], 0 for rows that are through and do not move
    accept: Tensor  # float64 [B L+1], uniform numbers to accept drafted bytes with
    draw: Tensor  # float64 [B L+1], and to draw the byte behind them
    temperature: Tensor  # float64 [B 1]


class Verdicts(NamedTuple):
    """What became of the drafts of B rows."""

    result: Tensor  # int64 [B L+5]: bytes that stand; the byte behind; 1 if that is undecided; 1 if logits that decided
    # are not finite; bytes drafted; and the draft
    keep: Tensor  # int64 [B], bytes of the piece behind which the row is to stand


def draw_ranks(
    ordered: Float[Tensor, "B V"],
    bounds: Int[Tensor, "B 2"],
    temperature: Float64[Tensor, " B"] | None,
    uniform: Float64[Tensor, " B"],
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"], Float64[Tensor, "B V+1"] | None]:
    """A place of the sorted vocabulary for each row, between two bounds; nothing is read back.

    Args:
        ordered: logits in the order of the sorted vocabulary.
        bounds: `[lo, hi)` of what may be drawn.
        temperature: of each row; None takes the likeliest.
        uniform: from 0 to below 1.

    Returns:
        The places; where there was no mass to draw from; and the running sums that were drawn from, from 0.
    """
    size = ordered.shape[1]
    if temperature is None:
        rank = torch.arange(size, device=ordered.device)
        outside = (rank < bounds[:, :1]) | (rank >= bounds[:, 1:])
        return ordered.masked_fill(outside, -torch.inf).argmax(1), bounds[:, 0] >= bounds[:, 1], None
    weights = torch.softmax(ordered.double() / temperature[:, None], 1)
    total = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
    edges = total.gather(1, bounds)
    targets = edges[:, :1] + uniform[:, None] * (edges[:, 1:] - edges[:, :1])
    steps = total[:, 1:].contiguous()
    ranks = torch.searchsorted(steps, targets, right=True)
    # where the target was rounded up to the end: the last place with a mass
    ranks = torch.minimum(ranks, torch.searchsorted(steps, edges[:, 1:].contiguous()))
    return ranks[:, 0].clamp(0, size - 1), ~(edges[:, 1] > edges[:, 0]), total


def _ranks(
    logits: Tensor, lo: Tensor, hi: Tensor, uniform: Tensor, inputs: DraftInputs, vocabulary: Vocabulary, greedy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    temperature = None if greedy else inputs.temperature[:, 0]
    ordered = logits.index_select(1, vocabulary.order)
    return draw_ranks(ordered, torch.stack([lo, hi], 1), temperature, uniform)


def begin_draft_reference(
    behind: Float[Tensor, "B P V"], inputs: DraftInputs, vocabulary: Vocabulary, draft: Draft, greedy: bool
) -> None:
    """As `milonga.ops.speculation.begin_draft_`."""
    length, (last, lo, longer, hi, shown) = inputs.length[:, 0], inputs.last.unbind(1)
    rows = torch.arange(len(length), device=length.device)
    before = behind[rows, (length - 1).clamp_min(0)]
    ranks, empty, _ = _ranks(before, lo, hi, inputs.end[:, 0], inputs, vocabulary, greedy)
    goes_on = (longer < hi) & ~empty & (vocabulary.order[ranks] != last)
    whole = torch.zeros_like(draft.first)
    whole[:, 1] = behind.shape[2]
    draft.keep.copy_(length - goes_on.long())
    draft.first.copy_(torch.where(goes_on[:, None], torch.stack([longer, hi, shown], 1), whole))
    draft.count.zero_()
    draft.drawn.zero_()
    draft.live.copy_((inputs.limit[:, 0] > 0).long())


def draw_token_reference(
    logits: Float[Tensor, "B P V"],
    inputs: DraftInputs,
    vocabulary: Vocabulary,
    draft: Draft,
    first: bool,
    greedy: bool,
) -> None:
    """As `milonga.ops.speculation.draw_token_`."""
    limit, count, size = inputs.limit[:, 0], draft.count, logits.shape[2]
    rows, longest = torch.arange(len(count), device=count.device), vocabulary.text.shape[1]
    none = torch.zeros_like(count)
    lo, hi, shown = draft.first.unbind(1) if first else (none, none + size, none)
    uniform = inputs.dice.gather(1, count[:, None])[:, 0]
    at = draft.keep if first else none
    ranks, empty, total = _ranks(logits[rows, at], lo, hi, uniform, inputs, vocabulary, greedy)
    if total is not None:
        draft.sums[draft.drawn, rows] = total
    live, lengths = (draft.live > 0) & ~empty, vocabulary.lengths[ranks]
    index = torch.arange(longest, device=count.device)
    place = count[:, None] + index - shown[:, None]
    shows = live[:, None] & (index >= shown[:, None]) & (index < lengths[:, None]) & (place < limit[:, None])
    place = torch.where(shows, place, draft.text.shape[1] - 1)
    draft.text.scatter_(1, place, vocabulary.text[ranks])
    draft.node.scatter_(1, place, vocabulary.node[ranks])
    draft.step.scatter_(1, place, draft.drawn[:, None].expand_as(place))
    count.copy_(torch.where(live, torch.minimum(count + lengths - shown, limit), count))
    draft.next[:, 0].copy_(vocabulary.order[ranks].masked_fill(empty, 0))
    draft.drawn.add_(1)
    draft.live.copy_((live & (count < limit) & (draft.drawn < inputs.tokens[:, 0])).long())


def conditionals(
    draft: Draft, vocabulary: Vocabulary, length: int
) -> tuple[Float64[Tensor, "B L"], Float64[Tensor, "B L 256"]]:
    """q of the first `length` drafted bytes of each row, and of all 256 bytes at their places; what lies behind the
    draft is arbitrary."""
    size, rows = draft.sums.shape[2], torch.arange(len(draft.count), device=draft.count.device)
    bounds = vocabulary.bounds[draft.node[:, :length]].long()
    first = (draft.step[:, :length] * len(rows) + rows[:, None]) * size
    sums = draft.sums.flatten()[first[..., None] + bounds]
    shares = sums.diff(dim=-1) / (sums[..., -1:] - sums[..., :1])
    return shares.gather(2, draft.text[:, :length, None])[..., 0], shares


def sure_conditionals(text: Int[Tensor, "B L"]) -> tuple[Float64[Tensor, "B L"], Float64[Tensor, "B L 256"]]:
    """Of a draft without dice: all on the drafted byte."""
    shares = (text[..., None] == torch.arange(256, device=text.device)).double()
    return torch.ones_like(text, dtype=torch.float64), shares


def decide_greedy(
    logits: Float[Tensor, "B T V"], text: Int[Tensor, "B L"], count: Int[Tensor, " B"], share: float
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Drafted bytes stand as long as they are the likeliest: -> (how many, the byte behind, whether it is undecided:
    another wins once the best logit is lowered by `share` of the largest)."""
    best = logits.argmax(-1)
    stands = (best[:, :-1] == text) & (torch.arange(text.shape[1], device=text.device) < count[:, None])
    clear = torch.ones_like(best, dtype=torch.bool)
    if share > 0:
        wide = logits.double()
        largest = wide.abs().masked_fill(~wide.isfinite(), 0.0).amax(-1, keepdim=True)
        lowered = wide.scatter_add(2, best[..., None], -share * largest)
        clear = lowered.argmax(-1) == best
        stands = stands & clear[:, :-1]
    accepted = stands.long().cumprod(1).sum(1)
    at = accepted[:, None]
    return accepted, best.gather(1, at)[:, 0], ~clear.gather(1, at)[:, 0]


def decide_exact(
    p: Float64[Tensor, "B T 256"],
    text: Int[Tensor, "B L"],
    count: Int[Tensor, " B"],
    q: Float64[Tensor, "B L"],
    shares: Float64[Tensor, "B L 256"],
    accept: Float64[Tensor, "B M"],
    draw: Float64[Tensor, "B M"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Rejection sampling: -> (drafted bytes that stand, the byte behind them).

    Args:
        p: the verifier's distribution before each drafted byte and behind the last.
        text, count: the draft, and how many of its bytes are looked at.
        q, shares: of each drafted byte and of all 256 at its place.
        accept, draw: uniform numbers, to accept with and to draw a byte of the verifier's own.
    """
    rows, length = torch.arange(text.shape[0], device=text.device), text.shape[1]
    there = p[:, :length].gather(2, text[..., None])[..., 0]
    stands = (accept[:, :length] * q < there) & (torch.arange(length, device=text.device) < count[:, None])
    accepted = stands.long().cumprod(1).sum(1)
    at = p[rows, accepted]
    rest = (at - shares[rows, accepted.clamp_max(length - 1)]).clamp_min(0.0)
    fell = (accepted < count) & (rest > 0).any(1)
    own = pick(torch.where(fell[:, None], rest, at), draw.gather(1, accepted[:, None])[:, 0])
    return accepted, own


def pick(weights: Float64[Tensor, "B V"], uniform: Float64[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The id at which the cumulative sum passes a share `uniform` of its total; never one of weight 0."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    index = (cumulative <= uniform[:, None] * total).sum(-1)
    last = (cumulative < total).sum(-1)  # the first id at which the whole sum is reached
    return torch.minimum(index, last)


def write_verdicts(
    logits: Float[Tensor, "B T V"],
    text: Int[Tensor, "B L"],
    count: Int[Tensor, " B"],
    accepted: Int[Tensor, " B"],
    own: Int[Tensor, " B"],
    undecided: Int[Tensor, " B"],
    inputs: VerdictInputs,
    verdicts: Verdicts,
) -> None:
    """Put down what was decided."""
    length = logits.shape[1]
    looked_at = torch.arange(length, device=text.device) <= accepted[:, None]
    broken = (looked_at & ~logits.amax(2).isfinite()).any(1).long()
    verdicts.keep.copy_((accepted + 1 - undecided) * inputs.active[:, 0])
    facts = torch.stack([accepted, own, undecided, broken, count], 1)
    verdicts.result[:, : 4 + length].copy_(torch.cat([facts, text], 1))


def decide_reference(
    logits: Float[Tensor, "B T V"],
    text: Int[Tensor, "B L"],
    count: Int[Tensor, " B"],
    draft: Draft | None,
    vocabulary: Vocabulary | None,
    inputs: VerdictInputs,
    verdicts: Verdicts,
    greedy: bool,
) -> None:
    """As `milonga.ops.speculation.decide_`."""
    if greedy:
        accepted, own, _ = decide_greedy(logits, text, count, 0.0)
    else:
        scores = logits.double()
        scores = (scores - scores.amax(-1, keepdim=True)) / inputs.temperature[..., None]
        p = torch.softmax(scores, -1)
        sure = draft is None or vocabulary is None
        q, shares = sure_conditionals(text) if sure else conditionals(draft, vocabulary, text.shape[1])
        accepted, own = decide_exact(p, text, count, q, shares, inputs.accept, inputs.draw)
    write_verdicts(logits, text, count, accepted, own, torch.zeros_like(own), inputs, verdicts)
