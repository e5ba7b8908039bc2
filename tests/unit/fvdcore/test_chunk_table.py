# SPDX-License-Identifier: Apache-2.0
"""The chunk table in memory: what is noted for commits and checkpoints, and for how long."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

UNMAPPED = 0xFFFFFFFF
CLOSED = 0x80000000
PAGE_ENTRIES = 1024
GIB = 1 << 30


@pytest.fixture
def table(probes):
    """Make one: table(chunks)."""

    def make(chunks=3000, **options):
        size = -(-chunks // PAGE_ENTRIES) * 4096
        return probes.compact.Table(chunks, size, **options)

    return make


def test_a_change_is_noted_for_commit_and_checkpoint(table):
    one = table()
    one.set(2500, 7)
    assert one.entry(2500) == 7
    assert one.dirty() == one.loose() == {2500}
    assert one.groups() == {2500 // 64}
    assert one.stale() == {2}
    assert one.counts() == (1, 1, 0)


def test_mapped_and_reused_are_counted(table):
    one = table()
    one.set(0, 5, reused=True)
    one.set(1, 6)
    one.set(0, 9)
    assert one.counts() == (3, 2, 1)
    one.set(0, UNMAPPED)
    one.set(0, UNMAPPED)
    assert one.counts() == (4, 1, 1)


def test_closing_and_opening_a_place_is_no_change(table):
    one = table()
    one.set_durable(4, 8)
    one.set(4, 8 | CLOSED)
    assert one.entry(4) == 8 | CLOSED
    assert one.dirty() == one.loose() == set()
    one.set(4, 8)
    assert one.dirty() == set()


def test_what_was_recorded_is_loose_no_more(table):
    one = table()
    one.set(4, 8)
    assert one.take_dirty() == {4}
    one.recorded(4, 8)
    assert not one.is_loose(4)


def test_an_entry_that_changed_since_its_record_stays_loose(table):
    one = table()
    one.set(4, 8)
    assert one.take_dirty() == {4}
    one.set(4, 9)
    one.recorded(4, 8)
    assert one.is_loose(4)
    assert one.take_dirty() == {4}
    one.recorded(4, 8)
    assert one.is_loose(4)
    one.recorded(4, 9)
    assert not one.is_loose(4)


def test_an_entry_that_changed_and_changed_back_stays_loose(table):
    """What lay between may have been recorded by then."""
    one = table()
    one.set(4, 8)
    assert one.take_dirty() == {4}
    one.set(4, UNMAPPED)
    one.set(4, 8)
    one.recorded(4, 8)
    assert one.is_loose(4)


def test_a_record_of_a_place_counts_while_the_place_is_closed(table):
    one = table()
    one.set(4, 8)
    one.take_dirty()
    one.set(4, 8 | CLOSED)
    one.recorded(4, 8)
    assert not one.is_loose(4)


def test_replay_makes_pages_stale_and_nothing_dirty(table):
    one = table()
    one.set_durable(1024, 3)
    assert one.stale() == {1}
    assert one.dirty() == one.loose() == set()


def test_loading_masks_marks_and_forgets_padding(table):
    one = table(chunks=5)
    for chunk, entry in enumerate([CLOSED | 3, UNMAPPED, 0, 0x7FFFFFFE, CLOSED, 6, 1 << 31]):
        one.load(chunk, entry)
    one.settle_load()
    assert one.entries() == [3, UNMAPPED, 0, 0x7FFFFFFE, 0] + [UNMAPPED] * 1019
    assert one.counts() == (0, 4, 0)


@given(changes=st.dictionaries(st.integers(0, 2999), st.integers(0, 50)))
def test_a_takeover_notes_exactly_what_differs(probes, changes):
    live, disk = (probes.compact.Table(3000, 12288) for _ in range(2))
    for chunk in range(0, 3000, 7):
        live.load(chunk, chunk % 50)
        disk.load(chunk, chunk % 50)
    for chunk, entry in changes.items():
        live.load(chunk, entry)
    live.note_difference(disk)
    different = {c for c in range(3000) if live.entry(c) != disk.entry(c)}
    assert live.dirty() == live.loose() == different
    assert live.groups() == {c // 64 for c in different}
    assert live.stale() == {c // PAGE_ENTRIES for c in different}
    assert live.counts()[0] == len(different)


def test_growing_adds_unmapped_entries_and_moves_nothing(table):
    one = table(chunks=1000)
    one.set(999, 4)
    assert one.grow(1024, 4096) == 0
    assert one.entry(1023) == UNMAPPED
    assert one.grow(5000, 20480) == 0
    assert one.chunks == 5000
    assert one.entry(999) == 4
    assert set(one.entries()[1000:]) == {UNMAPPED}
    one.set(4999, 11)
    assert one.stale() == {0, 4}


def test_whole_pages_of_a_range_are_made_stale(table):
    one = table(chunks=5000)
    one.mark_stale(1024, 2048)
    assert one.stale() == {1}
    one.mark_stale(2047, 3073)
    assert one.stale() == {1, 2, 3}
    one.mark_stale(4096, 4096)
    assert one.stale() == {1, 2, 3}


@pytest.mark.parametrize(
    ("chunks", "size"), [(1, GIB + 4096), (1025, 4096), (1, 4097), (1, 0), (1 << 63, 4096)]
)
def test_impossible_geometry_is_refused(probes, chunks, size):
    with pytest.raises(OSError, match="table_init") as caught:
        probes.compact.Table(chunks, size, fill=False)
    assert caught.value.errno == errno.EFBIG


def test_growing_beyond_the_limit_changes_nothing(table):
    one = table(chunks=1000)
    assert one.grow(1 << 28, GIB + 4096) == -errno.EFBIG
    assert one.chunks == 1000


def test_the_largest_table_stays_within_its_marks(probes):
    """1 GiB of entries: the marks of the last ones are the last bits that there is memory for."""
    one = probes.compact.Table(1 << 28, GIB, fill=False)
    for chunk in (0, (1 << 28) - 1):
        one.set(chunk, 1)
        assert one.is_loose(chunk)
    copies = probes.compact.Copies()
    assert copies.take_table(one) == 0
    store = probes.storage.Storage(b"")
    store.fail("write", errno.ENOSPC, after=1)
    assert copies.write(store, 0) == (-errno.EIO, 0)
    assert [entry[1:3] for entry in store.log("write")] == [(0, 4096)]
    assert one.is_loose(0)
    copies.settle_table(one)
    assert one.is_loose(0), "it is still to be taken by a commit"


def test_live_memory_is_the_file_s(probes, tmp_path):
    path = tmp_path / "live"
    path.write_bytes(b"\0" * 4096 + b"\xff" * 8192)
    with path.open("r+b") as file:
        one = probes.compact.Table(1024, 4096, live_fd=file.fileno(), live_offset=4096, fill=False)
        assert one.entry(0) == UNMAPPED
        one.set(1, 0x1234)
        assert os.pread(file.fileno(), 8, 4096) == b"\xff" * 4 + b"\x34\x12\0\0"
        assert one.grow(2048, 8192, live_fd=file.fileno(), live_offset=4096) == 0
        one.set(1024, 5)
        assert os.pread(file.fileno(), 4, 8192) == b"\5\0\0\0"
        successor = probes.compact.Table(
            2048, 8192, live_fd=file.fileno(), live_offset=4096, fill=False
        )
        assert (successor.entry(1), successor.entry(1024)) == (0x1234, 5)


def test_a_descriptor_that_cannot_be_mapped_is_refused(probes):
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="table_init") as caught:
            probes.compact.Table(1, 4096, live_fd=reader, fill=False)
        assert caught.value.errno in (errno.ENODEV, errno.EACCES)
    finally:
        os.close(reader)
        os.close(writer)
