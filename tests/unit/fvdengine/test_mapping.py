# SPDX-License-Identifier: Apache-2.0
"""Map against a plain model, block by block, through chains and holes."""

import os
import random

import pytest

from fvdengine.content import file_extents
from fvdengine.create import create_image
from fvdengine.header import Header
from fvdengine.mapping import ExtentKind, map_image
from fvdengine.options import CreateOptions
from fvdengine.records import BitmapRecord, Trailer, seal_sector

BLOCK = 4096
DATA, ZERO = ExtentKind.DATA, ExtentKind.ZERO
BASE, BASE_ZERO = ExtentKind.BASE, ExtentKind.BASE_ZERO


def sparse(path, blocks, filled):
    """A file of `blocks` blocks of which only `filled` have storage."""
    with path.open("wb") as file:
        file.truncate(blocks * BLOCK)
        for block in filled:
            file.seek(block * BLOCK)
            file.write(b"d" * BLOCK)
    return path


def clone(path, base, base_format, size=None):
    options = CreateOptions(
        base=str(base), base_format=base_format, size=size, journal_size=65536
    )
    return create_image(path, options).header


def fill(path, header, bits, stored):
    """Set bits, and give storage to some blocks."""
    bitmap = bytearray(header.bitmap_size)
    for bit in bits:
        bitmap[bit >> 3] |= 1 << (bit & 7)
    with path.open("r+b") as file:
        file.seek(header.bitmap_offset)
        file.write(bitmap)
        for block in stored:
            file.seek(header.data_offset + block * BLOCK)
            file.write(b"L" * BLOCK)


