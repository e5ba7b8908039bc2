# SPDX-License-Identifier: Apache-2.0
"""Replay: which sectors count, in which order, and that one bad record lets nothing be applied."""

import errno
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdengine import records
from fvdengine.records import BitmapRecord, TableRecord, Trailer

UUID = bytes(range(16))
OTHER = bytes(range(16, 32))
UNMAPPED = 0xFFFFFFFF
CHUNKS = 300
BLOCKS = 64
BLOCK = 4096
OFFSET = 4096
BAD = -errno.EUCLEAN


@pytest.fixture
def journal(probes):
    """A journal that holds these sectors: journal([bytes, ...])."""

    def make(sectors=(), *, blocks=BLOCKS, chunks=CHUNKS, pages=None):
        content = b"".join(sectors)
        size = pages * 4096 if pages else -(-len(content) // 4096) * 4096 or 4096
        store = probes.storage.Storage(bytes(OFFSET) + content.ljust(size, b"\0"))
        return probes.journal.Journal(store, OFFSET, size, UUID, BLOCK, blocks * BLOCK, chunks)

    return make


def ours(*found, epoch=5, sequence=1, uuid=UUID):
    return records.seal_sector(found, Trailer(epoch, sequence), uuid)


def plain(*found):
    return records.plain_sector(found)


def maps(chunk, *entries, epoch=5):
    return TableRecord(epoch, chunk, entries)


def bits(first, count=1):
    """Blocks as a record names them."""
    return BitmapRecord(first * 8, count * 8)


def mapped(one):
    return {chunk: entry for chunk, entry in enumerate(one.entries()) if entry != UNMAPPED}


def local(one):
    data = one.durable()
    return {n for n in range(len(data) * 8) if data[n // 8] >> n % 8 & 1}


def untouched(one):
    return mapped(one) == {} and local(one) == set()


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_later_sequences_win_wherever_they_lie(journal, swap):
    sectors = [ours(maps(3, 10, 11), sequence=7), ours(maps(3, 20, UNMAPPED), sequence=8)]
    one = journal(sectors[::-1] if swap else sectors)
    assert one.replay(5) == 2
    assert mapped(one) == {3: 20}


def test_an_epoch_outweighs_a_sequence(journal):
    one = journal([
        ours(maps(3, 10, epoch=6), epoch=6, sequence=1), ours(maps(3, 20), epoch=5, sequence=99),
    ])  # fmt: skip
    assert one.replay(5) == 2
    assert mapped(one) == {3: 10}
    assert (one.epoch, one.sequence) == (7, 100)


def test_epochs_before_the_stable_one_are_not_even_looked_into(journal):
    worst = b"\x12\x34\x56\x78" + bytes(484)
    one = journal([
        ours(maps(1, 7, epoch=4), bits(0), epoch=4, sequence=50), sealed(worst, epoch=4),
        ours(maps(2, 8)),
    ])  # fmt: skip
    assert one.replay(5) == 1
    assert mapped(one) == {2: 8}
    assert local(one) == set()
    assert one.sequence == 51


def test_numbers_go_on_from_the_stable_epoch_where_nothing_is_found(journal):
    one = journal()
    assert one.replay(41) == 0
    assert (one.epoch, one.sequence) == (42, 1)


def test_records_of_one_sector_are_applied_in_their_order(journal):
    one = journal([ours(maps(3, 10), bits(4), maps(3, 11), maps(4, 12), maps(4, UNMAPPED))])
    assert one.replay(5) == 1
    assert mapped(one) == {3: 11}
    assert local(one) == {4}


def test_a_mark_of_an_older_writer_is_masked(journal):
    one = journal([ours(maps(3, 0x80000009))])
    assert one.replay(5) == 1
    assert mapped(one) == {3: 9}


def test_what_is_replayed_is_not_loose(journal):
    one = journal([ours(maps(3, 10))])
    one.replay(5)
    assert one.loose() == []


# -- older writers -------------------------------------------------------------------------------


def test_sectors_of_an_older_writer_come_in_the_order_of_their_epochs_then_places(journal):
    sectors = [
        plain(maps(1, 30, epoch=9)), plain(maps(1, 20, epoch=8), maps(2, 21, epoch=8)),
        plain(maps(2, 31, epoch=9)), plain(maps(1, 40, epoch=9), maps(3, 41, epoch=9)),
        plain(maps(4, 50, epoch=4)),
    ]  # fmt: skip
    one = journal(sectors)
    assert one.replay(5, trailers=False) == 5
    assert mapped(one) == {1: 40, 2: 31, 3: 41}, "and epochs below the stable one do not count"
    assert one.epoch == 10


def test_bits_of_an_older_writer_always_count(journal):
    one = journal([plain(maps(4, 50, epoch=2), bits(6))])
    assert one.replay(5, trailers=False) == 1
    assert local(one) == {6}
    assert mapped(one) == {}


def test_an_older_writer_s_records_fill_the_whole_sector(journal):
    one = journal([plain(*(bits(n) for n in range(32)))])
    assert one.replay(5, trailers=False) == 1
    assert local(one) == set(range(32))
    one = journal([plain(maps(0, *range(123)))])
    assert one.replay(5, trailers=False) == 1
    assert mapped(one) == {n: n for n in range(123)}


def test_where_trailers_are_promised_plain_sectors_are_ignored(journal):
    one = journal([plain(maps(4, 50)), b"\x12\x34\x56\x78" * 128])
    assert one.replay(5) == 0
    assert untouched(one)


def test_ours_come_after_an_older_writer_s(journal):
    one = journal([ours(maps(1, 2, epoch=6), epoch=6), plain(maps(1, 3, epoch=50))])
    assert one.replay(5, trailers=False) == 2
    assert mapped(one) == {1: 2}
    assert one.epoch == 51


def test_an_older_writer_may_name_sectors_up_to_the_disk_s_end(journal):
    one = journal([plain(BitmapRecord(BLOCKS * 8 - 3, 8)), plain(BitmapRecord(BLOCKS * 8 + 9, 4))])
    assert one.replay(5, trailers=False, disk_size=2 * BLOCKS * BLOCK) == 2
    assert local(one) == {BLOCKS - 1}


def test_bits_of_an_older_writer_are_not_widened_but_touch_their_blocks(journal):
    one = journal([plain(BitmapRecord(7, 2))])
    assert one.replay(5, trailers=False) == 1
    assert local(one) == {0, 1}


# -- what does not count ------------------------------------------------------------------------


@pytest.mark.parametrize("trailers", [True, False])
@pytest.mark.parametrize("at", [0, 3, 17, 487, 492, 493, 500, 511])
def test_a_torn_sector_is_ignored_as_a_whole(journal, at, trailers):
    torn = bytearray(ours(maps(1, 2), bits(5), sequence=77))
    torn[at] ^= 1
    one = journal([bytes(torn), ours(maps(3, 4))])
    assert one.replay(5, trailers=trailers) == 1
    assert mapped(one) == {3: 4}
    assert local(one) == set()
    assert one.sequence == 2, "nor does its sequence"


def test_a_sector_of_another_image_is_ignored(journal):
    one = journal([ours(maps(1, 2), uuid=OTHER)])
    assert one.replay(5) == 0
    assert untouched(one)


def test_holes_are_not_read(probes, journal):
    store = probes.storage.Storage(bytes(OFFSET) + bytes(1 << 20) + ours(maps(1, 2)) + bytes(3584))
    one = probes.journal.Journal(store, OFFSET, (1 << 20) + 4096, UUID, BLOCK, BLOCK, 9)
    assert one.replay(5) == 1
    read = [entry for entry in store.log("read") if entry[1] < OFFSET + (1 << 20)]
    assert read == []


# -- hostile records: refused, and nothing applied ------------------------------------------------


def sealed(body, *, epoch=5, sequence=3):
    """Any 488 bytes under a good sum."""
    blank = body.ljust(488, b"\0") + struct.pack("<2I2Q", 0x544A5646, 0, epoch, sequence)
    return blank[:492] + struct.pack("<I", records.sector_crc(UUID, blank, 492)) + blank[496:]


def bitmap_body(sectors, first):
    return struct.pack("<IIQ", 0x3F2AB8ED, sectors, first)


def table_body(epoch, count, first, *entries):
    head = struct.pack("<IQII", 0xB4E6F7AC, epoch, count, first)
    return head + struct.pack(f"<{len(entries)}I", *entries)


LAST = BLOCKS * 8
HOSTILE = {
    "unknown type": b"\x78\x56\x34\x12" + bytes(60),
    "unknown type behind a good record": bitmap_body(8, 0) + b"\1\0\0\0",
    "unknown type in the last four bytes": bitmap_body(8, 0) * 30 + b"\1\0\0\0",
    "bitmap record of nothing": bitmap_body(0, 8),
    "bitmap record at the end": bitmap_body(1, LAST),
    "bitmap record over the end": bitmap_body(2, LAST - 1),
    "bitmap record of 2 TiB": bitmap_body(0xFFFFFFFF, 0),
    "bitmap record that wraps": bitmap_body(8, (1 << 64) - 8),
    "bitmap record that wraps to the beginning": bitmap_body(0xFFFFFFFF, (1 << 64) - 0xFFFFFFFF),
    "bitmap record over the trailer": bitmap_body(8, 0) * 30 + bitmap_body(8, 0)[:8],
    "table record of nothing": table_body(5, 0, 0),
    "table record behind the table": table_body(5, 1, CHUNKS, 1),
    "table record over the end": table_body(5, 2, CHUNKS - 1, 1, 2),
    "table record with an index that wraps": table_body(5, 1, 0xFFFFFFFF, 1),
    "table record with a count that wraps": table_body(5, 0x40000001, 0, 1),
    "table record longer than its sector": table_body(5, 118, 0, *range(117)),
    "table record of another epoch": table_body(6, 1, 0, 1),
    "table record of no place": table_body(5, 1, 0, 0x7FFFFFFF),
    "table record without room for itself": bitmap_body(8, 0) * 29 + table_body(5, 1, 0, 1)[:20],
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_one_bad_record_under_a_good_sum_lets_nothing_be_applied(journal, name, first):
    good = ours(maps(1, 2), bits(5), sequence=9)
    bad = sealed(HOSTILE[name])
    one = journal([bad, good] if first else [good, bad])
    assert one.replay(5) == BAD
    assert untouched(one)


@pytest.mark.parametrize(("epoch", "sequence"), [
    (1 << 62, 1), ((1 << 64) - 1, 1), (5, 1 << 62),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(journal, epoch, sequence):
    one = journal([ours(maps(1, 2)), sealed(b"", epoch=epoch, sequence=sequence)])
    assert one.replay(5) == BAD
    assert untouched(one)


def test_the_highest_numbers_are_taken(journal):
    top = (1 << 62) - 1
    one = journal([sealed(bitmap_body(8, 0), epoch=top, sequence=top)])
    assert one.replay(5) == 1
    assert (one.epoch, one.sequence) == (top + 1, top + 1)


@pytest.mark.parametrize("body", [
    bitmap_body(0, 0), bitmap_body(1, LAST), table_body(5, 1, CHUNKS, 1), b"\1\0\0\0",
    table_body(1 << 62, 1, 0, 1), table_body(2, 0, 0), table_body(5, 124, 0, *range(123)),
    bitmap_body(8, 0) * 31 + b"\1\0\0\0",
])  # fmt: skip
def test_bad_records_of_an_older_writer_are_refused_too(journal, body):
    one = journal([plain(maps(1, 2), bits(5)), body[:512].ljust(512, b"\0")])
    assert one.replay(5, trailers=False) == BAD
    assert untouched(one)


def test_table_records_need_a_table_and_bitmap_records_a_base(probes, journal):
    assert journal([ours(maps(0, 1))], chunks=0).replay(5) == BAD
    one = journal([ours(bits(0))], blocks=0)
    assert one.replay(5) == BAD
    assert mapped(one) == {}


def test_a_read_error_of_the_second_pass_ends_replay(probes):
    content = [ours(maps(1, 2)), ours(maps(3, 4), sequence=2)]
    store = probes.storage.Storage(bytes(OFFSET) + b"".join(content).ljust(4096, b"\0"))
    one = probes.journal.Journal(store, OFFSET, 4096, UUID, BLOCK, BLOCK, 9)
    store.fail("read", errno.EIO, after=1)
    assert one.replay(5) == -errno.EIO


anything = st.one_of(
    st.builds(bits, st.integers(0, 63), st.just(1)),
    st.builds(lambda c, e: TableRecord(0, c, e), st.integers(0, 20),
              st.lists(st.one_of(st.integers(0, 30), st.just(UNMAPPED)), min_size=1,
                       max_size=4).map(tuple)),
)  # fmt: skip
batch = st.lists(anything, min_size=1, max_size=6)


@settings(max_examples=60)
@given(batches=st.lists(batch, max_size=12), epochs=st.lists(st.integers(1, 9), min_size=12,
       max_size=12), stable=st.integers(1, 6), data=st.data())  # fmt: skip
def test_any_journal_replays_as_its_batches_were_written(probes, batches, epochs, stable, data):
    """Against a plain walk through the batches by (epoch, sequence)."""
    written = [
        (epoch, number, [
            TableRecord(epoch, r.first_index, r.entries) if isinstance(r, TableRecord) else r
            for r in found])
        for number, (epoch, found) in enumerate(zip(sorted(epochs), batches, strict=False), 1)
    ]  # fmt: skip
    table, blocks = {}, set()
    for epoch, _, found in written:
        for record in found if epoch >= stable else ():
            if isinstance(record, TableRecord):
                table |= dict(enumerate(record.entries, record.first_index))
            else:
                blocks.add(record.first_sector // 8)
    sectors = [ours(*found, epoch=epoch, sequence=number) for epoch, number, found in written]
    content = b"".join(data.draw(st.permutations(sectors))).ljust(8192, b"\0")
    store = probes.storage.Storage(bytes(OFFSET) + content)
    one = probes.journal.Journal(store, OFFSET, 8192, UUID, BLOCK, BLOCKS * BLOCK, CHUNKS)
    assert one.replay(stable) == sum(epoch >= stable for epoch, _, _ in written)
    assert mapped(one) == {chunk: entry for chunk, entry in table.items() if entry != UNMAPPED}
    assert local(one) == blocks


# -- time ----------------------------------------------------------------------------------------

MANY = 40_000
spans = st.tuples(
    st.one_of(st.integers(0, MANY - 1), st.integers(0, 9).map(lambda n: n * 4096)),
    st.one_of(st.integers(1, MANY), st.integers(1, 9).map(lambda n: n * 4096)),
).map(lambda s: (s[0], min(s[1], MANY - s[0])))


@settings(max_examples=60)
@given(ranges=st.lists(spans, min_size=1, max_size=40))
def test_overlapping_records_of_many_blocks_set_exactly_their_bits(probes, ranges):
    found = [bits(first, count) for first, count in ranges]
    sectors = [
        ours(*found[at : at + 30], sequence=at + 1) for at in range(0, len(found), 30)
    ]  # fmt: skip
    store = probes.storage.Storage(bytes(OFFSET) + b"".join(sectors).ljust(4096, b"\0"))
    one = probes.journal.Journal(store, OFFSET, 4096, UUID, BLOCK, MANY * BLOCK)
    assert one.replay(5) == len(sectors)
    wanted = 0
    for first, count in ranges:
        wanted |= ((1 << count) - 1) << first
    assert int.from_bytes(one.durable(), "little") == wanted


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_journal_full_of_records_of_the_whole_base_takes_no_time(journal, left_out):
    """61440 records of 2^28 blocks each; filled anew for each, it would be 2 * 10^11 words."""
    blocks = 1 << 28
    found = [bits(left_out, blocks - 2 * left_out)] * 30
    one = journal([ours(*found, sequence=n + 1) for n in range(2048)], blocks=blocks, chunks=0)
    begin = time.monotonic()
    assert one.replay(5) == 2048
    taken = time.monotonic() - begin
    print(f"{taken:.2f} s")
    assert taken < 5
    assert one.durable().count(b"\xff") == blocks // 8 - 2 * left_out
