"""Which bytes of a draft stand: the three rules of speculative decoding.

Each rule reads the verifier's logits before every drafted byte, and behind the last, and says how many drafted bytes
stand and which byte of the verifier's own comes behind them.

`exact` is rejection sampling (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023; Chen
et al., 2023), byte by byte. Let p be the verifier's distribution of the next byte and q the distribution that the
drafted byte was really drawn from, both given all that came before, the drafter's own dice included. The byte b stands
with probability min(1, p(b) / q(b)); else a byte is drawn from max(p - q, 0), normalised. Then, for every byte c,

    P(c) = q(c) min(1, p(c) / q(c)) + P(some byte falls) * max(p(c) - q(c), 0) / sum max(p - q, 0) = p(c)

because a byte falls with probability sum max(q - p, 0) = sum max(p - q, 0). As this holds given every past, the text
has the verifier's distribution, whatever the drafter does; a drafter only decides how often bytes stand.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float64

from milonga.inference.sampling import Sampler, pick

Rule = Literal["exact", "greedy", "top_k"]
RULES: tuple[Rule, ...] = ("exact", "greedy", "top_k")

# Logits of a byte read in a piece and of the same byte read in single steps differ by rounding: over the models of the
# tests, Mamba, windows and full attention alike, by at most 7.4e-7 of the largest logit in fp32, and 1.7e-6 for the
# trained demo model; twice that between two of them. Where the two best are closer than this share of the largest, the
# piece alone cannot tell which is first.
TIE_FP32 = 1e-5
TIE_FP64 = 1e-13

# Uniform numbers come from (position, lane); plain sampling uses lane 0, and so does a byte that replaces a drafted one
LANE_ACCEPT, LANE_DRAFT, LANE_END = 1, 2, 3


class RowDraft(Protocol):
    """The drafted bytes of one row, and what they were drawn from."""

    @property
    def text(self) -> bytes: ...

    def probability(self, index: int) -> float:
        """q of drafted byte `index`, given everything before it: above 0."""
        ...

    def distribution(self, index: int) -> Float64[np.ndarray, "256"]:
        """q of all 256 bytes at that place."""
        ...


class Decision(NamedTuple):
    """What became of one row's draft."""

    accepted: int  # drafted bytes that stand
    byte: int | None  # the verifier's own byte behind them; None: undecided, to be redone by a single step


Accept = Callable[[Float[np.ndarray, "T V"], RowDraft, int, Sampler], Decision]
"""A rule at work: (logits before each drafted byte and behind the last; the draft; how many of its bytes to look at;
the row's sampler, which goes on behind every byte that is decided) -> what became of it."""


def accept_exact(logits: Float[np.ndarray, "T V"], draft: RowDraft, count: int, sampler: Sampler) -> Decision:
    """An `Accept`: rejection sampling. The text has the distribution that the sampler draws from."""
    for index in range(count):
        byte, p = draft.text[index], sampler.probabilities(logits[index])
        if sampler.uniform(LANE_ACCEPT) * draft.probability(index) >= p[byte]:
            rest = np.maximum(p - draft.distribution(index), 0.0)
            # all zero only where p and q agree up to rounding: then the fall was a rounding error too
            own = pick(rest if rest.any() else p, sampler.uniform())
            sampler.accept(own)
            return Decision(index, own)
        sampler.accept(byte)
    return Decision(count, sampler.draw(logits[count]))


def accept_top_k(top: int) -> Accept:
    """Lossy: drafted bytes stand while they are among the verifier's `top` likeliest. After MambaByte (Wang et al.,
    2024), section 4, but for the bytes behind a correction: the paper's verifier goes on alone to the next word,
    because its drafter cannot resume inside a token, and here it can.
    """

    def accept(logits: Float[np.ndarray, "T V"], draft: RowDraft, count: int, sampler: Sampler) -> Decision:
        for index in range(count):
            row, byte = logits[index], draft.text[index]
            if int((row > row[byte]).sum()) >= top or sampler.probabilities(row)[byte] == 0:
                return Decision(index, sampler.draw(row))
            sampler.accept(byte)
        return Decision(count, sampler.draw(logits[count]))

    return accept


def accept_greedy(share: float) -> Accept:
    """Drafted bytes stand as long as they are the likeliest. The sampler's temperature is 0.

    Undecided where another byte wins once the best logit is lowered by `share` of the largest: `TIE_FP32` or another; 0
    decides always.
    """

    def accept(logits: Float[np.ndarray, "T V"], draft: RowDraft, count: int, sampler: Sampler) -> Decision:
        for index in range(count + 1):
            best = int(sampler.probabilities(logits[index]).argmax())
            if share > 0 and not _clear(logits[index], best, share, sampler):
                return Decision(index, None)
            sampler.accept(best)
            if index == count or best != draft.text[index]:
                return Decision(index, best)
        raise AssertionError("the last index always decides")

    return accept


def _clear(logits: Float[np.ndarray, " V"], best: int, share: float, sampler: Sampler) -> bool:
    lowered = logits.astype(np.float64)
    lowered[best] -= share * float(np.abs(lowered[np.isfinite(lowered)]).max())
    return int(sampler.probabilities(lowered).argmax()) == best