def summary(path):
    return [(e.start // BLOCK, e.length // BLOCK, e.kind, e.depth) for e in map_image(path)]


def test_fresh_clone_is_all_base(tmp_path):
    sparse(tmp_path / "b", 8, [2, 3])
    clone(tmp_path / "c", tmp_path / "b", "raw")
    assert summary(tmp_path / "c") == [
        (0, 2, BASE_ZERO, 1), (2, 2, BASE, 1), (4, 4, BASE_ZERO, 1),
    ]  # fmt: skip


def test_local_blocks_are_data_or_holes(tmp_path):
    sparse(tmp_path / "b", 8, range(8))
    header = clone(tmp_path / "c", tmp_path / "b", "raw")
    fill(tmp_path / "c", header, [1, 2, 5], [1, 2])
    assert summary(tmp_path / "c") == [
        (0, 1, BASE, 1), (1, 2, DATA, 0), (3, 2, BASE, 1), (5, 1, ZERO, 0), (6, 2, BASE, 1),
    ]  # fmt: skip


def test_extent_tells_where_it_lies(tmp_path):
    sparse(tmp_path / "b", 2, [0, 1])
    header = clone(tmp_path / "c", tmp_path / "b", "raw")
    fill(tmp_path / "c", header, [1], [1])
    base, own = map_image(tmp_path / "c")
    assert (base.path, base.offset) == (str(tmp_path / "b"), 0)
    assert (own.path, own.offset) == (str(tmp_path / "c"), header.data_offset + BLOCK)
    assert own.as_dict()["filename"] == str(tmp_path / "c")
    assert own.as_dict()["data"] is True
    assert base.as_dict()["depth"] == 1


def test_disk_larger_than_its_base_ends_in_zeros(tmp_path):
    sparse(tmp_path / "b", 2, [0, 1])
    clone(tmp_path / "c", tmp_path / "b", "raw", size=6 * BLOCK)
    assert summary(tmp_path / "c") == [(0, 2, BASE, 1), (2, 4, ZERO, 0)]


def test_storage_under_missing_blocks_does_not_count(tmp_path):
    sparse(tmp_path / "b", 4, [])
    header = clone(tmp_path / "c", tmp_path / "b", "raw")
    fill(tmp_path / "c", header, [], range(4))
    assert summary(tmp_path / "c") == [(0, 4, BASE_ZERO, 1)]


def test_unclean_image_is_mapped_after_replay(tmp_path):
    sparse(tmp_path / "b", 4, range(4))
    header = clone(tmp_path / "c", tmp_path / "b", "raw")
    fill(tmp_path / "c", header, [], [1])
    sector = seal_sector([BitmapRecord(8, 8)], Trailer(1, 1), header.extension.image_uuid)
    with (tmp_path / "c").open("r+b") as file:
        file.seek(header.journal_offset)
        file.write(sector)
    assert summary(tmp_path / "c") == [(0, 1, BASE, 1), (1, 1, DATA, 0), (2, 2, BASE, 1)]


def test_base_that_ends_within_a_block(tmp_path):
    (tmp_path / "b").write_bytes(b"x" * (BLOCK + 700))
    clone(tmp_path / "c", tmp_path / "b", "raw", size=4 * BLOCK)
    extents = list(map_image(tmp_path / "c"))
    assert [(e.start, e.length, e.kind) for e in extents] == [
        (0, BLOCK + 700, BASE), (BLOCK + 700, 324, BASE_ZERO),
        (BLOCK + 1024, 3 * BLOCK - 1024, ZERO),
    ]  # fmt: skip


def test_image_without_a_base_has_data_and_zeros(tmp_path):
    header = create_image(tmp_path / "c", CreateOptions(size=4 * BLOCK)).header
    fill(tmp_path / "c", header, [], [2])
    assert summary(tmp_path / "c") == [(0, 2, ZERO, 0), (2, 1, DATA, 0), (3, 1, ZERO, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_chain_equals_the_model(tmp_path, seed):
    """Raw file under two images of different sizes; the model asks block by block."""
    rng = random.Random(seed)

    def some(blocks):
        return {block for block in range(blocks) if rng.random() < 0.4}

    sizes = [rng.randrange(1, 40) for _ in range(3)]
    holds = [some(size) for size in sizes]
    bits = [some(size) for size in sizes]
    raw = sparse(tmp_path / "0", sizes[0], holds[0])
    paths, previous, base_format, covered = [raw], raw, "raw", [0]
    for level in (1, 2):
        path = tmp_path / str(level)
        header = clone(path, previous, base_format, size=sizes[level] * BLOCK)
        covered.append(header.base_img_size // BLOCK)
        fill(path, header, bits[level] & set(range(covered[level])), holds[level])
        paths.append(path)
        previous, base_format = path, "fvd"
        # The identity of the base is its session, which filling does not change.
        assert Header.unpack(path.read_bytes()[:8192]) == header

    def expected(level, block):
        depth = 2 - level
        assert block < sizes[level]
        is_local = level == 0 or block >= covered[level] or block in bits[level]
        if not is_local:
            return expected(level - 1, block)
        if block in holds[level]:
            return (BASE if depth else DATA), depth
        return (BASE_ZERO if depth else ZERO), depth

    found = {}
    position = 0
    for extent in map_image(paths[2]):
        assert extent.start == position
        position = extent.end
        for block in range(extent.start // BLOCK, extent.end // BLOCK):
            found[block] = (extent.kind, extent.depth)
    assert position == sizes[2] * BLOCK
    assert found == {block: expected(2, block) for block in range(sizes[2])}


def test_file_without_hole_information_is_all_data(monkeypatch, tmp_path):
    fd = os.open(sparse(tmp_path / "f", 4, [1]), os.O_RDONLY)

    def refuse(fd, offset, whence):
        raise OSError(22, "Invalid argument")

    try:
        whole = list(file_extents(fd, 0, 4 * BLOCK))
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(file_extents(fd, 0, 4 * BLOCK)) == [(0, 4 * BLOCK, True)]
    finally:
        os.close(fd)
    assert whole == [(0, BLOCK, False), (BLOCK, BLOCK, True), (2 * BLOCK, 2 * BLOCK, False)]


def test_neighbours_are_merged_through_the_whole_bitmap(tmp_path):
    sparse(tmp_path / "b", 64, [])
    header = clone(tmp_path / "c", tmp_path / "b", "raw")
    fill(tmp_path / "c", header, range(3, 50), range(64))
    assert summary(tmp_path / "c") == [
        (0, 3, BASE_ZERO, 1), (3, 47, DATA, 0), (50, 14, BASE_ZERO, 1),
    ]  # fmt: skip
