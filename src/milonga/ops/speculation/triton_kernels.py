"""Triton kernels of speculative decoding between its passes: a program for each row, sums of probability in fp64.

Letters: B rows, V tokens, L bytes of a draft, M tokens of a draft, T = L + 1 bytes of a piece.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def everything(values):
    """The sum of a matrix."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def choose(
    row, order, sums, lo, hi, uniform, temperature, V, BLOCK: tl.constexpr, GREEDY: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """A place between lo and hi, drawn with the weights exp(logit / temperature): -> (place, whether there is none).

    KEPT writes the running sums of the probabilities, from 0, to `sums [V+1]`.
    """
    if GREEDY:
        i = tl.arange(0, BLOCK)
    else:  # lines of 8: a sum runs within lines and over them, not through all warps for every eighth of the places
        i = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = i < V
    token = tl.load(order + i, mask=inside, other=0)
    v = tl.load(row + token, mask=inside, other=float("-inf"))
    if GREEDY:
        among = tl.where((i >= lo) & (i < hi), v, float("-inf"))
        best = tl.argmax(among, 0).to(tl.int64)
        empty = lo >= hi
    else:
        scale = (1.0 / temperature).to(tl.float32) * LOG2_E
        weights = tl.where(inside, tl.exp2((v - tl.max(tl.max(v, 1), 0)) * scale), 0.0).to(tl.float64)
        # to multiples of 2^-36: sums of up to 2^16 of them are exact in any order, and never step back
        weights = (weights + 65536.0) - 65536.0
        lines = tl.sum(weights, 1)
        behind = tl.cumsum(lines, 0)
        total = tl.cumsum(weights, 1) + (behind - lines)[:, None]
        end = everything(tl.where(i == V - 1, total, 0.0))
        total = tl.where(inside, total / end, 2.0)
        if KEPT:
            tl.store(sums + 1 + i, total, mask=inside)
            tl.store(sums, end * 0.0)
        first = everything(tl.where(i == lo - 1, total, 0.0))
        last = everything(tl.where(i == hi - 1, total, 0.0))
        target = first + uniform * (last - first)
        best = everything((total <= target).to(tl.int32))
        # where the target was rounded up to the end: the last place with a mass
        best = tl.minimum(best, everything((total < last).to(tl.int32)))
        best = tl.minimum(best, V - 1).to(tl.int64)
        empty = (last > first) == 0
    return best, empty


