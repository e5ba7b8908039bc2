# SPDX-License-Identifier: Apache-2.0
"""Reading bitmap and journal together, and walking over runs of bits."""

import os
import random
import tracemalloc
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import metadata
from fvdengine.errors import ImageTruncated, InvalidTable
from fvdengine.metadata import Run, Source
from fvdengine.records import BitmapRecord, TableRecord, Trailer, seal_sector


def runs_of(bitmap, first, end):
    """The model: look at every bit."""
    found = []
    for bit in range(first, end):
        value = bool(bitmap[bit >> 3] >> (bit & 7) & 1)
        if found and found[-1][2] == value:
            found[-1][1] = bit + 1
        else:
            found.append([bit, bit + 1, value])
    return [tuple(run) for run in found]


pieces = st.one_of(
    st.binary(max_size=4),
    st.integers(0, 9).map(bytes),
    st.integers(0, 9).map(lambda count: b"\xff" * count),
)


@given(st.lists(pieces, max_size=6).map(b"".join), st.data())
def test_runs_equal_the_model(bitmap, data):
    end = data.draw(st.integers(0, len(bitmap) * 8))
    first = data.draw(st.integers(0, end))
    assert list(metadata.bit_runs(bitmap, first, end)) == runs_of(bitmap, first, end)


def test_journal_is_replayed_into_the_copy_only(image, header, poke, digest):
    poke(header.bitmap_offset, b"\x01")
    record = seal_sector([BitmapRecord(8, 16)], Trailer(1, 1), header.extension.image_uuid)
    poke(header.journal_offset + 4096, record)
    before = digest(image)
    fd = os.open(image, os.O_RDONLY)
    try:
        found = metadata.load_metadata(fd, header, str(image))
    finally:
        os.close(fd)
    assert found.bitmap[0] == 0b111
    assert found.stored_bitmap[0] == 0b1
    assert found.replayed_blocks == 2
    assert found.count_local(header) == 3 * 4096
    assert digest(image) == before


def test_area_behind_the_end_is_an_error(image):
    fd = os.open(image, os.O_RDONLY)
    try:
        with pytest.raises(ImageTruncated):
            metadata.read_area(fd, image.stat().st_size - 10, 20, str(image))
    finally:
        os.close(fd)


# Tables ------------------------------------------------------------------------------------

UNMAPPED = 0xFFFFFFFF
CHUNK = 65536


@pytest.fixture
def compact(header):
    """The header of `image` as a compact one: 16 chunks of 64 KiB, the table at 86016."""
    return replace(header, table_offset=86016, table_size=4096, chunk_size=CHUNK)


@pytest.fixture
def load(tmp_path, compact):
    """Write a compact image with these entries and sectors, and load its metadata."""

    def run(entries, *sectors, places=16, header=compact, raw=None):
        path = tmp_path / "compact.fvd"
        with path.open("wb") as file:
            file.write(header.pack())
            file.seek(header.journal_offset)
            file.write(b"".join(sectors))
            file.seek(header.table_offset)
            file.write(metadata.pack_table(entries, header.table_size) if raw is None else raw)
            file.truncate(header.data_offset + places * header.chunk_size)
        before = path.read_bytes()
        fd = os.open(path, os.O_RDONLY)
        try:
            return metadata.load_metadata(fd, header, "x.fvd", os.fstat(fd).st_size)
        finally:
            os.close(fd)
            assert path.read_bytes() == before

    return run


def test_table_has_an_entry_a_chunk(load):
    found = load([UNMAPPED, 5, 0] + [UNMAPPED] * 13)
    assert list(found.table) == [UNMAPPED, 5, 0] + [UNMAPPED] * 13
    assert (found.count_mapped(), found.highest_place()) == (2, 5)


def test_marks_and_padding_of_the_stored_table_mean_nothing(load, compact):
    raw = metadata.pack_table([0x80000003] + [UNMAPPED] * 15, 64).ljust(4096, b"\1")
    assert list(load([], raw=raw).table) == [3] + [UNMAPPED] * 15


def test_padding_is_written_unmapped():
    assert metadata.pack_table([1, 2], 4096) == b"\1\0\0\0\2\0\0\0" + b"\xff" * 4088


def test_empty_table_has_no_highest_place(load):
    assert load([UNMAPPED] * 16).highest_place() == -1


