"""Learning a vocabulary: the same text gives the same one, and errors of the text come through."""

from collections.abc import Iterator

import pytest

from milonga.data.bpe_training import train_bpe
from milonga.errors import UserError

TEXT = b"low lower lowest, new newer newest; wide wider widest. " * 3


def test_the_first_merges_are_the_most_frequent_pairs():
    codec = train_bpe([[b"aaab aaab aaac xy"]], 258)
    # inside words "aa" occurs 6 times; then "aa" before "a" 3 times, and no other pair as often
    assert codec.token_bytes[256:] == (b"aa", b"aaa")


def test_the_same_text_gives_the_same_vocabulary_however_it_comes():
    whole = train_bpe([[TEXT]], 270)
    assert whole == train_bpe([[TEXT]], 270)
    assert whole == train_bpe([[TEXT[i : i + 7] for i in range(0, len(TEXT), 7)]], 270)


def test_progress_counts_the_bytes():
    seen: list[int] = []
    train_bpe([[TEXT], [TEXT, TEXT]], 270, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 3 * len(TEXT)


@pytest.mark.parametrize("size", [0, 256, 1 << 21])
def test_a_size_out_of_range_is_a_clear_error(size: int):
    with pytest.raises(UserError, match="must have 257 to"):
        train_bpe([[TEXT]], size)


def test_too_little_text_is_a_clear_error():
    with pytest.raises(UserError, match=r"gives 258 tokens, not 300: .*ask for fewer"):
        train_bpe([[b"abc", b" abc"]], 300)


def test_an_error_of_the_text_comes_through():
    def broken() -> Iterator[bytes]:
        yield TEXT
        raise UserError("data: cut.gz is damaged")

    with pytest.raises(UserError, match=r"cut\.gz is damaged"):
        train_bpe([broken()], 270)
