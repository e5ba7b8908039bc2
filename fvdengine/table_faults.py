# SPDX-License-Identifier: Apache-2.0
"""All that is wrong with the entries of a chunk table, in bounded time and memory.

`metadata.check_table` refuses at the first fault, as an opening does; a check has to name them
all and a repair to mend them. A bit a place is kept, never more than 2^31 of them.
"""

import enum
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from fvdengine import geometry, intent, metadata
from fvdengine.errors import TableHopeless
from fvdengine.geometry import PLACE_LIMIT, UNMAPPED
from fvdengine.header import Header
from fvdengine.number_set import NumberSet
from fvdengine.units import MIB

FAULTS_MAX = 100_000  # a table with more is no table any more


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


class _Finder:
    """Yields the faults of the parts of a table that it is given in turn."""

    def __init__(self, header: Header, storage_length: int | None) -> None:
        self.first = geometry.first_place(header)
        self.end = PLACE_LIMIT
        if storage_length is not None:
            self.end = geometry.end_place(header, storage_length)
        self.taken, self.kept = NumberSet(), NumberSet()

    def prefer(self, table: "array[int]", preferred: NumberSet) -> None:
        """Let the first of these entries keep a place that others have as well."""
        for index, place in enumerate(table):
            is_good = index in preferred and self.first <= place < self.end
            if is_good and not self.taken.take(place):
                self.kept.take(index)

    def look(self, start: int, part: "array[int]") -> Iterator[Fault]:
        for first, page in metadata.mapped_pages(part):
            for index, place in enumerate(page, start + first):
                if place == UNMAPPED or index in self.kept:
                    continue
                if place < self.first:
                    yield Fault(index, place, FaultKind.OVERLAP)
                elif place >= self.end:
                    kind = FaultKind.RANGE if place >= PLACE_LIMIT else FaultKind.BEHIND
                    yield Fault(index, place, kind)
                elif self.taken.take(place):
                    yield Fault(index, place, FaultKind.DOUBLE)


def find_faults(
    table: "array[int]", header: Header, storage_length: int | None,
    preferred: NumberSet | None = None,
) -> Iterator[Fault]:  # fmt: skip
    """Yield the faults of `table` by index; of a place taken twice all entries but one.

    That one is the first of the `preferred` entries, else the first of all. `storage_length` is
    None where it is not known.
    """
    finder = _Finder(header, storage_length)
    if preferred:
        finder.prefer(table, preferred)
    return finder.look(0, table)


class Collector:
    """A judge for metadata.load_table that keeps what is wrong, and raises TableHopeless when
    that is more than `FAULTS_MAX` entries."""

    def __init__(self, header: Header, path: str, storage_length: int | None = None) -> None:
        self.faults: list[Fault] = []
        self._path = path
        self._finder = _Finder(header, storage_length)

    def __call__(self, start: int, part: "array[int]", _: "array[int]") -> None:
        for fault in self._finder.look(start, part):
            self.faults.append(fault)
            if len(self.faults) > FAULTS_MAX:
                raise TableHopeless(path=self._path, limit=FAULTS_MAX)
