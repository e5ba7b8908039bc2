# SPDX-License-Identifier: Apache-2.0
"""The journal of the engine against fvdengine/records.py: written, replayed, corrupted, wrapped."""

import errno
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdengine import records
from fvdengine.errors import InvalidJournal
from fvdengine.records import BitmapRecord, Journal, TableRecord, Trailer

UUID = bytes(range(16))
OFFSET = 12288
BLOCKS = 64
SECTOR = 512


class Ring:
    """An image in memory, its journal in C, and what Python reads from the same bytes."""

    def __init__(self, probes, header, content=b""):
        self.header = header
        size = header.journal_offset + header.journal_size
        self.storage = probes.storage.Storage(bytes(header.journal_offset) + content.ljust(
            header.journal_size, b"\0"))
        assert len(self.storage.content()) == size
        self.engine = probes.journal.Journal(
            self.storage, header.journal_offset, header.journal_size, UUID, header.block_size,
            header.base_img_size,
        )  # fmt: skip

    def commit(self, ranges):
        """One batch of (first sector, sectors)."""
        self.engine.begin()
        for first, sectors in ranges:
            rc = self.engine.put(first, sectors)
            if rc < 0:
                return rc
        self.engine.seal()
        return self.engine.write()

    def bytes(self):
        return self.storage.content()[self.header.journal_offset :]

    def parsed(self):
        return records.read_journal(self.bytes(), self.header, "the image")

    def verdict_of_python(self):
        """(error, bits)."""
        try:
            journal = self.parsed()
        except InvalidJournal:
            return -errno.EUCLEAN, None
        bits = bytearray((-(-self.header.base_img_size // self.header.block_size) + 7) // 8)
        records.replay(journal, self.header, bits)
        return 0, bytes(bits)

    def verdict_of_c(self):
        counted = self.engine.replay(self.header.stable_journal_epoch)
        return (counted, None) if counted < 0 else (0, self.engine.durable())


def flat(journal: Journal):
    return [(r.first_sector, r.sectors) for s in journal.live for r in s.records]


@pytest.fixture
def ring(probes, header_of):
    def make(content=b"", **options):
        return Ring(probes, header_of(**options), content)

    return make


spans = st.lists(
    st.tuples(st.integers(0, BLOCKS * 8 - 1), st.integers(1, 64)).map(
        lambda r: (r[0], min(r[1], BLOCKS * 8 - r[0]))
    ),
    min_size=1,
    max_size=100,
)


@settings(max_examples=40)
@given(batches=st.lists(spans, min_size=1, max_size=3), epoch=st.integers(1, 2**62 - 1))
def test_batches_written_by_c_are_parsed_by_python(probes, header_of, batches, epoch):
    ring = Ring(probes, header_of())
    ring.engine.replay(1)
    ring.engine.epoch = epoch
    first = ring.engine.sequence
    pages = 0
    for batch in batches:
        assert ring.commit(batch) == 0
        pages += -(-len(batch) // (30 * 8))
    assert ring.engine.head == pages
    journal = ring.parsed()
    assert flat(journal) == [span for batch in batches for span in batch]
    assert {s.trailer.epoch for s in journal.live} == {epoch}
    assert [s.trailer.sequence for s in journal.live] == list(
        range(first, first + len(journal.live))
    )
    assert journal.torn == journal.ignored_plain == []


sealed = st.builds(
    lambda ranges, epoch, sequence: records.seal_sector(
        [BitmapRecord(first, count) for first, count in ranges], Trailer(epoch, sequence), UUID),
    spans.map(lambda ranges: ranges[:30]), st.integers(0, 6), st.integers(0, 2**62 - 1),
)  # fmt: skip


@settings(max_examples=40)
@given(sectors=st.lists(st.one_of(st.just(bytes(SECTOR)), sealed), max_size=64),
       stable=st.integers(0, 5), block_sectors=st.sampled_from([1, 3, 8]))  # fmt: skip
def test_journals_of_python_replay_in_c_to_the_same_bits(
    probes, header_of, sectors, stable, block_sectors
):
    header = header_of(
        base_size=BLOCKS * 8 * SECTOR, block_size=block_sectors * SECTOR,
        stable_journal_epoch=stable, bytes_per_prefetch=block_sectors * SECTOR,
    )  # fmt: skip
    ring = Ring(probes, header, b"".join(sectors))
    assert ring.verdict_of_c() == ring.verdict_of_python()
    parsed = ring.parsed()
    assert ring.engine.epoch == records.next_epoch(parsed, header)
    assert ring.engine.sequence > parsed.highest_sequence


odd_records = st.one_of(
    st.builds(BitmapRecord, st.integers(0, BLOCKS * 8 + 16), st.integers(0, 40)),
    st.builds(BitmapRecord, st.integers(2**64 - 50, 2**64 - 1), st.integers(0, 2**32 - 1)),
    st.builds(TableRecord, st.integers(0, 5), st.just(0), st.just((1, 2))),
)
odd_sectors = st.builds(
    lambda found, epoch, sequence: records.seal_sector(found, Trailer(epoch, sequence), UUID),
    st.lists(odd_records, max_size=10), st.one_of(st.integers(0, 5), st.just(2**63)),
    st.integers(0, 2**62 - 1),
)  # fmt: skip


@settings(max_examples=150)
@given(sectors=st.lists(odd_sectors, min_size=1, max_size=4),
       last=st.integers(1, 8))  # fmt: skip
def test_both_judge_records_out_of_range_alike(probes, header_of, sectors, last):
    """The base ends `last` sectors into its last block."""
    header = header_of(base_size=((BLOCKS - 1) * 8 + last) * SECTOR, size=BLOCKS * 4096,
                       stable_journal_epoch=2)  # fmt: skip
    ring = Ring(probes, header, b"".join(sectors))
    assert ring.verdict_of_c() == ring.verdict_of_python()


@st.composite
def damage(draw):
    """What may happen to a journal on disk: (kind, place, value)."""
    kind = draw(st.sampled_from(["flip", "tear", "swap", "epoch", "garbage"]))
    return kind, draw(st.integers(0, 63)), draw(st.integers(0, SECTOR * 8 - 1))


def spoil(data, kind, sector, value):
    at = sector * SECTOR
    if kind == "flip":
        data[at + value // 8] ^= 1 << value % 8
    elif kind == "tear":  # the sector's end is from another time
        data[at + value // 8 : at + SECTOR] = bytes(SECTOR - value // 8)
    elif kind == "swap":
        other = value % 64 * SECTOR
        data[at : at + SECTOR], data[other : other + SECTOR] = (
            data[other : other + SECTOR], data[at : at + SECTOR])  # fmt: skip
    elif kind == "epoch":
        data[at + 496] ^= value & 0xFF
    else:
        data[at : at + SECTOR] = bytes([value & 0xFF]) * SECTOR


@settings(max_examples=100)
@given(batches=st.lists(spans, min_size=1, max_size=4), damages=st.lists(damage(), max_size=6))
def test_both_judge_a_damaged_journal_alike(probes, header_of, batches, damages):
    writer = Ring(probes, header_of())
    writer.engine.replay(1)
    for batch in batches:
        assert writer.commit(batch) == 0
    data = bytearray(writer.bytes())
    for one in damages:
        spoil(data, *one)
    reader = Ring(probes, header_of(), bytes(data))
    assert reader.verdict_of_c() == reader.verdict_of_python()


def test_nothing_is_applied_when_one_record_is_bad(ring):
    good = records.seal_sector([BitmapRecord(0, 8)], Trailer(1, 1), UUID)
    bad = records.seal_sector([BitmapRecord(BLOCKS * 8, 8)], Trailer(1, 2), UUID)
    one = ring(good + bad)
    assert one.engine.replay(1) == -errno.EUCLEAN
    assert not any(one.engine.durable())


def test_a_sector_of_another_image_does_not_count(ring):
    alien = records.seal_sector([BitmapRecord(0, 8)], Trailer(1, 1), b"another image...")
    one = ring(alien)
    assert one.engine.replay(1) == 0
    assert not any(one.engine.durable())


def test_the_ring_wraps_and_keeps_the_latest_batches(ring):
    one = ring(journal_pages=4)
    one.engine.replay(1)
    for batch in range(11):
        one.engine.free_pages_until(max(0, one.engine.head - 3))
        assert one.commit([(batch * 8, 8)]) == 0
    assert one.engine.head == 11
    assert flat(one.parsed()) == [(batch * 8, 8) for batch in range(7, 11)]


def test_a_batch_over_the_end_of_the_ring_is_written_in_two_parts(ring):
    one = ring(journal_pages=4)
    one.engine.replay(1)
    for _ in range(3):
        assert one.commit([(0, 8)]) == 0
    one.engine.free_pages_until(3)
    one.storage.forget()
    batch = [(n % 512, 1) for n in range(241)]
    assert one.commit(batch) == 0
    start = one.header.journal_offset
    assert one.storage.log("write") == [
        ("write", start + 3 * 4096, 4096, 0), ("write", start, 4096, 0)]  # fmt: skip
    assert flat(one.parsed())[-241:] == batch


def test_a_page_once_reused_holds_nothing_of_its_former_life(ring):
    one = ring(journal_pages=1)
    one.engine.replay(1)
    assert one.commit([(n, 1) for n in range(240)]) == 0
    one.engine.free_pages_until(1)
    assert one.commit([(511, 1)]) == 0
    assert flat(one.parsed()) == [(511, 1)]


@pytest.mark.parametrize("pages", [1, 3])
def test_a_batch_that_does_not_fit_says_so(ring, pages):
    one = ring(journal_pages=pages)
    one.engine.replay(1)
    one.engine.begin()
    room = pages * 8 * 30
    assert all(one.engine.put(0, 1) == 0 for _ in range(room))
    assert one.engine.put(0, 1) == -errno.ENOSPC
    assert one.engine.batch_pages() == pages


def test_without_a_journal_nothing_can_be_put(ring):
    one = ring(journal_pages=0)
    assert one.engine.replay(3) == 0
    assert one.engine.epoch == 4
    one.engine.begin()
    assert one.engine.put(0, 8) == -errno.ENOSPC


def test_a_huge_range_is_split_into_records_that_fit(ring):
    one = ring()
    one.engine.replay(1)
    one.engine.begin()
    assert one.engine.put(0, 2**31 + 5) == 0
    assert one.engine.records == 3


def test_sequence_and_epoch_never_go_back(ring):
    """Also past sectors that a stable epoch outdates."""
    content = b"".join(
        records.seal_sector([BitmapRecord(0, 8)], Trailer(epoch, sequence), UUID)
        for epoch, sequence in [(1, 900), (7, 20), (5, 30)]
    )
    one = ring(content)
    assert one.engine.replay(6) == 1
    assert (one.engine.epoch, one.engine.sequence) == (8, 901)
    two = ring(content)
    two.engine.replay(50)
    assert (two.engine.epoch, two.engine.sequence) == (51, 901)


def test_apply_makes_durable_what_the_batch_recorded(ring):
    one = ring()
    one.engine.replay(1)
    ranges = [(n * 16, 8) for n in range(32)]
    assert one.commit(ranges) == 0
    assert not any(one.engine.durable())
    one.engine.apply()
    assert one.engine.durable() == b"\x55" * 8


def test_a_write_error_is_passed_on(ring):
    one = ring()
    one.engine.replay(1)
    one.storage.fail("write", errno.ENOSPC)
    assert one.commit([(0, 8)]) == -errno.ENOSPC
    assert one.engine.head == 0


def test_a_read_error_ends_replay(ring):
    one = ring(records.seal_sector([BitmapRecord(0, 8)], Trailer(1, 1), UUID))
    one.storage.fail("read", errno.EIO)
    assert one.engine.replay(1) == -errno.EIO


# -- mapped blocks (I1) ------------------------------------------------------------------------


@pytest.fixture
def mapped_ring(ring, probes):
    """A ring with a chunk table beside its bitmap."""

    def make(pages=16):
        one = ring(journal_pages=pages)
        one.engine = probes.journal.Journal(
            one.storage, one.header.journal_offset, one.header.journal_size, UUID,
            one.header.block_size, one.header.base_img_size, 4000,
        )  # fmt: skip
        one.engine.replay(1)
        one.engine.begin()
        return one

    return make


def sealed_sectors(one):
    one.engine.seal()
    return [records.parse_sector(data, 0, UUID).records for data in one.engine.sectors()]


@pytest.mark.parametrize(("put", "room"), [
    (lambda e, n: e.put(n * 16, 8), 30),
    (lambda e, n: e.put_entry(n, n), 116),
    (lambda e, n: e.put_mapped(n * 8, 8, n, n), 112),
    # Entry and bits that join nothing: 24 and 16 bytes.
    (lambda e, n: e.put_mapped(n * 32, 8, n * 4, n), 12),
    (lambda e, n: e.put_entry(n * 2, n), 20),
])  # fmt: skip
def test_a_sector_holds_what_the_format_says(mapped_ring, put, room):
    one = mapped_ring()
    for number in range(room):
        assert put(one.engine, number) == 0
        assert len(one.engine.sectors()) == 1
    assert put(one.engine, room) == 0
    assert len(one.engine.sectors()) == 2
    assert all(data[484:488] == bytes(4) for data in one.engine.sectors())


def test_chunks_in_order_become_one_record_of_each_kind(mapped_ring):
    one = mapped_ring()
    for number in range(112):
        assert one.engine.put_mapped(number * 8, 8, number, 500 - number) == 0
    assert sealed_sectors(one) == [
        (BitmapRecord(0, 896), TableRecord(2, 0, tuple(range(500, 388, -1)))),
    ]  # fmt: skip


def test_an_entry_that_is_put_again_has_its_last_value(mapped_ring):
    """It changed while the batch was taken: nobody else tells."""
    one = mapped_ring()
    for chunk, entry in ((5, 1), (6, 2), (5, 9)):
        assert one.engine.put_entry(chunk, entry) == 0
    assert sealed_sectors(one) == [(TableRecord(2, 5, (9, 2)),)]


def test_a_full_batch_takes_no_mapped_block_in_halves(mapped_ring):
    one = mapped_ring(pages=1)
    count = 8 * 12
    assert all(one.engine.put_mapped(n * 32, 8, n * 4, n) == 0 for n in range(count))
    before = one.engine.sectors()
    assert one.engine.put_mapped(count * 32, 8, count * 4, 1) == -errno.ENOSPC
    assert one.engine.put_entry(3999, 1) == -errno.ENOSPC
    assert one.engine.sectors() == before


puts = st.lists(st.one_of(
    st.tuples(st.just("blocks"), st.integers(0, 400), st.integers(1, 8)),
    st.tuples(st.just("entry"), st.integers(0, 30), st.integers(0, 9)),
    st.tuples(st.just("mapped"), st.integers(0, 30), st.integers(0, 7)),
    st.tuples(st.just("run"), st.integers(0, 30), st.integers(1, 60)),
), min_size=1, max_size=80)  # fmt: skip


@settings(max_examples=150)
@given(steps=puts)
def test_entry_and_bits_of_a_mapped_block_share_a_sector(probes, header_of, steps):
    """Whatever was put before, and whatever comes behind it; and nothing is lost or invented: an
    entry that changes while a commit takes it is put again, and the last value counts."""
    ring = Ring(probes, header_of())
    engine = probes.journal.Journal(
        ring.storage, ring.header.journal_offset, ring.header.journal_size, UUID, 4096,
        ring.header.base_img_size, 4000,
    )  # fmt: skip
    engine.replay(1)
    engine.begin()
    pairs, blocks, entries = [], set(), {}
    fresh = itertools.count(7)
    for step, at, value in steps:
        if step == "blocks":
            assert engine.put(at * 8, value * 8) == 0
            blocks |= set(range(at, at + value))
        elif step == "entry":
            entries[at] = next(fresh)
            assert engine.put_entry(at, entries[at]) == 0
        else:
            for chunk in range(at, at + (value if step == "run" else 1)):
                block = chunk * 8 + (0 if step == "run" else value)
                count = 8 if step == "run" else 1
                entries[chunk] = next(fresh)
                assert engine.put_mapped(block * 8, count * 8, chunk, entries[chunk]) == 0
                new = set(range(block, block + count))
                blocks |= new
                pairs += [(b, chunk) for b in new]
    engine.seal()
    seen = []
    for data in engine.sectors():
        found_blocks, found_entries = set(), {}
        for record in records.parse_sector(data, 0, UUID).records:
            if isinstance(record, TableRecord):
                found_entries |= dict(enumerate(record.entries, record.first_index))
            else:
                first = record.first_sector // 8
                found_blocks |= set(range(first, first + record.sectors // 8))
        seen.append((found_blocks, found_entries))
    assert set().union(*(found for found, _ in seen)) == blocks
    assert {c: e for _, found in seen for c, e in found.items()} == entries
    for block, chunk in pairs:
        assert any(block in found and chunk in maps for found, maps in seen)
