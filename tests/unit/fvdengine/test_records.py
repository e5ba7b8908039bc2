# SPDX-License-Identifier: Apache-2.0
"""Journal records: round trips, torn sectors, bounds, and replay against a plain model."""

import random
import struct
import time
import tracemalloc
from array import array
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvdengine import records
from fvdengine.errors import InvalidJournal
from fvdengine.records import (
    BitmapRecord,
    MalformedSector,
    SectorState,
    TableRecord,
    Trailer,
    parse_sector,
    plain_sector,
    read_journal,
    replay,
    seal_sector,
)

UUID = bytes(range(16))
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
bitmap_records = st.builds(BitmapRecord, u64, u32)
trailers = st.builds(Trailer, u64, u64)


def table_records(epoch, limit):
    entries = st.lists(u32, max_size=limit).map(tuple)
    return st.builds(TableRecord, st.just(epoch), u32, entries)


@given(st.lists(bitmap_records, max_size=30), trailers, st.binary(min_size=16, max_size=16))
def test_sealed_bitmap_records_survive(items, trailer, uuid):
    sector = seal_sector(items, trailer, uuid)
    assert len(sector) == 512
    found = parse_sector(sector, 5, uuid)
    assert found == records.JournalSector(5, SectorState.SEALED, tuple(items), trailer)


@given(st.data(), trailers)
def test_table_record_and_bitmap_record_share_a_sector(data, trailer):
    items = [data.draw(table_records(trailer.epoch, 112)), data.draw(bitmap_records)]
    found = parse_sector(seal_sector(items, trailer, UUID), 0, UUID)
    assert list(found.records) == items


def test_capacities_are_those_of_the_format():
    trailer = Trailer(1, 1)
    full = [BitmapRecord(0, 8)] * records.BITMAP_RECORDS_MAX
    seal_sector(full, trailer, UUID)
    with pytest.raises(ValueError, match="do not fit"):
        seal_sector([*full, BitmapRecord(0, 8)], trailer, UUID)
    entries = (7,) * records.TABLE_ENTRIES_MAX
    seal_sector([TableRecord(1, 0, entries)], trailer, UUID)
    with pytest.raises(ValueError, match="do not fit"):
        seal_sector([TableRecord(1, 0, (*entries, 7))], trailer, UUID)
    seal_sector([TableRecord(1, 0, entries[:112]), BitmapRecord(0, 8)], trailer, UUID)


def test_fields_stand_at_their_published_places():
    sector = seal_sector([BitmapRecord(0x1122334455, 8)], Trailer(3, 9), UUID)
    assert struct.unpack_from("<IIQI", sector) == (0x3F2AB8ED, 8, 0x1122334455, 0)
    assert struct.unpack_from("<I", sector, 488) == (0x544A5646,)
    assert struct.unpack_from("<QQ", sector, 496) == (3, 9)
    plain = plain_sector([TableRecord(4, 5, (6, 7))])
    assert struct.unpack_from("<IQIIII", plain) == (0xB4E6F7AC, 4, 2, 5, 6, 7)


@given(st.lists(bitmap_records, min_size=1, max_size=30), trailers, st.integers(0, 511),
       st.integers(1, 255))  # fmt: skip
def test_any_changed_byte_unseals_the_sector(items, trailer, position, flip):
    sector = bytearray(seal_sector(items, trailer, UUID))
    sector[position] ^= flip
    if 488 <= position < 492:  # no trailer any more: what is left are plain records
        try:
            state = parse_sector(bytes(sector), 0, UUID).state
        except MalformedSector:
            state = SectorState.PLAIN
        assert state is SectorState.PLAIN
    else:
        assert parse_sector(bytes(sector), 0, UUID).state is SectorState.TORN


def test_sector_of_another_image_is_not_ours():
    sector = seal_sector([BitmapRecord(0, 8)], Trailer(1, 1), UUID)
    assert parse_sector(sector, 0, bytes(16)).state is SectorState.TORN


@given(st.binary(min_size=512, max_size=512))
def test_junk_is_parsed_or_refused(data):
    try:
        found = parse_sector(data, 0, UUID)
    except MalformedSector:
        return
    assert found.state in SectorState