@triton.jit
def begin_draft(
    behind, length, last, limit, end, temperature, inputs_row, order, keep, first, count, drawn, live, P, V,
    BLOCK: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """See `milonga.ops.speculation.begin_draft_`."""
    b = tl.program_id(0).to(tl.int64)
    host = b * inputs_row
    tokens = tl.load(length + host)
    token, lo = tl.load(last + host), tl.load(last + host + 1)
    longer, hi, shown = tl.load(last + host + 2), tl.load(last + host + 3), tl.load(last + host + 4)
    row = behind + (b * P + tl.maximum(tokens - 1, 0)) * V
    place, empty = choose(
        row, order, behind, lo, hi, tl.load(end + host), tl.load(temperature + host), V, BLOCK, GREEDY, False
    )
    goes_on = (longer < hi) & (empty == 0) & (tl.load(order + place) != token)
    tl.store(keep + b, tokens - goes_on.to(tl.int64))
    tl.store(first + b * 3, tl.where(goes_on, longer, 0))
    tl.store(first + b * 3 + 1, tl.where(goes_on, hi, V))
    tl.store(first + b * 3 + 2, tl.where(goes_on, shown, 0))
    tl.store(count + b, tokens * 0)
    tl.store(drawn + b, tokens * 0)
    tl.store(live + b, (tl.load(limit + host) > 0).to(tl.int64))


@triton.jit
def draw_token(
    logits, limit, tokens, dice, temperature, inputs_row, order, lengths, token_text, token_node, text, node, step,
    draft_row, count, live, drawn, next_, keep, first, sums, B, P, V, LONGEST,
    BLOCK: tl.constexpr, LB: tl.constexpr, FIRST: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """See `milonga.ops.speculation.draw_token_`."""
    b = tl.program_id(0).to(tl.int64)
    host = b * inputs_row
    done, number, most = tl.load(count + b), tl.load(drawn + b), tl.load(limit + host)
    lo, hi, shown = done * 0, done * 0 + V, done * 0
    row = logits + b * P * V
    if FIRST:
        lo, hi, shown = tl.load(first + b * 3), tl.load(first + b * 3 + 1), tl.load(first + b * 3 + 2)
        row += tl.load(keep + b) * V
    kept = sums + (number * B + b) * (V + 1)
    uniform, warmth = tl.load(dice + host + done), tl.load(temperature + host)
    place, empty = choose(row, order, kept, lo, hi, uniform, warmth, V, BLOCK, GREEDY, True)
    goes = (tl.load(live + b) > 0) & (empty == 0)
    size = tl.load(lengths + place)
    i = tl.arange(0, LB)
    at = done + i - shown
    shows = goes & (i >= shown) & (i < size) & (at < most)
    source = place * LONGEST + i
    target = b * draft_row + at
    tl.store(text + target, tl.load(token_text + source, mask=shows, other=0), mask=shows)
    tl.store(node + target, tl.load(token_node + source, mask=shows, other=0), mask=shows)
    tl.store(step + target, number + i * 0, mask=shows)
    now = tl.where(goes, tl.minimum(done + size - shown, most), done)
    tl.debug_barrier()  # every warp has read the row's counters before one of them moves them
    tl.store(count + b, now)
    tl.store(next_ + b, tl.where(empty, 0, tl.load(order + place)))
    tl.store(drawn + b, number + 1)
    more = goes & (now < most) & (number + 1 < tl.load(tokens + host))
    tl.store(live + b, more.to(tl.int64))


@triton.jit(do_not_specialize=["T"])
def decide(
    logits, text, text_row, count, count_row, node, step, draft_row, sums, bounds,
    active, accept, draw, temperature, inputs_row, result, result_row, keep, B, T, V,
    TB: tl.constexpr, GREEDY: tl.constexpr, SURE: tl.constexpr,
):  # fmt: skip
    """See `milonga.ops.speculation.decide_`."""
    b = tl.program_id(0).to(tl.int64)
    host = b * inputs_row
    t = tl.arange(0, TB)
    c = tl.arange(0, 256)
    v = tl.load(logits + (b * T + t)[:, None] * 256 + c[None, :], mask=(t < T)[:, None], other=0.0)
    looked = tl.minimum(tl.load(count + b * count_row), T - 1)
    drafted = t < looked
    byte = tl.load(text + b * text_row + t, mask=t < T - 1, other=0)
    unknown = tl.sum((v != v).to(tl.int32), 1) > 0
    v = tl.where(v != v, 0.0, v)
    top = tl.max(v, 1)
    bad = unknown | (tl.abs(top) == float("inf"))
    drafted = drafted & (bad == 0)
    if GREEDY:
        best = tl.argmax(v, 1).to(tl.int64)
        stands = drafted & (best == byte)
        stood = tl.min(tl.where(stands, TB, t), 0).to(tl.int64)
        own = tl.sum(tl.where(t == stood, best, 0), 0)
    else:
        scale = 1.0 / tl.load(temperature + host)
        p = tl.exp((v.to(tl.float64) - top.to(tl.float64)[:, None]) * scale)
        p = p / tl.sum(p, 1)[:, None]
        there = tl.sum(tl.where(c[None, :] == byte[:, None], p, 0.0), 1)
        q = tl.where(t < 0, 0.0, 1.0).to(tl.float64)
        if not SURE:
            at = tl.load(node + b * draft_row + t, mask=drafted, other=0) * 257
            base = sums + (tl.load(step + b * draft_row + t, mask=drafted, other=0) * B + b) * (V + 1)
            upper = tl.load(base + tl.load(bounds + at + byte + 1, mask=drafted, other=0), mask=drafted, other=1.0)
            lower = tl.load(base + tl.load(bounds + at + byte, mask=drafted, other=0), mask=drafted, other=0.0)
            whole = tl.load(base + tl.load(bounds + at + 256, mask=drafted, other=0), mask=drafted, other=1.0)
            none = tl.load(base + tl.load(bounds + at, mask=drafted, other=0), mask=drafted, other=0.0)
            q = (upper - lower) / (whole - none)
        stands = drafted & (tl.load(accept + host + t, mask=drafted, other=0.0) * q < there)
        stood = tl.min(tl.where(stands, TB, t), 0).to(tl.int64)
        fell = stood < looked
        here = tl.sum(tl.where((t == stood)[:, None], p, 0.0), 0)
        if SURE:
            shares = (c == tl.sum(tl.where(t == stood, byte, 0), 0)).to(tl.float64)
        else:
            at = tl.load(node + b * draft_row + stood, mask=fell, other=0) * 257
            base = sums + (tl.load(step + b * draft_row + stood, mask=fell, other=0) * B + b) * (V + 1)
            upper = tl.load(base + tl.load(bounds + at + 1 + c, mask=fell, other=0), mask=fell, other=0.0)
            lower = tl.load(base + tl.load(bounds + at + c, mask=fell, other=0), mask=fell, other=0.0)
            whole = tl.load(base + tl.load(bounds + at + 256, mask=fell, other=0), mask=fell, other=1.0)
            none = tl.load(base + tl.load(bounds + at, mask=fell, other=0), mask=fell, other=0.0)
            shares = (upper - lower) / (whole - none)
        rest = tl.maximum(here - shares, 0.0)
        weights = tl.where(fell & (tl.max(rest, 0) > 0.0), rest, here)
        total = tl.cumsum(weights, 0)
        end = tl.sum(tl.where(c == 255, total, 0.0), 0)
        target = tl.load(draw + host + stood) * end
        own = tl.minimum(tl.sum((total <= target).to(tl.int64), 0), tl.sum((total < end).to(tl.int64), 0))
        own = tl.minimum(own, 255)
    broken = tl.sum((bad & (t <= stood)).to(tl.int64), 0) > 0
    facts = result + b * result_row
    tl.store(facts, stood)
    tl.store(facts + 1, own)
    tl.store(facts + 2, stood * 0)
    tl.store(facts + 3, broken.to(tl.int64))
    tl.store(facts + 4, looked)
    tl.store(facts + 5 + t, byte, mask=t < T - 1)
    tl.store(keep + b, (stood + 1) * tl.load(active + host))
