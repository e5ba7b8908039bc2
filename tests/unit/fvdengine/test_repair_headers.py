# SPDX-License-Identifier: Apache-2.0
"""Repair where the header and its copy are both readable and disagree, or the epoch is lost.

The images have a history: they were written by the engine over several sessions.
"""

import hashlib
import random
import struct

import pytest

from fvdengine.check import check_image
from fvdengine.errors import HeadersDisagree, UnknownFeature
from fvdengine.repair import repair_image
from fvdtest.forge import poke
from fvdtest.images import content_on_disk, make_image, open_image

MIB = 1 << 20
SIZE = 8 * MIB
OFFSETS = {
    "virtual_disk_size": 16, "data_offset": 24, "base_img_size": 2112, "bitmap_offset": 2120,
    "block_size": 2136, "chunk_size": 2204,
}  # fmt: skip


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def written(tmp_path, rng):
    """A function that makes an image, writes every other 32 KiB and closes it."""

    def make(**options):
        base = tmp_path / "base.raw"
        base.write_bytes(rng.randbytes(SIZE))
        if options.pop("based", False):
            options["base"] = str(base)
        path = make_image(tmp_path / "image.fvd", size=SIZE, **options)
        opened = open_image(path)
        for offset in range(0, SIZE, 65536):
            opened.device.write(offset, rng.randbytes(32768))
        opened.close()
        return path

    return make


DAMAGE = [
    ({"compact": True}, "data_offset", lambda value: value + 4096),
    ({"compact": True}, "chunk_size", lambda value: value * 2),
    ({"based": True}, "block_size", lambda value: value * 2),
    ({"based": True}, "base_img_size", lambda value: value // 2),
    ({}, "data_offset", lambda value: value ^ 8192),
    ({"compact": True}, "virtual_disk_size", lambda value: value // 4),
    ({}, "virtual_disk_size", lambda value: value // 4),
    ({}, "virtual_disk_size", lambda value: value + (1 << 38)),
]  # fmt: skip
NAMES = [f"{'-'.join(options) or 'raw'}-{field}" for options, field, _ in DAMAGE]


@pytest.mark.parametrize(("options", "field", "change"), DAMAGE, ids=NAMES)
def test_a_damaged_layout_is_not_believed_and_the_copy_not_lost(written, options, field, change):
    path = written(**options)
    content = content_on_disk(path)
    (old,) = struct.unpack_from("<Q", path.read_bytes(), OFFSETS[field])
    poke(path, OFFSETS[field], struct.pack("<Q", change(old)))
    before = digest(path)
    for dry_run in (True, False):
        with pytest.raises(HeadersDisagree, match=field) as caught:
            repair_image(path, dry_run=dry_run)
        assert "--header backup" in caught.value.hint
        assert digest(path) == before
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content


def test_the_header_that_was_named_is_kept(written):
    """A copy whose damage left it readable."""
    path = written(compact=True)
    content = content_on_disk(path)
    poke(path, 8192 + OFFSETS["chunk_size"], struct.pack("<Q", 2 * MIB))
    with pytest.raises(HeadersDisagree, match="chunk_size"):
        repair_image(path)
    assert repair_image(path, header="front").exit_status == 0
    assert check_image(path).findings == []
    assert content_on_disk(path) == content


@pytest.mark.parametrize("is_again", [False, True])
def test_records_of_old_epochs_do_not_come_back(tmp_path, is_again):
    """A place was given back and given to another chunk; the journal still has its first owner."""
    path = make_image(tmp_path / "image.fvd", size=64 * MIB, compact=True, chunk_size=MIB)
    first, second = random.Random(1).randbytes(MIB), random.Random(2).randbytes(MIB)

    def session(*steps):
        opened = open_image(path)
        for chunk, data in steps:
            if data is None:
                opened.device.trim(chunk * MIB, MIB)
            else:
                opened.device.write(chunk * MIB, data)
            opened.device.flush()
        opened.close()

    session((20, first), (21, first), (2, first))
    session((2, None))
    session((9, second))
    if is_again:
        session((2, first[::-1]))
        session((30, first))
    content = content_on_disk(path)
    poke(path, 0, bytes(4096))
    result = repair_image(path)
    assert "recover_epoch" in [action.code for action in result.actions]
    assert content_on_disk(path) == content


def test_damage_that_looks_like_a_feature_is_undone_when_the_copy_is_named(written):
    path = written(compact=True)
    content = content_on_disk(path)
    poke(path, 4000, b"\xff")
    with pytest.raises(UnknownFeature) as caught:
        repair_image(path)
    assert "--header backup" in caught.value.hint
    assert repair_image(path, header="backup").exit_status == 0
    assert content_on_disk(path) == content
