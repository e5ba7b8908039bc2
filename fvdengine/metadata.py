# SPDX-License-Identifier: Apache-2.0
"""Read bitmap and journal of an image and give the state that an opener would see.

The journal of an image that was not closed cleanly is replayed into the copy in memory; the file
is never written. Also the place for walking over runs of equal bits.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fvdengine import geometry, records
from fvdengine.errors import ImageTruncated, from_os_error
from fvdengine.header import Header
from fvdengine.records import Journal
from fvdengine.units import MIB

# Long runs of one value are found by the regular expression engine, mixed bytes one by one.
_BYTE_RUNS = re.compile(rb"\x00+|\xff+|[^\x00\xff]+")


@dataclass(slots=True)
class Metadata:
    """The bitmap after replay, and what replay did. `bitmap` has the whole section."""

    bitmap: bytearray
    journal: Journal
    replayed_blocks: int
    stored_bitmap: bytes

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


def load_metadata(fd: int, header: Header, path: str) -> Metadata:
    """Read and replay; raise InvalidJournal if the journal must not be replayed."""
    stored = read_area(fd, header.bitmap_offset, header.bitmap_size, path)
    journal = records.read_journal(
        read_area(fd, header.journal_offset, header.journal_size, path), header, path
    )
    bitmap = bytearray(stored)
    changed = records.replay(journal, header, bitmap)
    return Metadata(bitmap, journal, changed, stored)


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
