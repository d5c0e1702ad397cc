"""Subwords: byte-level byte-pair encoding through the `tokenizers` package, lossless on any bytes.

The package works on text, not on bytes. So every byte is mapped to one character of its own before it sees them (the
byte-level alphabet of GPT-2), and back behind it: nothing is decoded, normalized or lost. A text is first cut into
words by a regular expression over bytes that knows ASCII letters, digits, white space and the rest; every byte from
0x80 on counts as a letter. Merges never cross the end of a word.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); Radford et al., "Language Models
are Unsupervised Multitask Learners" (2019).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from milonga.data.streams import optional_module
from milonga.data.text import ByteCodec, Ids, Text, TextCodec, checked_ids, text_bytes
from milonga.errors import UserError
from milonga.files import write_atomically

TOKENIZER = "tokenizer.json"
FORMAT = 1
# A stretch of text without a place to cut is cut after so many bytes, to bound memory. Part of what the codec is.
LONGEST = 1 << 16
_PART = 1 << 16  # bytes that are encoded at once, where the text can be cut
_ALONE = 16  # words that are encoded one by one
_REMEMBERED = 1 << 22  # bytes of words whose ids are remembered, at most about

_WHITE = bytes([9, 10, 11, 12, 13, 32])
_LETTERS = bytes([*range(65, 91), *range(97, 123), *range(128, 256)])
_DIGITS = bytes(range(48, 58))


def _alphabet() -> str:
    """256 characters, the one of byte i at i: printable bytes of Latin-1 as themselves, others from U+0100 on."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in kept else next(others)) for byte in range(256))


ALPHABET = _alphabet()
_POINTS = np.array([ord(character) for character in ALPHABET], "<u4")
_BYTES = {character: byte for byte, character in enumerate(ALPHABET)}

_WORDS = (
    "'(?:[sdmt]|ll|ve|re)"  # English contractions
    "|{space}?{letter}+|{space}?{digit}{{1,3}}|{space}?{other}+"
    "|{white}*{line}+|{white}+(?!{black})|{white}+"  # white space; its last blank goes with the word behind it
)
# The same words told in the characters of a text, for whoever reads the file with `tokenizers` alone ...
TEXT_PATTERN = _WORDS.format(
    space=r"\x20",
    letter=r"[^\x00-\x40\x5b-\x60\x7b-\x7f]",
    digit=r"[\x30-\x39]",
    other=r"[\x00-\x08\x0e-\x1f\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f]",
    white=r"[\x09-\x0d\x20]",
    line=r"[\x0a\x0d]",
    black=r"[^\x09-\x0d\x20]",
)


def mapped(text: bytes) -> str:
    """Each byte as its character of the byte-level alphabet."""
    return _POINTS[np.frombuffer(text, np.uint8)].tobytes().decode("utf-32-le")


def _class(members: bytes) -> str:
    return f"[{mapped(members)}]"


# ... in the characters that bytes are mapped to, in which merges are learned ...
MAPPED_PATTERN = _WORDS.format(
    space=mapped(b" "),
    letter=_class(_LETTERS),
    digit=_class(_DIGITS),
    other=f"[^{mapped(_WHITE + _LETTERS + _DIGITS)}]",
    white=_class(_WHITE),
    line=_class(b"\n\r"),
    black=f"[^{mapped(_WHITE)}]",
)
# ... and in bytes, for encoding: finding words this way takes a tenth of the time that the package needs for it.
_FIND_WORDS = re.compile(
    _WORDS.format(
        space=r"\x20",
        letter=r"[A-Za-z\x80-\xff]",
        digit="[0-9]",
        other=r"[\x00-\x08\x0e-\x1f\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f]",
        white=r"[\x09-\x0d\x20]",
        line=r"[\x0a\x0d]",
        black=r"[^\x09-\x0d\x20]",
    ).encode()
).findall


