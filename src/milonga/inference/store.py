"""A store of states, keyed by the text that led to them: a text that begins like an earlier one is not read again."""

import dataclasses
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from milonga.data.text import Text
from milonga.errors import UserError
from milonga.inference import text_digest
from milonga.inference.language_model import LanguageModel
from milonga.inference.marks import Mark
from milonga.inference.session import Progress, Session, piece_length

# Evicted states that are remembered by name, so that a request can say that its own was among them.
_GONE_AT_MOST = 4096
# Texts of the last requests, kept to say where another one leaves them, take at most this share of the store.
_TEXT_SHARE = 8


class Reuse(NamedTuple):
    """What a request for a session cost, and why."""

    reused: int  # bytes of the text whose state was in the store
    recomputed: int  # bytes that were read
    reason: str  # for reading what was read; and from where on states are not kept, where they do not fit

    def __str__(self) -> str:
        return f"{self.reused} bytes reused, {self.recomputed} recomputed: {self.reason}"


class _Model(NamedTuple):
    """States are served to the same function of the same tokens, in the same place and precision."""

    fingerprint: str
    codec: str
    device: str
    dtype: str
    storage: str | None


class _Key(NamedTuple):
    model: _Model
    digest: bytes  # of the tokens


class _Entry(NamedTuple):
    mark: Mark
    exact: bool  # whether a session that reads the text from the beginning comes to the same bits
    nbytes: int


