"""A language model that drafts: of subwords or of bytes, for a verifier that reads bytes.

The drafter writes tokens, the verifier judges bytes. What makes the two meet exactly is that every drafted byte comes
with the probability q that it was really drawn with. A token t is drawn from the drafter's prediction, restricted to
the tokens that begin with the bytes w of a token that is not at its end yet (w may be empty) and are longer, and is
then revealed byte by byte. So given the tokens so far, the bytes revealed, and that the token goes on behind them,

    q(b) = mass of the tokens that begin with w + b / mass of the tokens that begin with w and are longer

With the vocabulary sorted by bytes both are differences of one running sum (`ByteSortedVocabulary`). No sum over the
ways to cut a text into tokens is needed: the drafter goes one way, and q is its conditional on that way.

After the verifier has spoken the text may end inside a token, or behind bytes that no token begins with. The last bytes
are cut into tokens anew, and the last token may be open: whether it ends there or is only the beginning of a longer one
is drawn from the prediction before it. That is again the drafter's own choice, made before the bytes that depend on it.
Bytes of a token that the verifier did not get to see are forgotten, and drawn again.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from milonga.data.byte_trie import ByteSortedVocabulary
from milonga.errors import UserError
from milonga.inference.acceptance import LANE_DRAFT, LANE_END, RowDraft
from milonga.inference.drafters import Dice, SureDraft
from milonga.inference.language_model import LanguageModel
from milonga.inference.runner import NetworkRunner, Runner
from milonga.layers.base import Trace
from milonga.models.network import NetworkState
from milonga.ops.speculation import draw_ranks
from milonga.state import clone, merge

_PIECE = 256  # tokens of a prompt that are read at once
_LAST = 64  # bytes of a prompt that stay open to being cut into tokens anew, where no white space comes before
_SETTLE = 4  # tokens that are read again in every round before the state moves on behind them
_KEPT = 8  # tokens that stay open where no white space comes
_WORD = 32  # tokens of the last word, at most, that stay open
_USUAL = 3.5  # bytes of a token
_WARMER = 1.5  # times the temperature of the bytes, as long as that is below 1, for tokens of several bytes
_WHITE = b" \n\r\t"


class ModelDrafter:
    """Drafts with a language model whose tokens stand for bytes, each byte being a token too.

    Args:
        model: of subwords or bytes, smaller than the verifier.
        runner: runs its network; None for the plain one.

    Raises:
        UserError: if its tokens cannot stand for every text of bytes.
    """

    def __init__(self, model: LanguageModel, runner: Runner | None = None):
        self.tokens = list(model.codec.token_bytes)
        if not all(self.tokens) or not {bytes([byte]) for byte in range(256)} <= set(self.tokens):
            raise UserError(
                f"drafter {model.path or 'in memory'}: its tokens do not stand for bytes (some are empty, or some of "
                "the 256 bytes are missing), so it cannot draft for a model of bytes"
            )
        self.model = model
        self.runner = runner or NetworkRunner(model.network)
        self.vocabulary = ByteSortedVocabulary(self.tokens)
        self.order = torch.from_numpy(self.vocabulary.order).to(model.device)
        self.places = lru_cache(maxsize=1 << 14)(self._places)
        self.edges = lru_cache(maxsize=1 << 14)(self._edges)

    def start(self, texts: Sequence[bytes]) -> "ModelStream":
        """As `Drafter.start`: reads the texts, in pieces."""
        return ModelStream(self, texts)

    def temperature(self, wanted: float) -> float:
        """What tokens are drawn with for bytes that the verifier draws with the temperature `wanted`.

        Bytes below temperature 1 are sharpened each for itself, after the tokens that go on with them were added up.
        Tokens that are sharpened one by one give bytes that are too sure: of a pair on English text 71.5 % stood at
        0.8, and 73.7 % with tokens at 1; at 0.5 70.6 %, and 73.4 % with tokens at 0.75.
        """
        return wanted if self.vocabulary.longest == 1 else max(wanted, min(_WARMER * wanted, 1.0))

    def _places(self, prefix: bytes) -> tuple[int, int, int]:
        """(lo, longer, hi): lo..longer of the sorted vocabulary is the token that is the prefix itself, longer..hi are
        those that go on."""
        lo, hi = self.vocabulary.range(prefix)
        return lo, int(self.vocabulary.bounds(lo, hi, len(prefix))[1]) if lo < hi else lo, hi

    def _edges(self, token: int) -> list[tuple[int, int, int]]:
        """`places` of the first 0, 1, ... bytes of a token."""
        text = self.tokens[token]
        return [self.places(text[:length]) for length in range(len(text) + 1)]


class _Place(NamedTuple):
    """Where a drafted byte was drawn from."""

    step: int  # which of the draft's running sums
    depth: int  # bytes of the token before it
    longer: int  # longer..hi of the sorted vocabulary begin with these and go on
    hi: int
    child_lo: int  # child_lo..child_hi of them with the drafted byte
    child_hi: int


class ModelDraft:
    """The `RowDraft` of a model: the bytes, and the running sums they were drawn from."""

    def __init__(self, row: int, sums: Sequence[Float64[Tensor, "B V+1"]], vocabulary: ByteSortedVocabulary):
        self.text = b""
        self.places: list[_Place] = []
        self.q: Float64[np.ndarray, " bytes"] = np.empty(0)
        self._row, self._sums, self._vocabulary = row, sums, vocabulary

    def add(self, step: int, token: bytes, edges: Sequence[tuple[int, int, int]], shown: int) -> None:
        """A step drew a token of which `shown` bytes stood in the text before; the others follow."""
        self.text += token[shown:]
        for depth in range(shown, len(token)):
            _, longer, hi = edges[depth]
            child_lo, _, child_hi = edges[depth + 1]
            self.places.append(_Place(step, depth, longer, hi, child_lo, child_hi))

    def cut(self, limit: int) -> None:
        """Forget what lies behind `limit` bytes."""
        self.text, self.places = self.text[:limit], self.places[:limit]

    def probability(self, index: int) -> float:
        """As `RowDraft.probability`."""
        return float(self.q[index])

    def distribution(self, index: int) -> Float64[np.ndarray, "256"]:
        """As `RowDraft.distribution`."""
        place = self.places[index]
        sums = self._sums[place.step][self._row].cpu().numpy()
        _, masses = self._vocabulary.next_byte_masses(sums, place.longer, place.hi, place.depth)
        return masses / (sums[place.hi] - sums[place.longer])


class ModelStream:
    """The `DraftStream` of `ModelDrafter`.

    Keeps a state behind all but the last tokens of each text. Every round reads those few again, in one piece: what the
    verifier changed is in them, and the state needs no copies to go back to.

    Attributes:
        state: of the network, B rows, behind what is settled.
        behind: `[B V]`, the prediction there.
    """

    def __init__(self, drafter: ModelDrafter, texts: Sequence[bytes]):
        self._drafter, self._runner = drafter, drafter.runner
        self._device = drafter.model.device
        heads = [_settled(text) for text in texts]
        self._tails = [text[len(head) :] for text, head in zip(texts, heads, strict=True)]
        rows = [self._read(head) for head in heads]
        self._lengths = [length for _, _, length in rows]  # tokens of each text that the state stands behind
        self._bytes = [len(head) for head in heads]  # and their bytes
        with torch.inference_mode():
            self.state: NetworkState = merge([state for state, _, _ in rows]) if len(rows) > 1 else rows[0][0]
            self.behind = torch.cat([logits for _, logits, _ in rows])

    @torch.inference_mode()
    def _read(self, text: bytes) -> tuple[NetworkState, Float[Tensor, "1 V"], int]:
        """-> (the state behind the text, the prediction there, its tokens)."""
        network = self._drafter.model.network
        state = network.init_state(1)
        logits = torch.zeros(1, network.config.vocab_size, device=self._device)
        ids = torch.from_numpy(self._drafter.model.codec.encode(text).astype(np.int64)).to(self._device)
        for start in range(0, len(ids), _PIECE):
            output = network(ids[None, start : start + _PIECE], state, logits="last")
            state, logits = output.state, output.logits
        return state, logits, len(ids)

    @property
    def token_bytes(self) -> list[float]:
        """As `DraftStream.token_bytes`; of a short text what is usual."""
        if self._drafter.vocabulary.longest == 1:
            return [1.0] * len(self._tails)
        few = _KEPT * _USUAL
        return [(read + few) / (count + _KEPT) for read, count in zip(self._bytes, self._lengths, strict=True)]

    def extend(self, written: Sequence[bytes]) -> None:
        """As `DraftStream.extend`."""
        self._tails = [tail + more for tail, more in zip(self._tails, written, strict=True)]

    @torch.inference_mode()
    def draft(self, limit: int, temperature: float, dice: Sequence[Dice]) -> Sequence[RowDraft]:
        """As `DraftStream.draft`."""
        state, logits, open_, settle = self._catch_up(limit, temperature, dice)
        sums: list[Tensor] = []
        drafts = [ModelDraft(row, sums, self._drafter.vocabulary) for row in range(len(self._tails))]
        stuck = [False] * len(drafts)
        while True:
            places = [self._drafter.places(prefix) for prefix in open_]
            throws = [die(len(draft.text), LANE_DRAFT) for die, draft in zip(dice, drafts, strict=True)]
            tokens = self._draw(logits, places, temperature, throws, sums)
            for row, (draft, token) in enumerate(zip(drafts, tokens, strict=True)):
                stuck[row] = stuck[row] or token < 0
                if not stuck[row] and len(draft.text) < limit:
                    draft.add(len(sums) - 1, self._drafter.tokens[token], self._drafter.edges(token), len(open_[row]))
            if all(done or len(draft.text) >= limit for done, draft in zip(stuck, drafts, strict=True)):
                break
            open_ = [b""] * len(drafts)
            step = torch.tensor(tokens, dtype=torch.int64).clamp_min(0).to(self._device)
            logits, state = self._runner.step(step[:, None], state)
        settle()  # not before: its commit may take the buffers of `state`
        for draft in drafts:
            draft.cut(limit)
        if temperature == 0:
            return [SureDraft(draft.text) for draft in drafts]
        self._weigh(drafts, sums)
        return drafts

    def _catch_up(
        self, limit: int, temperature: float, dice: Sequence[Dice]
    ) -> tuple[NetworkState, Float[Tensor, "B V"], list[bytes], Callable[[], None]]:
        """Read the last tokens: -> (the state behind those that have ended, the prediction there, the bytes of the
        token that has not, what moves on behind tokens that are settled). Up to `limit` steps follow."""
        rows, tails = range(len(self._tails)), self.tail_ids()
        behind, trace = self._read_again(tails, limit)  # a step gives a byte or more
        lasts = [self._drafter.tokens[tail[-1]] if tail else b"" for tail in tails]
        before = behind[list(rows), [max(len(tail) - 1, 0) for tail in tails]]
        open_ = self._open(lasts, before, temperature, dice)
        keep = [len(tail) - bool(prefix) for tail, prefix in zip(tails, open_, strict=True)]
        state = self._runner.commit(self.state, trace, keep)
        return state, behind[list(rows), keep], open_, partial(self._settle, tails, behind, trace)

    def _read_again(self, tails: list[list[int]], room: int = 0) -> tuple[Float[Tensor, "B T V"], tuple[Trace, ...]]:
        """Read the last tokens, with room for so many steps behind them: -> (the predictions from before them on, the
        trace)."""
        longest = max(map(len, tails))
        self._runner.ensure(max(length + len(tail) for length, tail in zip(self._lengths, tails, strict=True)) + room)
        padded = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], dtype=torch.int64)
        logits, trace = self._runner.verify(padded.to(self._device), self.state)
        return torch.cat([self.behind[:, None], logits[:, :longest].to(self.behind.dtype)], 1), trace

    def _open(
        self, lasts: list[bytes], before: Float[Tensor, "B V"], temperature: float, dice: Sequence[Dice]
    ) -> list[bytes]:
        """Whether the last token of each text goes on behind its bytes: they if so, else none."""
        places = [self._drafter.places(last) if last else (0, 0, 0) for last in lasts]
        if all(longer == hi for _, longer, hi in places):
            return [b""] * len(lasts)
        whole = [(lo, lo, hi) for lo, _, hi in places]
        throws = [die(0, LANE_END) for die in dice]
        tokens = self._draw(before, whole, temperature, throws, [])
        drafter = self._drafter
        return [
            last if longer < hi and token >= 0 and drafter.tokens[token] != last else b""
            for last, (_, longer, hi), token in zip(lasts, places, tokens, strict=True)
        ]

    def _settle(self, tails: list[list[int]], behind: Float[Tensor, "B T V"], trace: tuple[object, ...]) -> None:
        """Move the state on behind tokens that will not be cut anew: those before the last word."""
        settled = self.settled(tails)
        if any(settled):
            state = self._runner.commit(self.state, trace, settled)
            self.move(state, behind[list(range(len(tails))), settled], own=True)
            self.moved_on(tails, settled)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Read what was written and will not be cut anew, where texts went on without a draft."""
        tails = self.tail_ids()
        behind, trace = self._read_again(tails)
        self._settle(tails, behind, trace)

    def tail_ids(self) -> list[list[int]]:
        """The tokens of each text that the state does not stand behind yet."""
        return [self._drafter.model.codec.encode(tail).tolist() for tail in self._tails]

    def settled(self, tails: list[list[int]]) -> list[int]:
        """How many of these tokens the state is to move on behind: those before the last word, once they are several
        in one of the texts; else none."""
        settled = [self._final(tail) for tail in tails]
        enough = max(settled) >= _SETTLE or self._drafter.vocabulary.longest == 1
        return settled if enough else [0] * len(settled)

    def moved_on(self, tails: list[list[int]], settled: list[int]) -> None:
        """The state stands behind so many of these tokens now."""
        for row, (tail, count) in enumerate(zip(tails, settled, strict=True)):
            self._lengths[row] += count
            size = sum(len(self._drafter.tokens[token]) for token in tail[:count])
            self._bytes[row] += size
            self._tails[row] = self._tails[row][size:]

    def move(self, state: NetworkState, behind: Float[Tensor, "B V"], *, own: bool = False) -> None:
        """The state behind all but the tails, and the prediction there: copied, unless they are the stream's `own`."""
        self.state, self.behind = state if own else clone(state), behind.clone()

    def _final(self, tail: list[int]) -> int:
        if self._drafter.vocabulary.longest == 1:
            return len(tail)
        for index in range(len(tail) - 1, 0, -1):
            if self._drafter.tokens[tail[index]][0] in _WHITE:
                return max(index, len(tail) - _WORD)
        return max(len(tail) - _KEPT, 0)

    def _draw(
        self,
        logits: Float[Tensor, "B V"],
        places: Sequence[tuple[int, int, int]],
        temperature: float,
        throws: Sequence[float],
        sums: list[Tensor],
    ) -> list[int]:
        """A token for each row, among longer..hi of its places; -1 where they have no mass. The running sums that were
        drawn from, float64 `[B V + 1]`, are appended to `sums`."""
        bounds = torch.tensor([[longer, hi] for _, longer, hi in places], device=self._device)
        uniform = torch.tensor(throws, dtype=torch.float64, device=self._device)
        scale = torch.full_like(uniform, temperature) if temperature else None
        ranks, empty, total = draw_ranks(logits.index_select(1, self._drafter.order), bounds, scale, uniform)
        if total is not None:
            sums.append(total)
        return self._drafter.order[ranks].masked_fill(empty, -1).tolist()

    def _weigh(self, drafts: list[ModelDraft], sums: list[Tensor]) -> None:
        """q of every drafted byte, with one transfer from the device."""
        stacked = torch.stack(sums)  # [steps B V + 1]
        index = [
            [((place.step * stacked.shape[1]) + row) * stacked.shape[2] + edge for edge in place[2:]]
            for row, draft in enumerate(drafts)
            for place in draft.places
        ]
        if not index:
            return
        flat: Int[Tensor, "bytes 4"] = torch.tensor(index, device=self._device)
        longer, hi, child_lo, child_hi = stacked.flatten()[flat].cpu().numpy().T
        q, start = (child_hi - child_lo) / (hi - longer), 0
        for draft in drafts:
            draft.q, start = q[start : start + len(draft.text)], start + len(draft.text)


def _settled(text: bytes) -> bytes:
    """The text without its last word, which may go on: what is cut into tokens once and for all."""
    for index in range(len(text) - 1, max(len(text) - _LAST, 0), -1):
        if text[index] in _WHITE:
            return text[:index]
    return text[: max(len(text) - _LAST, 0)]
