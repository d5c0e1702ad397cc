"""The books inside the package are those that NOTICE.md lists."""

import lzma
import re
import tarfile

import pytest

from milonga.data.bundled import bundled_heldout, bundled_train, is_bundled, resolve_bundled
from milonga.errors import UserError


def test_the_training_archive_holds_what_the_notice_says():
    notice = (bundled_train().parent / "NOTICE.md").read_text()
    sizes = [int(n.replace(",", "")) for n in re.findall(r"\| 1[89]\d\d \| ([\d,]+) \|", notice)]
    with tarfile.open(bundled_train()) as archive:
        members = archive.getmembers()
    assert [member.size for member in members] == sizes[:-1]
    assert sum(sizes[:-1]) == 6_135_330
    assert not any("Wells" in member.name for member in members)
    assert len(lzma.decompress(bundled_heldout().read_bytes())) == sizes[-1] == 337_055
    assert bundled_train().stat().st_size + bundled_heldout().stat().st_size < 2_000_000


def test_names_for_recipes():
    assert resolve_bundled("bundled:train") == bundled_train()
    assert resolve_bundled("bundled:heldout") == bundled_heldout()
    assert is_bundled("bundled:x")
    assert not is_bundled("x/bundled:train")
    with pytest.raises(UserError, match="no bundled text 'bundled:x': there are bundled:train, bundled:heldout"):
        resolve_bundled("bundled:x")
