"""What step N of a training run sees: a pure function of (seed, data, N), found without looking at other steps."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from milonga.data.corpus import Corpus
from milonga.data.permutation import draw, permute
from milonga.data.text import ByteCodec
from milonga.errors import UserError
from milonga.segments import Segments

IGNORED = -100
_PHASE, _ORDER = 1, 2  # which use of the seed a number is drawn for


class Batch(NamedTuple):
    """One step's text. B rows of T tokens, as `[B, T]`, or laid end to end as `[1, B*T]` with segments.

    Attributes:
        tokens: int64 `[B, T]`, or `[1, B*T]` when packed.
        targets: int64, same shape: the token after each token, or -100 where there is none to predict.
        segments: None when no document starts inside a row (or documents are not isolated); else the sequences of the
            packed batch: one starts with every row and with every document. B <= S.
        first: int64 [B], the sequence that starts row r: with states carried, it goes on from row r's state.
        last: int64 [B], the sequence that ends row r: its final state is row r's state for the next step.
        fresh: bool [B], whether row r starts from the empty state. Always, unless states are carried.
        bytes: of the text that the tokens stand for: for bytes, their number.
        target_bytes: the same of the targets, by which losses are divided to give bits per byte.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: Segments | None
    first: torch.Tensor
    last: torch.Tensor
    fresh: torch.Tensor
    bytes: int
    target_bytes: int