def test_plain_sector_may_be_full_to_the_last_byte():
    items = [TableRecord(1, 0, tuple(range(1, 120))), BitmapRecord(8, 8)]
    sector = plain_sector(items)
    assert len(sector.rstrip(b"\0")) > 500
    assert list(parse_sector(sector, 0, UUID).records) == items


# Replay ------------------------------------------------------------------------------------


def sealed(header, *items, epoch=1, sequence=1):
    return seal_sector(items, Trailer(epoch, sequence), header.extension.image_uuid)


def bits(bitmap):
    return {n for n in range(len(bitmap) * 8) if bitmap[n >> 3] >> (n & 7) & 1}


def replayed(header, *sectors):
    bitmap = bytearray(header.bitmap_size)
    journal = read_journal(b"".join(sectors), header, "x.fvd")
    changed = replay(journal, header, bitmap)
    assert changed.blocks == len(bits(bitmap))
    return bits(bitmap)


def test_record_sets_the_bits_of_its_blocks(header):
    assert replayed(header, sealed(header, BitmapRecord(8, 24))) == {1, 2, 3}


def test_stale_epoch_is_ignored_unseen(header):
    nonsense = sealed(header, BitmapRecord(1 << 60, 8), epoch=4)
    live = sealed(header, BitmapRecord(0, 8), epoch=5)
    assert replayed(replace(header, stable_journal_epoch=5), nonsense, live) == {0}


def test_torn_sector_is_ignored_as_a_whole(header):
    torn = bytearray(sealed(header, BitmapRecord(0, 8), BitmapRecord(80, 8)))
    torn[20] ^= 1
    journal = read_journal(bytes(torn) + sealed(header, BitmapRecord(8, 8)), header, "x.fvd")
    assert journal.torn == [0]
    assert [sector.position for sector in journal.live] == [1]


def test_sector_without_trailer_counts_only_where_none_is_promised(header):
    plain = plain_sector([BitmapRecord(16, 8)])
    assert replayed(header, plain) == set()
    older = replace(header, last_open_version=1)
    assert replayed(older, plain) == {2}


def test_plain_record_is_widened_and_cut_at_the_base(header):
    older = replace(header, last_open_version=1, virtual_disk_size=2 << 20)
    last = header.base_img_size // 4096 - 1
    first = header.base_img_size // 512 - 1
    assert replayed(older, plain_sector([BitmapRecord(9, 2), BitmapRecord(first, 100)])) == {
        1, last,
    }  # fmt: skip


BAD = {
    "past the end": [BitmapRecord(2048 - 8, 16)],
    "far past the end": [BitmapRecord(1 << 63, 8)],
    "no sectors": [BitmapRecord(0, 0)],
    "table record": [TableRecord(1, 0, (1,))],
}


@pytest.mark.parametrize("items", BAD.values(), ids=BAD)
def test_one_bad_record_stops_the_whole_replay(header, items):
    good = sealed(header, BitmapRecord(0, 8), sequence=1)
    with pytest.raises(InvalidJournal, match="sector 1"):
        read_journal(good + sealed(header, *items, sequence=2), header, "x.fvd")


def test_table_record_of_another_epoch_than_its_sector_is_refused(header):
    with pytest.raises(InvalidJournal, match="of epoch 7, not 1"):
        read_journal(sealed(header, TableRecord(7, 0, (1,))), header, "x.fvd")


def test_unknown_record_under_a_good_sum_is_refused(header):
    uuid = header.extension.image_uuid
    raw = bytearray(seal_sector([BitmapRecord(0, 8)], Trailer(1, 1), uuid))
    struct.pack_into("<I", raw, 16, 0xDEADBEEF)
    struct.pack_into("<I", raw, 492, records.sector_crc(uuid, bytes(raw), 492))
    with pytest.raises(InvalidJournal, match="0xdeadbeef"):
        read_journal(bytes(raw), header, "x.fvd")


def test_sectors_are_ordered_by_epoch_and_sequence(header):
    order = [(2, 5), (1, 9), (2, 4), (1, 3)]
    data = b"".join(
        sealed(header, BitmapRecord(0, 8), epoch=epoch, sequence=sequence)
        for epoch, sequence in order
    )
    journal = read_journal(data, header, "x.fvd")
    found = [(sector.trailer.epoch, sector.trailer.sequence) for sector in journal.live]
    assert found == sorted(order)
    assert (journal.highest_epoch, journal.highest_sequence) == (2, 9)
    assert records.next_epoch(journal, header) == 3