class BpeCodec:
    """Byte-pair encoding: ids 0..255 are the bytes, each further id joins two earlier ones. See `TextCodec`.

    Tokens are greedy per call: each word of what is encoded is joined by the earliest merge first, as far as it goes.
    So two pieces encoded one by one may give other tokens than the text in one piece; `cut` says where they do not.
    No token is special, and none is ever added.

    Args:
        merges: pairs of tokens, each as its bytes, in the order in which they are joined.

    Raises:
        UserError: if `tokenizers` is not installed, or a merge joins what is no token yet.
    """

    name = "bpe"

    def __init__(self, merges: Iterable[tuple[bytes, bytes]]):
        ids = {bytes([byte]): byte for byte in range(256)}
        pairs = []
        for number, (left, right) in enumerate(merges):
            if left not in ids or right not in ids:
                raise UserError(f"tokenizer: merge {number} joins {left!r} and {right!r}, of which one is no token yet")
            pairs.append((ids[left], ids[right]))
            ids.setdefault(left + right, len(ids))  # two merges may come to the same bytes
        self._pairs: tuple[tuple[int, int], ...] = tuple(pairs)
        self.token_bytes: Sequence[bytes] = tuple(ids)
        self._tokenizer = tokenizers_package().Tokenizer.from_str(json.dumps(self._json(None)))
        self._words: dict[bytes, list[int]] = {}  # ids of words met lately
        self._words_bytes = 0

    @property
    def vocab_size(self) -> int:
        """V: 256 bytes and what merges make of them."""
        return len(self.token_bytes)

    @property
    def dtype(self) -> np.dtype:
        """uint16 up to 65,536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """int64 [V], bytes of each token."""
        return np.array([len(token) for token in self.token_bytes], np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the words' pattern and the merges, 64 hexadecimal digits."""
        content = [FORMAT, LONGEST, TEXT_PATTERN, self._pairs]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def encode(self, text: Text) -> np.ndarray:
        """The ids of a text, [T] of `dtype`; numbers are byte values, as for bytes.

        Raises:
            UserError: as `ByteCodec.encode`.
        """
        whole = text_bytes(text)
        if 0 < len(whole) <= _PART:  # one part, as when a draft's last words are cut anew
            return self._encoded(whole)
        parts = self.cut([whole], _PART)
        return np.concatenate([np.empty(0, self.dtype), *map(self._encoded, parts)])

    def _encoded(self, part: bytes) -> np.ndarray:
        words = _FIND_WORDS(part)
        if self._words_bytes > _REMEMBERED:
            self._words, self._words_bytes = {}, 0
        known = self._words  # another thread may put a new one in its place
        if missing := list(set(words).difference(known)):
            encodings = self._encodings(list(map(mapped, missing)))
            known.update((word, found.ids) for word, found in zip(missing, encodings, strict=True))
            self._words_bytes += sum(map(len, missing))
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), self.dtype)

    def _encodings(self, words: list[str]) -> list[Any]:
        """The package's encodings of these words. It shares several among threads: they take longer to wake than a few
        words take."""
        if len(words) <= _ALONE:
            return [self._tokenizer.encode(word, add_special_tokens=False) for word in words]
        return self._tokenizer.encode_batch_fast(words, add_special_tokens=False)

    def decode(self, ids: Ids) -> bytes:
        """The bytes that ids stand for. Raises as `checked_ids` does."""
        return b"".join(map(self.token_bytes.__getitem__, self.checked_ids(ids).tolist()))

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """See `TextCodec`."""
        return checked_ids(ids, self.vocab_size, self.dtype, "tokens: ids")

    def cut(self, pieces: Iterable[bytes], at_most: int) -> Iterator[bytes]:
        """See `TextCodec`: before white space that follows something else, where a word always ends.

        Where no such place comes for `LONGEST` bytes the text is cut there, by `encode` too, so parts may be as long.
        """
        rest = b""
        for piece in chain(pieces, [None]):
            text = rest if piece is None else rest + piece
            ends, start = _ends(text, whole=piece is None), 0
            while piece is None or len(text) - start > at_most:  # else more may fit into this part
                after = int(np.searchsorted(ends, start, "right"))
                last = int(np.searchsorted(ends, start + at_most, "right")) - 1
                if after == len(ends):
                    break
                end = int(ends[max(after, last)])
                yield text[start:end]
                start = end
            rest = text[start:]

    def to_dict(self) -> dict[str, Any]:
        """All that makes the codec, JSON-ready."""
        return {"name": self.name, "digest": self.digest, "merges": [list(pair) for pair in self._pairs]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "BpeCodec":
        """The codec that `to_dict` described.

        Raises:
            UserError: if that was another kind of codec, it is damaged, or `tokenizers` is not installed.
        """
        if stored.get("name") != cls.name:
            raise UserError(f"text codec: '{stored.get('name')}' is not '{cls.name}'")
        tokens = [bytes([byte]) for byte in range(256)]
        known = set(tokens)
        merges = []
        try:
            for left, right in stored["merges"]:
                merges.append((tokens[left], tokens[right]))
                joined = tokens[left] + tokens[right]
                if joined not in known:
                    known.add(joined)
                    tokens.append(joined)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"text codec: the merges of '{cls.name}' are damaged ({error})") from error
        codec = cls(merges)
        if stored.get("digest") != codec.digest:
            raise UserError(f"text codec: '{cls.name}' does not have the digest it should have: damaged or newer")
        return codec

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, which `tokenizers` reads as it is."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        words = {"type": "Sequence", "pretokenizers": [split_json(TEXT_PATTERN), byte_level]}
        return json.dumps(self._json(words), ensure_ascii=False, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        write_atomically(path, self.to_json())

    def _json(self, words: Mapping[str, Any] | None) -> dict[str, Any]:
        names = [mapped(token) for token in self.token_bytes]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [[names[left], names[right]] for left, right in self._pairs],
        }
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": words,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BpeCodec) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"BpeCodec({self.vocab_size:,} tokens, {self.digest[:12]})"


