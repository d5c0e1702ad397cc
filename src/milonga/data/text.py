"""Text codecs: what turns text into token ids and back."""

import codecs
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch

from milonga.errors import UserError

Text: TypeAlias = str | bytes | bytearray | memoryview | np.ndarray | torch.Tensor | Iterable[int]


class ByteCodec:
    """Text as bytes: byte i is token id i, nothing is added, and every sequence of bytes is a text.

    A `str` is encoded as UTF-8.
    """

    name = "bytes"
    vocab_size = 256

    def encode(self, text: Text) -> np.ndarray:
        """The tokens of `text`, uint8 [T]. Bytes-like input is copied.

        Raises:
            UserError: if a `str` holds lone surrogates (it was never valid UTF-8), or numbers are not integers of
                0..255 in one dimension.
        """
        if isinstance(text, str):
            return np.frombuffer(self._utf8(text), np.uint8).copy()
        if isinstance(text, bytes | bytearray | memoryview):
            return np.frombuffer(bytes(text), np.uint8).copy()
        if isinstance(text, torch.Tensor):
            values = text.detach().cpu().numpy()
        elif isinstance(text, np.ndarray):
            values = text
        else:
            values = np.asarray(list(text))
        if values.size == 0 and values.ndim == 1:
            return np.empty(0, np.uint8)
        return self._checked(values)

    def decode(self, tokens: np.ndarray | torch.Tensor | Iterable[int]) -> bytes:
        """The bytes that the tokens stand for. Raises as `encode` does."""
        return self.encode(tokens).tobytes()

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

    @staticmethod
    def _utf8(text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text: character {error.start} (U+{ord(text[error.start]):04X}) is half of a pair, so this was never "
                "valid UTF-8: give the raw bytes instead"
            ) from error

    @staticmethod
    def _checked(values: np.ndarray) -> np.ndarray:
        if values.ndim != 1:
            raise UserError(f"text: expected bytes as a one-dimensional array [T], got shape {list(values.shape)}")
        if values.dtype.kind not in "iu":
            raise UserError(f"text: bytes must be integers of 0..255, got values of type {values.dtype}")
        wrong = (values < 0) | (values > 255)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(f"text: bytes must be 0..255, got {int(values[at])} at position {at}")
        return values.astype(np.uint8)


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
