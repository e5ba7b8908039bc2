# SPDX-License-Identifier: Apache-2.0
"""All that is wrong with the entries of a chunk table, in bounded time and memory.

`metadata.check_table` refuses at the first fault, as an opening does; a check has to name them
all and a repair to mend them. A bit a place is kept, never more than 2^31 of them.
"""

import enum
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from fvdengine import geometry, intent, metadata
from fvdengine.geometry import PLACE_LIMIT, UNMAPPED
from fvdengine.header import Header
from fvdengine.units import MIB

_STEP = 4096


class FaultKind(enum.Enum):
    """What is wrong with an entry; the value ends the sentence "maps a place which ..."."""

    OVERLAP = "overlaps the table"
    RANGE = "is out of range"
    BEHIND = "ends behind the end of its storage"
    DOUBLE = "another chunk maps as well"

    @property
    def code(self) -> str:
        return f"entry_{self.name.lower()}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Entry `index` maps `place`, which it must not."""

    index: int
    place: int
    kind: FaultKind


def size_is_damaged(fd: int, header: Header, path: str) -> bool:
    """Whether a compact disk became smaller by damage: the backup copy knows a larger one, and
    chunks behind the end have places. Shrinking takes these away before it writes the size."""
    copy = intent.copy_of(header, fd, path)
    if not header.is_compact or copy is None:
        return False
    return header.virtual_disk_size < copy.virtual_disk_size and not is_padding_clear(
        fd, header, path
    )


def is_padding_clear(fd: int, header: Header, path: str) -> bool:
    """Whether all entries behind the last chunk are unmapped, as a writer of ours leaves them."""
    used = geometry.table_bytes(header.virtual_disk_size, header.chunk_size)
    for at in range(used, header.table_size, MIB):
        size = min(MIB, header.table_size - at)
        if metadata.read_area(fd, header.table_offset + at, size, path).count(0xFF) != size:
            return False
    return True


class Numbers:
    """A set of small numbers, a bit each: a hostile table or journal names very many."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def __bool__(self) -> bool:
        return bool(self._bits)

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] & 1 << (number & 7))

    def take(self, number: int) -> bool:
        """Enter `number`; return whether it was there before."""
        byte, bit = number >> 3, 1 << (number & 7)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + _STEP - len(self._bits)))
        if self._bits[byte] & bit:
            return True
        self._bits[byte] |= bit
        return False


def find_faults(
    table: "array[int]", header: Header, storage_length: int | None,
    preferred: Collection[int] | Numbers = (),
) -> Iterator[Fault]:  # fmt: skip
    """Yield the faults of `table` by index; of a place taken twice all entries but one.

    That one is the first of the `preferred` entries, else the first of all. `storage_length` is
    None where it is not known.
    """
    first = geometry.first_place(header)
    end = PLACE_LIMIT
    if storage_length is not None:
        end = geometry.end_place(header, storage_length)
    taken, kept = Numbers(), Numbers()
    if preferred:
        for index, place in enumerate(table):
            if index in preferred and first <= place < end and not taken.take(place):
                kept.take(index)
    for start in range(0, len(table), _STEP):
        page = table[start : start + _STEP]
        if page.count(UNMAPPED) == len(page):
            continue
        for index, place in enumerate(page, start):
            if place == UNMAPPED or index in kept:
                continue
            if place < first:
                yield Fault(index, place, FaultKind.OVERLAP)
            elif place >= end:
                kind = FaultKind.RANGE if place >= PLACE_LIMIT else FaultKind.BEHIND
                yield Fault(index, place, kind)
            elif taken.take(place):
                yield Fault(index, place, FaultKind.DOUBLE)