class Ring:
    """The documents of a corpus end to end, each followed by the separator, and the last by the first.

    Positions and lengths are in tokens.

    Args:
        corpus: the documents, and the separator that follows each.
    """

    def __init__(self, corpus: Corpus):
        self._separator = corpus.codec.encode(corpus.separator)
        self.corpus, self.gap = corpus, len(self._separator)
        self.length = corpus.length + corpus.documents * self.gap

    def start(self, index: int) -> int:
        """Where document `index` starts; for `index` = documents, the length of the ring."""
        return int(self.corpus.offsets[index]) + index * self.gap

    def at(self, position: int) -> int:
        """The document that holds `position` (or whose separator does): a binary search, O(log documents)."""
        return bisect_right(range(self.corpus.documents), position, key=self.start) - 1

    def read(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from `position` on, and where documents start among them.

        Returns:
            The tokens, int64 [count], and ascending positions of 0..count-1, int64.
        """
        out = np.empty(count, np.int64)
        starts = []
        index, filled = self.at(position), 0
        inside = position - self.start(index)
        while filled < count:
            if inside == 0:
                starts.append(filled)
            document = self.corpus.document(index)
            for part, skip in ((document, inside), (self._separator, max(0, inside - len(document)))):
                piece = part[skip : skip + count - filled]
                out[filled : filled + len(piece)] = piece
                filled += len(piece)
            index, inside = (index + 1) % self.corpus.documents, 0
        return out, np.asarray(starts, np.int64)


class WindowSampler:
    """Cuts a corpus into windows and says which of them each step sees.

    The documents lie end to end in a ring, each followed by the corpus's separator. There is no state: `batch(step)`
    depends on the arguments and `step` alone, takes the same time for every step, and may be called in any order.

    Independent windows (`carried=False`): each epoch tiles the ring anew, from a start that the seed and the epoch
    choose, and shows every window exactly once, in an order that they choose too. The ring's length modulo `window`
    tokens are left out of an epoch, elsewhere in each. A batch may cross from one epoch to the next.

    Carried states (`carried=True`): row r of step N + 1 goes on where row r of step N ended, for ever, round the ring.
    The rows start evenly spaced, from a place that the seed chooses, so in `steps_per_epoch` steps no token is seen
    twice. Row states are reset (`fresh`) at step 0 and at the start of a document.

    Documents are kept apart (`isolate=True`): a document that starts inside a row starts a new sequence, and then the
    whole batch comes packed. The first token of a document is not a target, since nothing before it belongs to that
    document; with a separator it is one, predicted from the separator that precedes it. With `isolate=False` windows
    run across documents as in the papers: never packed, every token a target.

    Args:
        corpus: the documents.
        window: T, tokens per row.
        batch: B, rows per step.
        seed: chooses starts and order.
        carried: whether states are carried from step to step.
        isolate: whether documents are kept apart.

    Raises:
        UserError: if `window` or `batch` is less than 1, or the text is shorter than one window (carried: one batch).
    """

    def __init__(
        self, corpus: Corpus, *, window: int, batch: int, seed: int, carried: bool = False, isolate: bool = True
    ):
        if window < 1 or batch < 1:
            raise UserError(f"data: window and batch must be at least 1, got window {window} and batch {batch}")
        self.corpus, self.window, self.rows, self.seed = corpus, window, batch, seed
        self.carried, self.isolate = carried, isolate
        self.ring = Ring(corpus)
        needed = window * batch if carried else window
        if self.ring.length < needed:
            shape = f"{batch} rows of {window}" if carried else f"one window of {window}"
            unit = "bytes" if corpus.codec.name == ByteCodec.name else "tokens"
            raise UserError(
                f"data: the text has {self.ring.length} {unit}, which is less than {shape} {unit}: give more text, or "
                f"a smaller window{' or batch' if carried else ''}"
            )

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch holds."""
        return self.ring.length // self.window

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which the rows see as many tokens as there are, but for a remainder of less than a window each."""
        if self.carried:
            return self.ring.length // (self.window * self.rows)
        return self.windows_per_epoch / self.rows

    def identity(self) -> dict[str, str | int | bool]:
        """What, besides the step, decides what is seen; JSON-ready. A resumed run compares it with its own."""
        codec = self.corpus.codec
        return ({} if codec.name == ByteCodec.name else {"tokenizer": codec.digest}) | {
            "fingerprint": self.corpus.fingerprint,
            "separator": self.corpus.separator.hex(),
            "window": self.window,
            "batch": self.rows,
            "seed": self.seed,
            "carried": self.carried,
            "isolate": self.isolate,
        }

    def positions(self, step: int) -> list[int]:
        """Where in the ring each row of a step starts.

        Raises:
            ValueError: if `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        length = self.ring.length
        if self.carried:
            start = draw(length, self.seed, _PHASE) + step * self.window
            return [(start + row * length // self.rows) % length for row in range(self.rows)]
        numbers = range(step * self.rows, (step + 1) * self.rows)
        positions: list[int] = []
        for epoch in range(numbers[0] // self.windows_per_epoch, numbers[-1] // self.windows_per_epoch + 1):
            base = epoch * self.windows_per_epoch
            inside = [n - base for n in numbers if 0 <= n - base < self.windows_per_epoch]
            order = permute(np.asarray(inside), self.windows_per_epoch, self.seed, _ORDER, epoch)
            phase = draw(length, self.seed, _PHASE, epoch)
            positions += [(phase + int(k) * self.window) % length for k in order]
        return positions

    def batch(self, step: int) -> Batch:
        """What step `step` (0, 1, ...) sees.

        Raises:
            ValueError: if `step` is negative.
        """
        rows, time = self.rows, self.window
        tokens, targets = np.empty((rows, time), np.int64), np.empty((rows, time), np.int64)
        fresh = np.ones(rows, bool)
        bounds: list[int] = []  # where sequences start in the batch laid flat
        first = []
        for row, position in enumerate(self.positions(step)):
            text, starts = self.ring.read(position, time + 1)
            tokens[row], targets[row] = text[:-1], text[1:]
            if self.carried:
                fresh[row] = step == 0 or (self.isolate and 0 in starts[:1])
            first.append(len(bounds))
            bounds.append(row * time)
            if self.isolate:
                bounds += [row * time + int(start) for start in starts if 0 < start < time]
                if not self.ring.gap:
                    targets[row, starts[starts > 0] - 1] = IGNORED
        last = [*(number - 1 for number in first[1:]), len(bounds) - 1]
        packed = len(bounds) > rows
        lengths = self.corpus.codec.token_lengths
        shape = (1, rows * time) if packed else (rows, time)
        return Batch(
            torch.from_numpy(tokens.reshape(shape)),
            torch.from_numpy(targets.reshape(shape)),
            Segments([*bounds, rows * time]) if packed else None,
            torch.tensor(first, dtype=torch.int64),
            torch.tensor(last, dtype=torch.int64),
            torch.from_numpy(fresh),
            int(lengths[tokens].sum()),
            int(lengths[targets[targets != IGNORED]].sum()),
        )

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of steps `start`, `start` + 1, ... without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1
