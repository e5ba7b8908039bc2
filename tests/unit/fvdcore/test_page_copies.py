# SPDX-License-Identifier: Apache-2.0
"""Copies of metadata pages for a checkpoint: what is copied, written, and then durable."""

import errno
import struct

import pytest

UNMAPPED = 0xFFFFFFFF
CLOSED = 0x80000000
PAGE_BLOCKS = 32768
PAGE_ENTRIES = 1024


@pytest.fixture
def table(probes):
    return probes.compact.Table(4 * PAGE_ENTRIES, 4 * 4096)


@pytest.fixture
def store(probes):
    return probes.storage.Storage(b"?" * 65536)


def test_stale_pages_of_the_bitmap_are_written_in_runs(probes, store):
    one = probes.compact.Copies(9 * PAGE_BLOCKS)
    for block in (0, PAGE_BLOCKS, 3 * PAGE_BLOCKS + 9):
        one.set_present(block, block + 1)
    assert one.take_bitmap() == 0
    assert one.stale() == set()
    assert one.write(store, 4096) == (0, 3 * 4096)
    assert store.log("write") == [("write", 4096, 8192, 0), ("write", 16384, 4096, 0)]
    page = b"\1" + bytes(4095)
    wanted = b"?" * 4096 + page * 2 + b"?" * 4096 + b"\0\2" + bytes(4094)
    assert store.content()[:20480] == wanted


def test_what_changes_after_the_copy_is_neither_written_nor_durable(probes, store):
    one = probes.compact.Copies(PAGE_BLOCKS)
    one.set_present(0, 3)
    assert one.take_bitmap() == 0
    one.set_present(3, 9)
    assert one.write(store, 0) == (0, 4096)
    assert store.content()[:4096] == b"\7" + bytes(4095)
    assert one.durable() == set()
    one.settle_bitmap()
    assert one.durable() == {0, 1, 2}
    assert one.stale() == {0}
    assert one.take_bitmap() == 0
    one.settle_bitmap()
    assert one.durable() == set(range(9))


def test_nothing_stale_is_nothing_written(probes, store, table):
    one = probes.compact.Copies(PAGE_BLOCKS)
    assert one.take_bitmap() == one.take_table(table) == 0
    assert one.write(store, 0) == (0, 0)
    assert store.log() == []


def test_entries_are_copied_without_their_marks(probes, store, table):
    one = probes.compact.Copies()
    table.set(0, 5)
    table.set(1, 6)
    table.set(1, 6 | CLOSED)
    table.set(2, 7)
    table.set(2, UNMAPPED)
    assert one.take_table(table) == 0
    assert one.write(store, 0) == (0, 4096)
    assert struct.unpack("<4I", store.content()[:16]) == (5, 6, UNMAPPED, UNMAPPED)
    assert table.entry(1) == 6 | CLOSED


def test_copied_entries_are_loose_no_more_unless_they_changed(probes, table):
    one = probes.compact.Copies()
    for chunk in (3, 4, 2 * PAGE_ENTRIES):
        table.set(chunk, chunk + 1)
    table.take_dirty()
    assert one.take_table(table) == 0
    table.set(4, 77)
    table.set(5, 78)
    one.settle_table(table)
    assert table.loose() == {4, 5}
    assert table.stale() == {0}


def test_pages_that_a_table_grew_by_are_copied_too(probes, store, table):
    one = probes.compact.Copies()
    table.set(1, 2)
    assert one.take_table(table) == 0
    assert table.grow(6 * PAGE_ENTRIES, 6 * 4096) == 0
    table.set(6 * PAGE_ENTRIES - 1, 9)
    assert one.take_table(table) == 0
    assert one.write(store, 0) == (0, 4096)
    assert store.log("write") == [("write", 5 * 4096, 4096, 0)]
    assert store.content()[6 * 4096 - 8 : 6 * 4096] == struct.pack("<2I", UNMAPPED, 9)


@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_write_ends_it_and_tells_what_was_written(probes, store, table, after):
    one = probes.compact.Copies()
    table.set(0, 1)
    table.set(2 * PAGE_ENTRIES, 2)
    assert one.take_table(table) == 0
    store.fail("write", errno.ENOSPC, after=after)
    assert one.write(store, 0) == (-errno.ENOSPC, after * 4096)
    assert table.loose() == {0, 2 * PAGE_ENTRIES}


def test_many_pages_are_copied_exactly(probes):
    """More than stay resident between checkpoints, twice."""
    pages = 70
    one = probes.compact.Copies(pages * PAGE_BLOCKS - 8)
    store = probes.storage.Storage(bytes(pages * 4096))
    for turn in (1, 2):
        for page in range(pages):
            first = page * PAGE_BLOCKS + page
            one.set_present(first, first + turn)
        assert one.take_bitmap() == 0
        assert one.write(store, 0) == (0, pages * 4096)
        one.settle_bitmap()
        number = int.from_bytes(store.content(), "little")
        wanted = {p * PAGE_BLOCKS + p + n for p in range(pages) for n in range(turn)}
        assert sum(1 << bit for bit in wanted) == number
        assert one.durable() == wanted