def test_next_epoch_never_falls_behind_the_stable_one(header):
    journal = read_journal(bytes(4096), header, "x.fvd")
    assert records.next_epoch(journal, replace(header, stable_journal_epoch=41)) == 42


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_replay_equals_the_model(header, seed):
    rng = random.Random(seed)
    expected, sectors = set(), []
    for sequence in range(rng.randrange(1, 12)):
        items = []
        epoch = rng.choice([1, 2, 3, 4])
        for _ in range(rng.randrange(31)):
            first = rng.randrange(256)
            count = rng.randrange(1, 257 - first)
            items.append(BitmapRecord(first * 8, count * 8))
            if epoch >= 3:
                expected.update(range(first, first + count))
        sectors.append(sealed(header, *items, epoch=epoch, sequence=sequence))
    rng.shuffle(sectors)
    assert replayed(replace(header, stable_journal_epoch=3), *sectors) == expected


def test_records_of_the_whole_disk_are_replayed_in_no_time(header):
    """A hostile journal may name every block in every record: replay works on stretches."""
    blocks = 1 << 26
    bitmap = bytearray(blocks // 8)
    begin = time.process_time()
    assert sum(records.set_bits(bitmap, range(3, blocks)) for _ in range(20)) == blocks - 3
    assert time.process_time() - begin < 10
    assert bitmap[0] == 0xF8
    assert set(bitmap[1:]) == {0xFF}


# Tables ------------------------------------------------------------------------------------

UNMAPPED = 0xFFFFFFFF


@pytest.fixture
def compact(header):
    """The header of `image` with a table of 16 chunks of 64 KiB."""
    return replace(header, table_offset=86016, table_size=4096, chunk_size=65536)


def table_after(header, *sectors, before=None):
    before = before or [UNMAPPED] * 16
    table = array("I", before)
    journal = read_journal(b"".join(sectors), header, "x.fvd")
    changes = replay(journal, header, bytearray(header.bitmap_size), table)
    assert changes.chunks == sum(a != b for a, b in zip(table, before, strict=True))
    return list(table)


def test_table_record_maps_and_unmaps(compact):
    sector = sealed(compact, TableRecord(1, 2, (7, UNMAPPED, 3)))
    assert table_after(compact, sector, before=[*range(16)]) == [
        0, 1, 7, UNMAPPED, 3, *range(5, 16),
    ]  # fmt: skip


def test_mark_in_a_record_is_masked_off(compact):
    assert table_after(compact, sealed(compact, TableRecord(1, 0, (0x80000005,))))[0] == 5


def test_both_records_of_a_sector_are_applied(compact):
    sector = sealed(compact, TableRecord(1, 1, (4,)), BitmapRecord(128, 8))
    journal = read_journal(sector, compact, "x.fvd")
    bitmap, table = bytearray(compact.bitmap_size), array("I", [UNMAPPED] * 16)
    assert replay(journal, compact, bitmap, table) == records.Changes(1, 1)
    assert (bits(bitmap), table[1]) == ({16}, 4)


def test_later_records_win_wherever_they_stand(compact):
    def one(place, epoch, sequence):
        return sealed(compact, TableRecord(epoch, 0, (place,)), epoch=epoch, sequence=sequence)

    # A ring: the newest sector stands first, and the sequence decides inside an epoch.
    sectors = [one(9, 4, 12), one(8, 3, 11), one(5, 3, 9), one(7, 3, 10)]
    for shuffled in (sectors, sectors[::-1]):
        assert table_after(compact, *shuffled)[0] == 9
        assert table_after(compact, *[s for s in shuffled if s != sectors[0]])[0] == 8


def test_plain_table_records_are_ordered_by_their_own_epoch(compact):
    older = replace(compact, last_open_version=1, stable_journal_epoch=5)
    sectors = [
        plain_sector([TableRecord(8, 0, (8,))]),
        plain_sector([TableRecord(6, 0, (6,)), TableRecord(9, 1, (9,))]),
        plain_sector([TableRecord(4, 2, (4,)), BitmapRecord(8, 8)]),  # the epoch is over
        plain_sector([TableRecord(6, 3, (1,))]),
        plain_sector([TableRecord(6, 3, (2,))]),  # the same epoch: the position decides
    ]
    assert table_after(older, *sectors)[:4] == [8, 9, UNMAPPED, 2]
    journal = read_journal(b"".join(sectors), older, "x.fvd")
    assert records.next_epoch(journal, older) == 10
    bitmap = bytearray(older.bitmap_size)
    replay(journal, older, bitmap)
    assert bits(bitmap) == {1}  # a bitmap record has no epoch: it always counts


def test_plain_sector_may_hold_119_entries_and_a_bitmap_record(compact):
    large = replace(
        compact, last_open_version=1, virtual_disk_size=200 * 65536, base_img_size=1 << 20
    )
    sector = plain_sector([TableRecord(3, 5, tuple(range(119))), BitmapRecord(0, 8)])
    assert len(sector) == 512
    table = array("I", [UNMAPPED] * 200)
    journal = read_journal(sector, large, "x.fvd")
    assert replay(journal, large, bytearray(4096), table) == records.Changes(1, 119)
    assert table[4:7] == array("I", [UNMAPPED, 0, 1])


BAD_TABLE = {
    "past the end": ([TableRecord(1, 15, (1, 2))], "2 entries at 15, past the end"),
    "far past the end": ([TableRecord(1, 0xFFFFFFFF, (1,))], "past the end"),
    "no entries": ([TableRecord(1, 0, ())], "no entries"),
    "no place": ([TableRecord(1, 0, (0x7FFFFFFF,))], "0x7fffffff, which is no place"),
    "another epoch": ([TableRecord(2, 0, (1,))], "epoch 2, not 1"),
}


@pytest.mark.parametrize(("items", "text"), BAD_TABLE.values(), ids=BAD_TABLE)
def test_bad_table_record_stops_the_whole_replay(compact, items, text):
    good = sealed(compact, TableRecord(1, 0, (1,)), sequence=1)
    with pytest.raises(InvalidJournal, match=f"sector 1 .*{text}"):
        read_journal(good + sealed(compact, *items, sequence=2), compact, "x.fvd")


def test_stale_plain_table_record_is_not_looked_into(compact):
    older = replace(compact, last_open_version=1, stable_journal_epoch=5)
    sector = plain_sector([TableRecord(4, 1 << 31, (1,))])
    assert table_after(older, sector) == [UNMAPPED] * 16
    with pytest.raises(InvalidJournal, match="past the end"):
        read_journal(sector, replace(older, stable_journal_epoch=4), "x.fvd")


def test_plain_epoch_near_the_limit_is_refused(compact):
    older = replace(compact, last_open_version=1)
    with pytest.raises(InvalidJournal, match="epoch out of range"):
        read_journal(plain_sector([TableRecord(1 << 62, 0, (1,))]), older, "x.fvd")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_table_replay_equals_the_model(compact, seed):
    rng = random.Random(seed)
    expected, sectors = [UNMAPPED] * 16, []
    epoch = 1
    for sequence in range(rng.randrange(1, 12)):
        epoch += rng.random() < 0.3
        first = rng.randrange(16)
        entries = tuple(
            rng.choice([UNMAPPED, rng.randrange(1 << 20)])
            for _ in range(rng.randrange(1, 17 - first))
        )
        if epoch >= 3:
            expected[first : first + len(entries)] = entries
        record = TableRecord(epoch, first, entries)
        sectors.append(sealed(compact, record, epoch=epoch, sequence=sequence))
    rng.shuffle(sectors)
    assert table_after(replace(compact, stable_journal_epoch=3), *sectors) == expected


def test_records_of_a_hostile_journal_are_never_all_in_memory(header):
    """7,680 of them; they took 1 MiB when they were kept."""
    sector = sealed(header, *[BitmapRecord(0, 8)] * 30)
    journal = sector * 256
    tracemalloc.start()
    try:
        found = read_journal(journal, header, "x.fvd")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(found.live), found.record_count) == (256, 7680)
    assert peak < 512 << 10