BAD = {
    "behind the end": ([16], "entry 0 maps place 16, which ends behind the end"),
    "far behind the end": ([0, 0x7FFFFFFE], "entry 1 maps place 2147483646, which is|ends"),
    "no place": ([0x7FFFFFFF], "entry 0 maps place 2147483647, which is out of range"),
    "twice": ([3, 2, UNMAPPED, 1, 2], "entry 4 maps place 2, which entry 1 maps as well"),
    "twice with a mark": ([3, 0x80000003], "entry 1 maps place 3, which entry 0"),
}


@pytest.mark.parametrize(("entries", "text"), BAD.values(), ids=BAD)
def test_bad_table_is_refused(load, entries, text):
    with pytest.raises(InvalidTable, match=text):
        load(entries)


def test_place_under_the_table_is_refused(load, compact):
    grown = replace(compact, data_offset=86016, table_size=4096)
    with pytest.raises(InvalidTable, match="entry 2 maps place 0, which overlaps the table"):
        load([UNMAPPED, 1, 0], header=grown)
    assert load([UNMAPPED, 1], header=grown).count_mapped() == 1


def test_journal_can_make_a_table_wrong(load, compact):
    uuid = compact.extension.image_uuid
    for entry, text in ((2, "which entry 1 maps"), (99, "behind the end")):
        sector = seal_sector([TableRecord(1, 4, (entry,))], Trailer(1, 1), uuid)
        with pytest.raises(InvalidTable, match=f"entry 4 maps place {entry}, .*{text}"):
            load([3, 2], sector)


def test_journal_can_put_a_place_behind_the_end_right(load, compact):
    """A chunk was unmapped, the file cut, the table not written yet: the journal knows."""
    sector = seal_sector(
        [TableRecord(1, 1, (UNMAPPED,))], Trailer(1, 1), compact.extension.image_uuid
    )
    found = load([0, 7], sector, places=1)
    assert list(found.table[:2]) == [0, UNMAPPED]
    assert found.changes.chunks == 1


def test_table_of_64_tib_is_checked_to_its_last_place(compact):
    count = 1 << 14
    huge = replace(
        compact, virtual_disk_size=64 << 40, chunk_size=4 << 30, data_offset=1 << 30,
        block_size=4096,
    )  # fmt: skip
    table = array("I", [UNMAPPED] * count)
    table[-1] = (1 << 31) - 2
    metadata.check_table(table, huge, "x.fvd")
    with pytest.raises(InvalidTable, match="out of range"):  # its end is behind 2^63
        metadata.check_table(table, replace(huge, chunk_size=8 << 30), "x.fvd")
    fits = replace(huge, chunk_size=1 << 20)
    metadata.check_table(table, fits, "x.fvd")
    with pytest.raises(InvalidTable, match=f"entry {count - 1} "):
        metadata.check_table(table, fits, "x.fvd", (1 << 30) + (64 << 40))
    metadata.check_table(table, fits, "x.fvd", (1 << 30) + (((1 << 31) - 1) << 20))


def test_a_hole_for_a_table_of_a_gigabyte_is_refused_at_its_beginning(tmp_path, compact):
    """Every entry reads as place 0; none but the first part is looked at, or kept in memory."""
    path = tmp_path / "hole.fvd"
    size = 1 << 30
    hostile = replace(
        compact, virtual_disk_size=size // 4 << 20, table_size=size, chunk_size=1 << 20,
        data_offset=2 << 30,
    )  # fmt: skip
    path.write_bytes(b"")
    os.truncate(path, 3 << 30)
    tracemalloc.start()
    try:
        with path.open("rb") as file, pytest.raises(InvalidTable):
            metadata.load_metadata(file.fileno(), hostile, str(path))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [16 << 40, 64 << 40, 250 << 40])