def codec_from_dict(stored: Mapping[str, Any]) -> TextCodec:
    """The codec of any kind that its `to_dict` described.

    Raises:
        UserError: if the kind is not known, or the description is damaged.
    """
    kinds: dict[object, type[ByteCodec] | type[BpeCodec]] = {ByteCodec.name: ByteCodec, BpeCodec.name: BpeCodec}
    if stored.get("name") not in kinds:
        raise UserError(f"text codec: '{stored.get('name')}' is not known here, only {', '.join(map(str, kinds))} are")
    return kinds[stored.get("name")].from_dict(stored)


def load_tokenizer(path: str | Path) -> BpeCodec:
    """The codec of a `tokenizer.json` that `BpeCodec.save` wrote (`tokenizers` may have written it anew since).

    Raises:
        UserError: if there is none, it is damaged, it is of another make (other words or other ids would not give back
            every byte, or not the same tokens), or `tokenizers` is not installed.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        hint = " (milonga tokenizer train makes one)" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"tokenizer: cannot read {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is damaged or no tokenizer.json ({error})") from error
    try:
        strange = _strange(content)
        merges = [] if strange else [unmapped(pair) for pair in content["model"]["merges"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer: {path} is damaged or no tokenizer.json (at {error})") from error
    if not strange:
        codec = BpeCodec(merges)
        if content["model"]["vocab"] == {mapped(token): index for index, token in enumerate(codec.token_bytes)}:
            return codec
        strange = "it numbers its tokens otherwise"
    raise UserError(f"tokenizer: {path} was not made by `milonga tokenizer train`: {strange}")


def _strange(content: Mapping[str, Any]) -> str:
    """What makes a tokenizer.json one that we cannot stand for; empty if nothing does."""
    model = content["model"]
    if model["type"] != "BPE" or content["normalizer"] is not None or content["added_tokens"]:
        return "it is no plain byte-pair encoding"
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    plain = all(not step["add_prefix_space"] and not step.get("use_regex", True) for step in levels)
    if patterns != [TEXT_PATTERN] or len(levels) != 1 or len(steps) != 2 or not plain:
        return "it cuts text into words otherwise"
    odd = [key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    return f"it has {odd[0]}" if odd else ""


def unmapped(pair: str | Sequence[str]) -> tuple[bytes, bytes]:
    """A merge as a tokenizer.json has it -> the bytes of the two tokens that it joins."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return bytes(_BYTES[character] for character in left), bytes(_BYTES[character] for character in right)


def split_json(pattern: str) -> dict[str, Any]:
    """The step of a tokenizer.json that cuts text into words."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizers_package() -> Any:
    """The package `tokenizers`, an extra.

    Raises:
        UserError: if it is not installed.
    """
    return optional_module("tokenizers", "subword", "tokenizer: byte-pair encoding")


_IS_WHITE = np.zeros(256, bool)
_IS_WHITE[list(_WHITE)] = True


def _ends(text: bytes, *, whole: bool) -> np.ndarray:
    """Where `text` may be cut: before white space that follows something else, and after `LONGEST` bytes without such a
    place; and at its end, if that is the end of the whole.

    `text` begins at such a place. What follows a text that is not whole does not change the answer.
    """
    white = _IS_WHITE[np.frombuffer(text, np.uint8)]
    bounds = np.concatenate([[0], np.flatnonzero(white[1:] & ~white[:-1]) + 1, [len(text)]])
    ends = bounds[1:] if whole and text else bounds[1:-1]
    long = np.flatnonzero(np.diff(bounds) > LONGEST)
    if not len(long):
        return ends
    more = [np.arange(bounds[i] + LONGEST, bounds[i + 1], LONGEST) for i in long.tolist()]
    return np.sort(np.concatenate([ends, *more]))
