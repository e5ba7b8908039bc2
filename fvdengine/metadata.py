# SPDX-License-Identifier: Apache-2.0
"""Read bitmap, table and journal of an image and give the state that an opener would see.

The journal is replayed into the copies in memory; the file is never written. Also the place for
walking over an image: runs of equal bits, and from them and the table where each byte lies.
Reads files only, so it is an oracle for what the engine serves at any flushed moment.
"""

import enum
import os
import re
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fvdengine import geometry, records
from fvdengine.errors import ImageTruncated, InvalidJournal, InvalidTable, from_os_error
from fvdengine.geometry import PLACE_MASK, UNMAPPED
from fvdengine.header import EXTENSION_OFFSET, UUID_OFFSET, Header
from fvdengine.number_set import NumberSet
from fvdengine.records import Changes, Journal
from fvdengine.units import MIB, PAGE

# Long runs of one value are found by the regular expression engine, mixed bytes one by one.
_BYTE_RUNS = re.compile(rb"\x00+|\xff+|[^\x00\xff]+")


_UNMAPPED_PAGE = b"\xff" * PAGE
_ENTRIES_PER_PAGE = PAGE // geometry.TABLE_ENTRY_SIZE
_UNMAPPED_PART = b"\xff" * MIB
_MARKS = int.from_bytes(b"\0\0\0\x80" * (MIB // geometry.TABLE_ENTRY_SIZE), "little")
# Looks at a part of the entries, from the index given on; the last are those before, at least.
Judge = Callable[[int, "array[int]", "array[int]"], None]


class Source(enum.Enum):
    """Where the bytes of a run are."""

    DATA = "data"  # in the data storage: the image itself, or its data file
    ZERO = "zero"  # nowhere: a chunk without a place
    BASE = "base"


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of the virtual disk; `offset` is in the data storage, or -1."""

    start: int
    length: int
    source: Source
    offset: int = -1

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class Metadata:
    """Bitmap and table after replay, and what replay did.

    `bitmap` has the pages with bits of blocks. `table` has an entry a chunk and nothing else,
    without the mark in bit 31; it is None where the image is not compact.
    """

    bitmap: bytearray
    table: "array[int] | None"
    journal: Journal
    changes: Changes
    stored_bitmap: bytes

    @property
    def replayed_blocks(self) -> int:
        """Blocks that only the journal says are local."""
        return self.changes.blocks

    def count_local(self, header: Header) -> int:
        """Return the bytes of the virtual disk that need no base."""
        if not header.needs_base:
            return header.virtual_disk_size
        blocks = block_count(header)
        missing = (blocks - count_set(self.bitmap, blocks)) * header.block_size
        last = blocks - 1
        if not self.bitmap[last >> 3] >> (last & 7) & 1:
            missing -= blocks * header.block_size - header.base_img_size
        return header.virtual_disk_size - missing

    def count_mapped(self) -> int:
        """Return how many chunks have a place."""
        if self.table is None:
            return 0
        return sum(len(page) - page.count(UNMAPPED) for _, page in mapped_pages(self.table))

    def highest_place(self) -> int:
        """Return the highest place that a chunk has, -1 if none has any."""
        pages = mapped_pages(self.table) if self.table is not None else ()
        return max(
            (place for _, page in pages for place in page if place != UNMAPPED), default=-1
        )


def count_set(bitmap: bytes | bytearray, count: int) -> int:
    """Return how many of the first `count` bits are set, in steps that bound memory."""
    whole = count >> 3
    total = sum(
        int.from_bytes(bitmap[at : min(at + MIB, whole)], "little").bit_count()
        for at in range(0, whole, MIB)
    )
    if count & 7:
        total += (bitmap[whole] & ((1 << (count & 7)) - 1)).bit_count()
    return total


def block_count(header: Header) -> int:
    """Return the number of blocks, and bits, of the image."""
    return geometry.block_count(header.base_img_size, header.block_size)


def load_metadata(
    fd: int, header: Header, path: str, storage_length: int | None = None
) -> Metadata:
    """Read, check and replay; `storage_length` is that of the data storage, if known.

    Raise InvalidJournal if the journal must not be replayed, InvalidTable if the table is wrong
    before or after that. A place behind the end of the storage (I2) is wrong only after it.
    """
    stored = read_area(fd, header.bitmap_offset, geometry.used_bitmap(header), path)
    judge = _Strict(header, path) if header.is_compact else None
    table = load_table(fd, header, path, judge)
    journal = load_journal(fd, header, path)
    bitmap = bytearray(stored)
    changes = records.replay(journal, header, bitmap, table)
    if table is not None and (storage_length is not None or changes.chunks):
        check_table(table, header, path, storage_length)
    return Metadata(bitmap, table, journal, changes, stored)


def missing_bits(fd: int, header: Header, path: str) -> tuple[int, int]:
    """Return how many blocks of an image that claims to need no base (I5) have no bit in its
    bitmap, and how many none in the journal either; 0 where it claims nothing."""
    if not header.has_base or header.needs_base:
        return 0, 0
    blocks = block_count(header)
    bitmap = bytearray(
        read_area(fd, header.bitmap_offset, geometry.used_bitmap(header), path)
    )
    stored = blocks - count_set(bitmap, blocks)
    if stored:
        records.replay(load_journal(fd, header, path), header, bitmap)
    return stored, blocks - count_set(bitmap, blocks)


def load_journal(
    fd: int, header: Header, path: str, drop: Callable[[InvalidJournal], None] | None = None
) -> Journal:
    """Scan the journal, see records.scan_journal; `fd` is read from again at replay."""

    def read(at: int, size: int) -> bytes:
        return read_area(fd, header.journal_offset + at, size, path)

    at = EXTENSION_OFFSET + UUID_OFFSET
    image_uuid = None if header.extension else read_area(fd, at, 16, path)
    return records.scan_journal(read, header.journal_size, header, path, drop, image_uuid)


def load_table(
    fd: int, header: Header, path: str, judge: Judge | None = None
) -> "array[int] | None":
    """Return the entries of the chunks as stored, marks masked off and padding left out.

    `judge` sees each part as soon as it is read and may raise: a hostile table has a gigabyte.
    """
    if not header.is_compact:
        return None
    count = geometry.chunk_count(header.virtual_disk_size, header.chunk_size)
    size = count * geometry.TABLE_ENTRY_SIZE
    table = array("I")
    assert table.itemsize == geometry.TABLE_ENTRY_SIZE
    for at in range(0, size, MIB):
        data = read_area(fd, header.table_offset + at, min(MIB, size - at), path)
        part = array("I", data)
        if sys.byteorder != "little":
            part.byteswap()
        if data != _UNMAPPED_PART[: len(data)]:
            if int.from_bytes(data, "little") & _MARKS:
                _mask_marks(part)
            if judge is not None:
                judge(len(table), part, table)
        table.extend(part)
    return table


def _mask_marks(part: "array[int]") -> None:
    for first, page in mapped_pages(part):
        for index, entry in enumerate(page, first):
            if entry != UNMAPPED:
                part[index] = entry & PLACE_MASK


def mapped_pages(table: "array[int]") -> "Iterator[tuple[int, array[int]]]":
    """Yield (index, entries) of the pages of a table in which any chunk may have a place.

    Most of a large table is unmapped: one comparison a page.
    """
    for first in range(0, len(table), _ENTRIES_PER_PAGE):
        page = table[first : first + _ENTRIES_PER_PAGE]
        if page.tobytes() != _UNMAPPED_PAGE[: len(page) * geometry.TABLE_ENTRY_SIZE]:
            yield first, page


def pack_table(entries: "array[int] | list[int]", table_size: int) -> bytes:
    """Return the bytes of a table section: the entries, then padding that is unmapped."""
    return struct.pack(f"<{len(entries)}I", *entries).ljust(table_size, b"\xff")


def check_table(
    table: "array[int]", header: Header, path: str, storage_length: int | None = None
) -> None:
    """Check that places lie behind the table and inside the storage, and that none is used twice.

    Without `storage_length` places are only held to be below 2^31 - 1.
    """
    judge = _Strict(header, path, storage_length)
    for first, page in mapped_pages(table):
        judge(first, page, table)


class _Strict:
    """Raises InvalidTable at the first entry that is wrong, given the parts of a table in turn."""

    def __init__(self, header: Header, path: str, storage_length: int | None = None) -> None:
        length = geometry.SIZE_MAX if storage_length is None else storage_length
        self._path = path
        self._first = geometry.first_place(header)
        self._end = geometry.end_place(header, length)
        self._too_far = "ends behind the end of its storage"
        if storage_length is None:
            self._too_far = "is out of range"
        self._seen = NumberSet()

    def __call__(self, start: int, part: "array[int]", earlier: "array[int]") -> None:
        for first, page in mapped_pages(part):
            for index, place in enumerate(page, start + first):
                if place == UNMAPPED:
                    continue
                if place < self._first:
                    self._refuse(index, place, "overlaps the table")
                if place >= self._end:
                    self._refuse(index, place, self._too_far)
                if self._seen.take(place):
                    other = _index_of(place, earlier, start, part)
                    self._refuse(index, place, f"entry {other} maps as well")

    def _refuse(self, index: int, place: int, reason: str) -> None:
        raise InvalidTable(
            path=self._path, entry=index, reason=f"maps place {place}, which {reason}"
        )


def _index_of(place: int, earlier: "array[int]", start: int, part: "array[int]") -> int:
    try:
        return earlier.index(place)
    except ValueError:
        return start + part.index(place)


def read_area(fd: int, offset: int, size: int, path: str) -> bytes:
    """Return `size` bytes at `offset`, all of them."""
    parts: list[bytes] = []
    end = offset + size
    while offset < end:
        try:
            part = os.pread(fd, min(end - offset, 4 * MIB), offset)
        except OSError as error:
            raise from_os_error(error, path, "read") from error
        if not part:
            raise ImageTruncated(path=path, actual=offset, needed=end)
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def runs(loaded: Metadata, header: Header, start: int, end: int) -> Iterator[Run]:
    """Yield where the bytes of [start, end) of the disk are, in order and without gaps.

    The bitmap decides first, then the table. Behind base_img_size all is local.
    """
    covered = start
    if header.needs_base:
        size = header.block_size
        covered = min(end, max(start, header.base_img_size))
        last = min(block_count(header), -(-covered // size))
        for first, stop, is_local in bit_runs(loaded.bitmap, start // size, last):
            low, high = max(first * size, start), min(stop * size, covered)
            if low >= high:
                continue
            if is_local:
                yield from _stored_runs(loaded, header, low, high)
            else:
                yield Run(low, high - low, Source.BASE)
    yield from _stored_runs(loaded, header, covered, end)


def _stored_runs(loaded: Metadata, header: Header, start: int, end: int) -> Iterator[Run]:
    """Yield where the local bytes of [start, end) are; neighbouring places make one run."""
    table = loaded.table
    if table is None:
        if start < end:
            yield Run(start, end - start, Source.DATA, header.data_offset + start)
        return
    size = header.chunk_size
    index = start // size
    while start < end:
        place, first = table[index], index
        index = _end_of_run(table, first, -(-end // size))
        stop = min(end, index * size)
        if place == UNMAPPED:
            yield Run(start, stop - start, Source.ZERO)
        else:
            offset = geometry.place_offset(header, place) + start - first * size
            yield Run(start, stop - start, Source.DATA, offset)
        start = stop


def _end_of_run(table: "array[int]", first: int, end: int) -> int:
    """Return where the chunks end that continue the first: unmapped, or at the places behind it."""
    place, index = table[first], first + 1
    if place != UNMAPPED:
        while index < end and table[index] == place + index - first:
            index += 1
        return index
    while index < end and table[index] == UNMAPPED:
        step = 1
        if index % _ENTRIES_PER_PAGE == 0:  # most of a large table: one comparison a page
            page = table[index : index + _ENTRIES_PER_PAGE]
            step = _ENTRIES_PER_PAGE if page.tobytes() == _UNMAPPED_PAGE else 1
        index += step
    return min(index, end)


def bit_runs(bitmap: bytes | bytearray, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, end, value) of the runs of equal bits in [first, end), in order."""
    run_start, run_value = first, None
    for start, stop, value in _bit_pieces(bitmap, first, end):
        if value != run_value:
            if run_value is not None and start > run_start:
                yield run_start, start, run_value
            run_start, run_value = start, value
        if stop >= end:
            break
    if run_value is not None and end > run_start:
        yield run_start, end, run_value


def _bit_pieces(
    bitmap: bytes | bytearray, first: int, end: int
) -> Iterator[tuple[int, int, bool]]:
    """Yield pieces of equal bits that cover [first, end); neighbours may have the same value."""
    if first >= end:
        return
    for match in _BYTE_RUNS.finditer(bitmap, first >> 3, (end + 7) >> 3):
        start, stop = match.start() * 8, match.end() * 8
        lead = match.group()[0]
        if lead in (0x00, 0xFF):
            yield max(start, first), min(stop, end), lead == 0xFF
            continue
        for bit in range(max(start, first), min(stop, end)):
            yield bit, bit + 1, bool(bitmap[bit >> 3] >> (bit & 7) & 1)