def test_sparse_table_of_a_huge_image_is_read(tmp_path, compact, size):
    """Chunk numbers of disks up to the limit of memory, in a sparse file on tmpfs."""
    path = Path("/dev/shm") / f"fvd-test-{os.getpid()}.fvd"
    table_size = size >> 20 << 2
    huge = replace(
        compact, virtual_disk_size=size, table_size=table_size, chunk_size=1 << 20,
        data_offset=2 << 30,
    )  # fmt: skip
    last = (size >> 20) - 1
    try:
        with path.open("wb") as file:
            # A hole would read as place 0 in every entry: all of them but two are written.
            file.seek(huge.table_offset)
            for _ in range(table_size >> 22):
                file.write(b"\xff" * (4 << 20))
            for index, place in ((0, last), (last, 0)):
                file.seek(huge.table_offset + 4 * index)
                file.write(place.to_bytes(4, "little"))
            file.truncate(huge.data_offset + ((last + 1) << 20))
        fd = os.open(path, os.O_RDONLY)
        try:
            found = metadata.load_metadata(fd, huge, "x.fvd", os.fstat(fd).st_size)
        finally:
            os.close(fd)
    finally:
        path.unlink()
    assert (found.count_mapped(), found.highest_place()) == (2, last)
    end = list(metadata.runs(found, replace(huge, base_img_fully_prefetched=1), size - 512, size))
    assert end == [Run(size - 512, 512, Source.DATA, (2 << 30) + (1 << 20) - 512)]


# Where bytes are ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_runs_of_an_image_equal_the_model(load, compact, seed):
    """Sector by sector: the bitmap decides first, then the table."""
    rng = random.Random(seed)
    header = replace(
        compact, virtual_disk_size=rng.randrange(1, 2049) * 512,
        base_img_fully_prefetched=int(rng.random() < 0.1),
    )  # fmt: skip
    header = replace(header, base_img_size=min(header.base_img_size, header.virtual_disk_size))
    count = -(-header.virtual_disk_size // CHUNK)
    places = rng.sample(range(16), count)
    places = [place if rng.random() < 0.7 else UNMAPPED for place in places]
    if rng.random() < 0.3:
        places = [*range(count)]
    found = load(places, header=header)
    found.bitmap[:] = rng.choice([rng.randbytes(4096), b"\xff" * 4096, bytes(4096)])
    start = rng.randrange(header.virtual_disk_size)
    end = rng.randrange(start, header.virtual_disk_size) + 1
    position = start
    for run in metadata.runs(found, header, start, end):
        assert (run.start, run.length > 0) == (position, True)
        position = run.end
        for at in {run.start, *range(-(-run.start // 512) * 512, run.end, 512), run.end - 1}:
            block = at // 4096
            in_base = header.needs_base and at < header.base_img_size
            place = places[at // CHUNK]
            if in_base and not found.bitmap[block // 8] >> block % 8 & 1:
                assert run.source is Source.BASE
            elif place == UNMAPPED:
                assert run.source is Source.ZERO
            else:
                assert run.source is Source.DATA
                expected = header.data_offset + place * CHUNK + at % CHUNK
                assert run.offset + at - run.start == expected
    assert position == end


def test_neighbouring_places_make_one_run(load, compact):
    header = replace(compact, base_img_fully_prefetched=1)
    found = load([4, 5, 6, UNMAPPED, UNMAPPED, 7, 8, 3] + [UNMAPPED] * 8, header=header)
    assert [(run.start // CHUNK, run.length // CHUNK) for run in metadata.runs(
        found, header, 0, 16 * CHUNK
    )] == [(0, 3), (3, 2), (5, 2), (7, 1), (8, 8)]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_runs_of_a_table_of_many_pages_equal_the_model(load, compact, seed):
    """Whole pages without a place are passed over by one comparison: none may be lost."""
    rng = random.Random(seed)
    count = 5000
    table = [UNMAPPED] * count
    for _ in range(rng.randrange(6)):
        first = rng.randrange(count)
        for index in range(first, min(count, first + rng.choice([1, 3, 1500]))):
            table[index] = index
    for index in rng.sample(range(count), 5):
        table[index] = count + index
    header = replace(
        compact, virtual_disk_size=count * 4096, chunk_size=4096, table_size=20480,
        base_img_fully_prefetched=1,
    )  # fmt: skip
    found = load(table, header=header, places=2 * count)
    assert list(found.table) == table
    assert found.count_mapped() == count - table.count(UNMAPPED)
    assert found.highest_place() == max(entry for entry in table if entry != UNMAPPED)
    start, end = sorted(rng.sample(range(count * 8 + 1), 2))
    position = start * 512
    for run in metadata.runs(found, header, position, end * 512):
        assert run.start == position
        position = run.end
        for index in range(run.start // 4096, -(-run.end // 4096)):
            assert (table[index] == UNMAPPED) == (run.source is Source.ZERO)
            if run.source is Source.DATA:
                shift = run.offset - header.data_offset - run.start
                assert shift == (table[index] - index) * 4096
    assert position == end * 512
