"""Text codecs: what turns text into token ids and back."""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from milonga.errors import UserError

Text: TypeAlias = str | bytes | bytearray | memoryview | np.ndarray | torch.Tensor | Iterable[int]
Ids: TypeAlias = np.ndarray | torch.Tensor | Iterable[int]


class TextCodec(Protocol):
    """What every codec offers: text in, token ids out, and back to the same bytes.

    Laws, for all bytes `b`, UTF-8 or not: `decode(encode(b)) == b`, and `decode(ids)` is the bytes of each id, end to
    end. Byte i is token id i, so any bytes can be encoded and any token sequence has bytes.

    `encode` is greedy per call: a codec whose tokens are longer than a byte gives other (and more) tokens for two
    pieces of a text than for the whole, unless the pieces come from `cut`.

    Attributes:
        name: the kind of codec, such as `bytes` or `bpe`.
        vocab_size: V, how many ids there are: 0..V-1.
        dtype: of encoded ids: uint8, uint16 or uint32, the narrowest that holds all of them.
        digest: 64 hexadecimal digits: two codecs have the same exactly when they give the same ids for every text.
        token_bytes: the bytes of every id; none is empty.
        token_lengths: int64 [V], how many bytes that is.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def digest(self) -> str: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def token_lengths(self) -> np.ndarray: ...

    def encode(self, text: Text) -> np.ndarray:
        """The ids of a text, [T] of `dtype`. Numbers are byte values, whatever the codec."""
        ...

    def decode(self, ids: Ids) -> bytes:
        """The bytes that ids stand for."""
        ...

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """Ids that came from outside, [T] of `dtype`.

        Raises:
            UserError: if they are not integers of 0..V-1 in one dimension.
        """
        ...

    def cut(self, pieces: Iterable[bytes], at_most: int) -> Iterator[bytes]:
        """A text that comes in pieces, cut anew where encoding the parts one by one gives the ids of the whole.

        Args:
            pieces: of any lengths; read once, at constant memory.
            at_most: bytes of a part, where the text has such places that often.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """All that makes the codec, JSON-ready; `codec_from_dict` in `milonga.data.bpe` reads it."""
        ...


class ByteCodec:
    """Text as bytes: byte i is token id i, nothing is added, and every sequence of bytes is a text.

    A `str` is encoded as UTF-8. See `TextCodec`.
    """

    name = "bytes"
    vocab_size = 256
    dtype = np.dtype(np.uint8)
    digest = hashlib.sha256(b"bytes").hexdigest()
    token_bytes: Sequence[bytes] = tuple(bytes([byte]) for byte in range(256))
    token_lengths = np.ones(256, np.int64)

    def encode(self, text: Text) -> np.ndarray:
        """The tokens of `text`, uint8 [T]. Bytes-like input is copied.

        Raises:
            UserError: if a `str` holds lone surrogates (it was never valid UTF-8), or numbers are not integers of
                0..255 in one dimension.
        """
        if isinstance(text, str | bytes | bytearray | memoryview):
            return np.frombuffer(text_bytes(text), np.uint8).copy()
        return checked_ids(text, self.vocab_size, self.dtype, "text: bytes")

    def decode(self, ids: Ids) -> bytes:
        """The bytes that the tokens stand for. Raises as `checked_ids` does."""
        return self.checked_ids(ids).tobytes()

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """See `TextCodec`."""
        return checked_ids(ids, self.vocab_size, self.dtype, "text: bytes")

    def cut(self, pieces: Iterable[bytes], at_most: int) -> Iterator[bytes]:
        """See `TextCodec`: bytes may be cut anywhere."""
        for piece in pieces:
            for start in range(0, len(piece), at_most):
                yield piece[start : start + at_most]

    def to_dict(self) -> dict[str, str]:
        """What a run stores about its codec; JSON-ready."""
        return {"name": self.name}

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> "ByteCodec":
        """The codec that `to_dict` described.

        Raises:
            UserError: if that was another codec.
        """
        if stored.get("name") != cls.name:
            raise UserError(f"text codec: '{stored.get('name')}' is not known here, only '{cls.name}' is")
        return cls()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteCodec)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return "ByteCodec()"


def text_bytes(text: Text) -> bytes:
    """The bytes of any text; a `str` as UTF-8, numbers as byte values.

    Raises:
        UserError: as `ByteCodec.encode`.
    """
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text: character {error.start} (U+{ord(text[error.start]):04X}) is half of a pair, so this was never "
                "valid UTF-8: give the raw bytes instead"
            ) from error
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    return checked_ids(text, 256, np.dtype(np.uint8), "text: bytes").tobytes()


def checked_ids(ids: Ids, vocab_size: int, dtype: np.dtype, what: str) -> np.ndarray:
    """Numbers as an array [T] of `dtype`.

    Raises:
        UserError: if they are not integers of 0..vocab_size-1 in one dimension; `what` says what they should be.
    """
    if isinstance(ids, torch.Tensor):
        values = ids.detach().cpu().numpy()
    else:
        if not isinstance(ids, Iterable):
            raise UserError(f"{what} must be str, bytes or a one-dimensional array [T], got {type(ids).__name__}")
        values = ids if isinstance(ids, np.ndarray) else np.asarray(list(ids))
    if values.size == 0 and values.ndim == 1:
        return np.empty(0, dtype)
    if values.ndim != 1:
        raise UserError(f"{what} must be a one-dimensional array [T], got shape {list(values.shape)}")
    if values.dtype.kind not in "iu":
        raise UserError(f"{what} must be integers of 0..{vocab_size - 1}, got values of type {values.dtype}")
    wrong = (values < 0) | (values >= vocab_size)
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(f"{what} must be 0..{vocab_size - 1}, got {int(values[at])} at position {at}")
    return values.astype(dtype)


class Utf8Stream:
    """Bytes in, `str` pieces out: never half a character, never an exception.

    Whatever the pieces in which the bytes come, the pieces that go out join to
    `all_bytes.decode("utf-8", errors="replace")`, once `flush` has been called.

    Args:
        pending: the first bytes of a character that is not complete yet, as another stream's `pending` gave them.

    Raises:
        ValueError: if `pending` is more than such a beginning (at most 3 bytes).
    """

    def __init__(self, pending: bytes = b""):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if self._decoder.decode(pending) or self.pending != pending:
            raise ValueError(f"pending must be the beginning of one UTF-8 character, got {pending!r}")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes; an invalid byte sequence gives U+FFFD."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End the text: U+FFFD if a character was left incomplete, else nothing. The stream is then as new."""
        return self._decoder.decode(b"", final=True)

    @property
    def pending(self) -> bytes:
        """Bytes fed that no piece has shown yet: the beginning of one character, 0 to 3 bytes."""
        return self._decoder.getstate()[0]