class StateStore:
    """States of texts that were read before, bounded in bytes; those used longest ago go first.

    Snapshots are taken where a cold run cuts its pieces: at 1, 2, 4, 8... pieces (`piece_length`), at the last cut
    before the end of every turn, and at the end of the text. A text that begins like an earlier one is read on from the
    last of them that both share.

    What holds: a session from the store predicts, on a CPU, bit for bit what `session.feed` of the whole text would
    have led to, whatever else the store has served, because both read the same pieces from the same states (other
    devices: where their products do not depend on anything but their operands). States handed over with `keep`, behind
    text that was written token by token, agree with a cold run up to rounding only, and are served only to requests
    with `exact=False`. A state is served to no other model, tokenizer, device, dtype or storage of weights, and to no
    other tokens than those that led to it (SHA-256).

    Texts are remembered only to give reasons, and go before the last state does. A state that takes more than the whole
    limit (of a layer that attends to everything it grows) is not kept: requests are answered, and their reasons say so.

    Several threads may use one store.

    Args:
        limit_bytes: of the states, and of the texts that they belong to.

    Raises:
        UserError: if the limit is below 1.
    """

    def __init__(self, limit_bytes: int):
        if limit_bytes < 1:
            raise UserError(f"state store: the limit must be at least 1 byte, got {limit_bytes}")
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._gone: OrderedDict[_Key, tuple[int, bool]] = OrderedDict()  # evicted lately -> position, exact
        self._states = 0  # bytes of the entries
        self._texts: list[tuple[_Model, np.ndarray]] = []  # of the last requests, the latest last
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held, at most `limit_bytes`."""
        return self._states + sum(ids.nbytes for _, ids in self._texts)

    def session_for(
        self, lm: LanguageModel, *turns: Text, exact: bool = True, progress: Progress | None = None
    ) -> tuple[Session, Reuse]:
        """A session of its own behind a text, as much of it as possible from the store, and what that was.

        Args:
            lm: the model.
            turns: the text, in one piece or in turns; they are cut into tokens one by one.
            exact: use only states that a cold run comes to bit for bit.
            progress: called with the bytes read so far, of those that have to be read.

        Raises:
            UserError: as `Session.feed`; or if not even the state of an empty text fits into the store.
        """
        session, model = lm.session(), _model(lm)
        if session.nbytes > self.limit_bytes:
            raise UserError(
                f"state store: a state of this model takes {session.nbytes} bytes, the limit is {self.limit_bytes}; "
                "make it at least a few times that"
            )
        parts = [lm.codec.encode(turn) for turn in turns]
        ids = np.concatenate(parts) if parts else np.empty(0, lm.codec.dtype)
        length = piece_length(lm.device)
        found, canonical, reason = self._find(model, ids, length, exact, lm.codec.token_lengths)
        if found is not None:
            session.rewind(dataclasses.replace(found, network=lm.network))
        reused, too_large = session.bytes_read, ""
        self._remember(model, ids)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        for stop in _snapshots(session.position, ends, length):
            already = session.bytes_read - reused
            behind = None if progress is None else lambda read, already=already: progress(already + read)
            session.read_ids(ids[session.position : stop], progress=behind)
            mark = session.mark()
            if not self._put(model, mark, canonical) and not too_large:
                too_large = f"; not kept from byte {mark.bytes_read} on: {self._too_large(mark)}"
        return session, Reuse(reused, session.bytes_read - reused, reason + too_large)

    def keep(self, lm: LanguageModel, session: Session) -> None:
        """Keep the place of a session, such as the end of a turn that it has written, for requests with `exact=False`.

        Raises:
            UserError: if the session does not know all it has read (it comes from a state file of format 1), or its
                state does not fit into the store.
        """
        mark = session.mark()
        if mark.network is not lm.network:
            raise UserError("state store: the session is one of another model")
        if mark.digest is None:
            raise UserError("state store: this session comes from an old state file, which does not say what was read")
        if not self._put(_model(lm), mark, exact=False):
            raise UserError(f"state store: {self._too_large(mark)}")

    def _too_large(self, mark: Mark) -> str:
        return f"the state takes {mark.nbytes} bytes, the limit is {self.limit_bytes}"

    def _find(
        self, model: _Model, ids: np.ndarray, length: int, exact: bool, token_lengths: np.ndarray
    ) -> tuple[Mark | None, bool, str]:
        """-> (the place with the longest beginning of `ids`, whether a cold run comes there bit for bit and cuts its
        pieces there, why what follows has to be read)."""
        with self._lock:
            known = {entry.mark.position for key, entry in self._entries.items() if key.model == model}
            known |= {position for key, (position, _) in self._gone.items() if key.model == model}
            positions = sorted(position for position in known if position <= len(ids))
            found, canonical, passed, lost = None, True, 0, 0
            for position, digest in zip(positions, text_digest.digests(ids, positions), strict=True):
                key, cut = _Key(model, digest), position == len(ids) or position % length == 0
                entry = self._entries.get(key)
                if entry is not None:
                    cold = entry.exact and cut
                    if cold or not exact:
                        found, canonical = key, cold
                    else:
                        passed = position
                elif key in self._gone and (not exact or (self._gone[key][1] and cut)):
                    lost = position
            if found is not None:
                self._entries.move_to_end(found)
            mark = None if found is None else self._entries[found].mark
            reused = 0 if mark is None else mark.position
            reason = "evicted" if lost > reused else self._reason(model, ids, reused, passed, token_lengths)
            return mark, canonical, reason

    def _reason(self, model: _Model, ids: np.ndarray, reused: int, passed: int, token_lengths: np.ndarray) -> str:
        """Why `ids` have to be read from `reused` on, where no state behind it was evicted, and the last one there that
        is not exact, or not where a cold run cuts its pieces, stands at `passed`."""
        if reused == len(ids):
            return "nothing to read"
        shared, ended = passed, True
        for owner, other in self._texts:
            if owner == model and (common := _common(other, ids)) > shared:
                shared, ended = common, common == len(other)
        if max(shared, reused) == 0:
            return "no entry"
        missing = "no exact entry" if passed > reused else "no entry"
        if shared == len(ids):
            return f"{missing} nearer to the end"
        begin, at = (int(token_lengths[ids[:position]].sum()) for position in (reused, max(shared, reused)))
        between = f"{missing} between bytes {begin} and {at}; " if shared > reused else ""
        return between + (f"new from byte {at} on" if ended or shared <= reused else f"diverges at byte {at}")

    def _remember(self, model: _Model, ids: np.ndarray) -> None:
        """Keep the text of a request; one that it goes on from is part of it."""
        with self._lock:
            others = [(owner, it) for owner, it in self._texts if owner != model or _common(it, ids) < len(it)]
            self._texts = [*others, (model, ids)]
            while self._texts and sum(it.nbytes for _, it in self._texts) * _TEXT_SHARE > self.limit_bytes:
                del self._texts[0]
            self._fit()

    def _put(self, model: _Model, mark: Mark, exact: bool) -> bool:
        """Keep a state, if it fits at all. One that is exact is not replaced by one that is not."""
        digest = mark.digest
        assert digest is not None
        key, entry = _Key(model, digest), _Entry(mark, exact, mark.nbytes)
        with self._lock:
            if entry.nbytes > self.limit_bytes:
                return False
            before = self._entries.get(key)
            kept = before if before is not None and before.exact else entry
            self._states += kept.nbytes - (before.nbytes if before is not None else 0)
            self._entries[key] = kept
            self._entries.move_to_end(key)
            self._gone.pop(key, None)
            self._fit()
            return True

    def _fit(self) -> None:
        """Keep to the limit: evict the states used longest ago, and where only the last is left forget texts."""
        while self.nbytes > self.limit_bytes and len(self._entries) > 1:
            oldest, evicted = self._entries.popitem(last=False)
            self._states -= evicted.nbytes
            self._gone[oldest] = evicted.mark.position, evicted.exact
        while self.nbytes > self.limit_bytes:
            del self._texts[0]
        while len(self._gone) > _GONE_AT_MOST:
            self._gone.popitem(last=False)


def _model(lm: LanguageModel) -> _Model:
    weight = lm.network.embedding.weight
    return _Model(lm.fingerprint, lm.codec.digest, str(weight.device), str(weight.dtype), lm.storage)


def _common(one: np.ndarray, two: np.ndarray) -> int:
    """Tokens that two texts share from the beginning."""
    length = min(len(one), len(two))
    differ = one[:length] != two[:length]
    return int(differ.argmax()) if differ.any() else length


def _snapshots(start: int, ends: list[int], length: int) -> list[int]:
    """Where to keep states on the way from a position to the end of the last turn, in order; the end is the last."""
    end = ends[-1] if ends else 0
    doubling = []
    position = length
    while position <= end:
        doubling.append(position)
        position *= 2
    cuts = {*doubling, *(turn // length * length for turn in ends), end}
    return sorted(cut for cut in cuts if cut > start)
