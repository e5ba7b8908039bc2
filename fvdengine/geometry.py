# SPDX-License-Identifier: Apache-2.0
"""Where the parts of an image lie, and the sizes chosen for them at create.

Pure arithmetic on bytes, blocks and sections; no file is touched here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fvdengine.header import HEADER_SIZE_DEFAULT, Header
from fvdengine.units import KIB, MIB, PAGE, SECTOR, divide_up, round_up

BLOCK_SIZE_MIN = PAGE
BLOCK_SIZE_MAX = 2 * MIB
BLOCK_SIZE_LIMIT = 1 << 31  # accepted on open
BITMAP_SIZE_TARGET = 4 * MIB
METADATA_SIZE_MAX = 1 << 30  # bitmap and table together: they are kept in memory
JOURNAL_SIZE_DEFAULT = 16 * MIB
JOURNAL_SIZE_MIN = 64 * KIB
DATA_ALIGNMENT = MIB  # ours: guest blocks keep their alignment on the store
CHUNK_SIZE_DEFAULT = MIB
GROW_UNIT_DEFAULT = 100 * MIB
TABLE_ENTRY_SIZE = 4
UNMAPPED = 0xFFFFFFFF  # a table entry of a chunk that has no place
PLACE_MASK = 0x7FFFFFFF  # bit 31 is a mark that only memory has
PLACE_LIMIT = PLACE_MASK  # places are below: this one with its mark would read as unmapped
SIZE_MAX = (1 << 63) - 1
DISK_SIZE_MAX = 1 << 62  # what the engine opens


@dataclass(frozen=True, slots=True)
class Section:
    """A named stretch of the image file."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """The places chosen for a new image. `table_size` is 0 where it is not compact.

    `file_size` is the length of the image file, `data_size` that of a separate data file, or 0.
    """

    base_img_size: int
    block_size: int
    chunk_size: int
    bitmap_offset: int
    bitmap_size: int
    journal_offset: int
    journal_size: int
    table_offset: int
    table_size: int
    data_offset: int
    file_size: int
    data_size: int

    @property
    def metadata_end(self) -> int:
        """The end of header, bitmap, journal and table, before the gap that aligns the data."""
        return max(
            HEADER_SIZE_DEFAULT,
            self.bitmap_offset + self.bitmap_size,
            self.journal_offset + self.journal_size,
            self.table_offset + self.table_size,
        )


def block_count(base_img_size: int, block_size: int) -> int:
    """Return how many blocks, and so bits, cover the base; the last one may be partial."""
    return divide_up(base_img_size, block_size)


def bitmap_bytes(base_img_size: int, block_size: int) -> int:
    """Return the bytes that hold one bit a block, before rounding up to pages."""
    return divide_up(block_count(base_img_size, block_size), 8)


def used_bitmap(header: Header) -> int:
    """Return the bytes of the bitmap that have a bit of a block, in whole pages.

    The section may be much longer: only padding follows, which nobody has to keep in memory.
    """
    if not header.base_img_size:
        return 0
    used = round_up(bitmap_bytes(header.base_img_size, header.block_size), PAGE)
    return min(header.bitmap_size, used)


def choose_block_size(base_img_size: int) -> int:
    """Return the smallest block size whose bitmap stays at or below 4 MiB.

    Small blocks matter more than a small bitmap: a file system's aligned writes of 4 KiB
    then never have to read the base.
    """
    block_size = BLOCK_SIZE_MIN
    while (
        block_size < BLOCK_SIZE_MAX
        and bitmap_bytes(base_img_size, block_size) > BITMAP_SIZE_TARGET
    ):
        block_size *= 2
    return block_size


def chunk_count(virtual_disk_size: int, chunk_size: int) -> int:
    """Return how many chunks cover the disk; the last one may reach behind it."""
    return divide_up(virtual_disk_size, chunk_size)


def table_bytes(virtual_disk_size: int, chunk_size: int) -> int:
    """Return the bytes that hold an entry for each chunk, before rounding up to pages."""
    return chunk_count(virtual_disk_size, chunk_size) * TABLE_ENTRY_SIZE


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the layout of a new image shall be made for; None chooses."""

    size: int
    base_length: int = 0
    block_size: int | None = None
    journal_size: int | None = None
    is_compact: bool = False
    chunk_size: int | None = None
    has_data_file: bool = False


