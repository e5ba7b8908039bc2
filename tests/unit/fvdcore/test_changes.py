# SPDX-License-Identifier: Apache-2.0
"""What a commit takes: bits and entries as records, and that no sector promises too much (I1)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdengine.records import BitmapRecord, TableRecord, parse_sector

UUID = bytes(range(16))
BLOCK = 4096
CHUNK = 4 * BLOCK
BLOCKS = 4096
UNMAPPED = 0xFFFFFFFF
CLOSED = 0x80000000


def journal_of(probes, *, blocks=BLOCKS, chunks=BLOCKS, pages=64, cut=0):
    store = probes.storage.Storage(bytes(4096 * (1 + pages)))
    one = probes.journal.Journal(
        store, 4096, pages * 4096, UUID, BLOCK, blocks * BLOCK - cut, chunks
    )
    one.replay(1)
    return one


@pytest.fixture
def journal(probes):
    return lambda **options: journal_of(probes, **options)


def sectors_of(one):
    """The records of each sector of the batch, as Python's codec reads them."""
    one.seal()
    return [parse_sector(data, 0, UUID).records for data in one.sectors()]


def entries_of(found):
    return {
        chunk: entry
        for record in found if isinstance(record, TableRecord)
        for chunk, entry in enumerate(record.entries, record.first_index)
    }  # fmt: skip


def blocks_of(found):
    return {
        sector // 8
        for record in found if isinstance(record, BitmapRecord)
        for sector in range(record.first_sector, record.first_sector + record.sectors)
    }  # fmt: skip


def test_nothing_pending_is_an_empty_batch(journal):
    one = journal()
    assert one.take(CHUNK) == {
        "blocks": 0, "counted": 0, "entries": 0, "places_end": 0, "overflow": False,
    }  # fmt: skip
    assert one.sectors() == []


def test_blocks_of_a_mapped_chunk_stand_beside_its_entry(journal):
    one = journal()
    one.set_entry(2, 7)
    one.set_present(9, 11)
    taken = one.take(CHUNK)
    assert sectors_of(one) == [(BitmapRecord(72, 16), TableRecord(2, 2, (7,)))]
    assert (taken["blocks"], taken["counted"], taken["entries"]) == (2, 2, 1)
    assert taken["places_end"] == 8


def test_blocks_of_durable_chunks_need_no_entry(journal):
    one = journal()
    one.set_entry(2, 7)
    one.take(CHUNK)
    one.apply()
    assert one.loose() == []
    one.set_present(9, 11)
    assert one.take(CHUNK)["entries"] == 0
    assert sectors_of(one) == [(BitmapRecord(72, 16),)]


def test_an_entry_without_blocks_is_recorded_alone(journal):
    one = journal()
    for chunk in (5, 6, 7, 900):
        one.set_entry(chunk, chunk + 1)
    one.set_entry(6, UNMAPPED)
    assert one.take(CHUNK)["places_end"] == 902
    assert sectors_of(one) == [
        (TableRecord(2, 5, (6, UNMAPPED, 8)), TableRecord(2, 900, (901,))),
    ]  # fmt: skip


def test_a_place_that_is_being_moved_is_recorded_without_its_mark(journal):
    one = journal()
    one.set_entry(5, 9)
    one.set_entry(5, 9 | CLOSED)
    one.take(CHUNK)
    assert sectors_of(one) == [(TableRecord(2, 5, (9,)),)]


def test_each_change_is_taken_once(journal):
    one = journal()
    one.set_entry(2, 7)
    one.set_present(8, 12)
    one.take(CHUNK)
    one.apply()
    assert one.take(CHUNK)["blocks"] == 0
    assert one.sectors() == []


def test_a_change_during_a_commit_is_taken_by_the_next(journal):
    one = journal()
    one.set_entry(2, 7)
    one.take(CHUNK)
    one.set_entry(2, 8)
    one.apply()
    assert one.loose() == [2]
    one.set_present(8, 9)
    one.take(CHUNK)
    assert sectors_of(one) == [(BitmapRecord(64, 8), TableRecord(2, 2, (8,)))]


def test_a_run_over_many_chunks_stands_beside_the_entries_that_are_loose(journal):
    one = journal()
    one.set_entry(3, 0)
    one.set_present(4, 32)
    one.take(CHUNK)
    assert sectors_of(one) == [
        (BitmapRecord(32, 96), TableRecord(2, 3, (0,)),
         BitmapRecord(128, 128)),
    ]  # fmt: skip


def test_the_last_block_ends_with_the_base(journal):
    one = journal(blocks=6, cut=1024)
    one.set_present(5, 6)
    one.take(CHUNK)
    assert blocks_of(sectors_of(one)[0]) == {5}


def test_without_a_bitmap_entries_alone_are_taken(journal):
    one = journal()
    one.set_entry(3, 4)
    one.set_present(0, 1)
    assert one.take(CHUNK, with_bitmap=False)["blocks"] == 0
    assert sectors_of(one) == [(TableRecord(2, 3, (4,)),)]


@pytest.mark.parametrize("step", [1, 2])
def test_more_than_a_batch_holds_is_said(journal, step):
    one = journal(pages=1)
    for chunk in range(0, 928 * step + step, step):
        one.set_entry(chunk, chunk)
    taken = one.take(CHUNK)
    assert taken["overflow"]
    assert len(one.sectors()) == 8


def test_a_full_batch_that_just_fits_is_no_overflow(journal):
    one = journal(pages=1)
    for chunk in range(8 * 116):
        one.set_entry(chunk, chunk)
    assert not one.take(CHUNK)["overflow"]
    assert [len(entries_of(found)) for found in sectors_of(one)] == [116] * 8


changes = st.lists(st.one_of(
    st.tuples(st.just("map"), st.integers(0, 40), st.integers(0, 500)),
    st.tuples(st.just("trim"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("bits"), st.integers(0, 159), st.integers(1, 30)),
    st.tuples(st.just("commit"), st.just(0), st.just(0)),
), max_size=40)  # fmt: skip


@settings(max_examples=150)
@given(steps=changes, chunk_blocks=st.integers(1, 9))
def test_no_sector_sets_a_bit_whose_entry_is_neither_durable_nor_in_it(probes, steps, chunk_blocks):
    """And all sectors together say all that changed."""
    one = journal_of(probes, blocks=160, chunks=200)
    table, durable, local = {}, {}, set()

    def commit():
        taken = one.take(chunk_blocks * BLOCK)
        assert not taken["overflow"]
        for found in sectors_of(one):
            entries = entries_of(found)
            for block in blocks_of(found):
                chunk = block // chunk_blocks
                now = table.get(chunk, UNMAPPED)
                assert entries.get(chunk, durable.get(chunk, UNMAPPED)) == now
            durable.update(entries)
        one.apply()
        assert {c: e for c, e in durable.items() if e != UNMAPPED} == table
        seen = int.from_bytes(one.durable(), "little")
        assert seen == sum(1 << block for block in local)
        assert one.loose() == []

    for step, at, value in steps:
        if step == "map":
            table[at] = value
            one.set_entry(at, value)
        elif step == "trim":
            table.pop(at, None)
            one.set_entry(at, UNMAPPED)
        elif step == "bits":
            end = min(160, at + value)
            local |= set(range(at, end))
            one.set_present(at, end)
        else:
            commit()
    commit()
