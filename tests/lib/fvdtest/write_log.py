# SPDX-License-Identifier: Apache-2.0
"""The log of dm-log-writes: what a disk was told, in order, with its flushes and marks.

The kernel's dm-log-writes target (drivers/md/dm-log-writes.c) writes after a head sector, for each
request, a sector that describes it, and the data. Writes are logged as they complete, before the
flush that followed them; so what a disk may hold after a power cut is the log up to any flush and
any subset of the sectors that come before the next one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0x6A736677736872
SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

_HEAD = struct.Struct("<3QI")
_ENTRY = struct.Struct("<4Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """One request: bytes from `offset` on; of a mark, `data` is its text."""

    flags: int
    offset: int
    length: int
    data: bytes

    @property
    def is_mark(self) -> bool:
        return bool(self.flags & MARK)

    @property
    def is_flush(self) -> bool:
        return bool(self.flags & FLUSH)


def read_log(path: Path) -> Iterator[Entry]:
    """The entries of the log on a disk, or in a file that was one; ValueError where it is none."""
    with path.open("rb") as log:
        magic, version, count, sector = _HEAD.unpack(log.read(_HEAD.size))
        if magic != MAGIC or version != 1:
            raise ValueError(f"{path} is no log of dm-log-writes")
        place = sector
        for _ in range(count):
            log.seek(place)
            head = log.read(sector)
            start, sectors, flags, text = _ENTRY.unpack_from(head)
            place += sector
            data = head[_ENTRY.size : _ENTRY.size + text]
            if not flags & (MARK | DISCARD):
                data = log.read(sectors * sector)
                place += len(data)
            yield Entry(flags, start * sector, sectors * sector, data)


def apply(disk: bytearray, entry: Entry) -> None:
    """Do to a disk what a request asked for."""
    if entry.flags & DISCARD:
        disk[entry.offset : entry.offset + entry.length] = bytes(entry.length)
    elif not entry.is_mark:
        disk[entry.offset : entry.offset + len(entry.data)] = entry.data