def choose_layout(wanted: Wanted) -> Layout:
    """Return the layout of a new image; the sizes in `wanted` have been validated.

    The table comes last of the metadata, so that it can grow into the data area.
    """
    base_img_size = min(round_up(wanted.base_length, SECTOR), wanted.size)
    block_size = wanted.block_size or choose_block_size(base_img_size)
    chunk_size = wanted.chunk_size or max(CHUNK_SIZE_DEFAULT, block_size)
    needs = {"bitmap": 0, "journal": 0, "table": 0}
    if base_img_size:
        needs["bitmap"] = bitmap_bytes(base_img_size, block_size)
    if wanted.is_compact:
        needs["table"] = table_bytes(wanted.size, chunk_size)
    needs["journal"] = wanted.journal_size or 0
    if wanted.journal_size is None and (needs["bitmap"] or needs["table"]):
        needs["journal"] = JOURNAL_SIZE_DEFAULT
    end = HEADER_SIZE_DEFAULT
    placed: dict[str, tuple[int, int]] = {}
    for name, size in needs.items():
        rounded = round_up(size, PAGE)
        placed[name] = (end if rounded else 0, rounded)
        end += rounded
    data_offset = 0 if wanted.has_data_file else round_up(end, DATA_ALIGNMENT)
    if wanted.has_data_file:
        file_size = end
    elif wanted.is_compact:
        file_size = data_offset
    else:
        file_size = data_offset + wanted.size
    data_size = wanted.size if wanted.has_data_file and not wanted.is_compact else 0
    return Layout(
        base_img_size, block_size, chunk_size,
        *placed["bitmap"], *placed["journal"], *placed["table"],
        data_offset, file_size, data_size,
    )  # fmt: skip


def sections(header: Header) -> list[Section]:
    """Return the sections of the image file: the header first, the rest by offset.

    The data area of a compact image ends nowhere; it is a section of no size, and the table may
    reach into it (`first_place`). With a data file the image has no data area.
    """
    named = [
        Section("bitmap", header.bitmap_offset, header.bitmap_size),
        Section("journal", header.journal_offset, header.journal_size),
        Section("table", header.table_offset, header.table_size),
    ]
    if not header.data_file and not header.is_compact:
        named.append(Section("data area", header.data_offset, header.virtual_disk_size))
    present = sorted((s for s in named if s.size), key=lambda s: (s.offset, s.size))
    return [Section("header", 0, header.header_size), *present]


def required_length(header: Header) -> int:
    """Return the shortest image file that holds every section of `header`."""
    return max(section.end for section in sections(header))


def used_length(header: Header, highest_place: int) -> int:
    """Return the end of what the image file holds; `highest_place` is -1 where there is none."""
    required = required_length(header)
    if not header.is_compact or header.data_file:
        return required
    return max(required, place_offset(header, highest_place + 1))


def required_data_length(header: Header) -> int:
    """Return the shortest data file for `header`; 0 where chunks come and go."""
    return 0 if header.is_compact else header.virtual_disk_size


def first_place(header: Header) -> int:
    """Return the first place that does not overlap the table: one that grew takes some away."""
    if header.data_file:
        return 0
    taken = header.table_offset + header.table_size - header.data_offset
    return divide_up(max(0, taken), header.chunk_size)


def end_place(header: Header, storage_length: int) -> int:
    """Return the end of the places that lie wholly inside a storage of that many bytes."""
    room = min(storage_length, SIZE_MAX) - header.data_offset
    return min(max(0, room) // header.chunk_size, PLACE_LIMIT)


def place_offset(header: Header, place: int) -> int:
    """Return where the chunk at `place` begins in the data storage."""
    return header.data_offset + place * header.chunk_size


def overlaps(parts: list[Section]) -> Iterator[tuple[Section, Section]]:
    """Yield neighbouring sections, sorted by offset, of which the first runs into the second."""
    for before, after in zip(parts, parts[1:], strict=False):
        if after.offset < before.end:
            yield before, after
