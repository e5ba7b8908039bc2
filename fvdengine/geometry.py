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
METADATA_SIZE_MAX = 1 << 30
JOURNAL_SIZE_DEFAULT = 16 * MIB
JOURNAL_SIZE_MIN = 64 * KIB
DATA_ALIGNMENT = MIB  # ours: guest blocks keep their alignment on the store


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
    """The places chosen for a new image in raw layout."""

    base_img_size: int
    block_size: int
    bitmap_offset: int
    bitmap_size: int
    journal_offset: int
    journal_size: int
    data_offset: int
    file_size: int

    @property
    def metadata_end(self) -> int:
        """The end of the header, bitmap and journal, before the gap that aligns the data."""
        return max(
            HEADER_SIZE_DEFAULT,
            self.bitmap_offset + self.bitmap_size,
            self.journal_offset + self.journal_size,
        )


def block_count(base_img_size: int, block_size: int) -> int:
    """Return how many blocks, and so bits, cover the base; the last one may be partial."""
    return divide_up(base_img_size, block_size)


def bitmap_bytes(base_img_size: int, block_size: int) -> int:
    """Return the bytes that hold one bit a block, before rounding up to pages."""
    return divide_up(block_count(base_img_size, block_size), 8)


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


def choose_layout(
    virtual_disk_size: int, base_length: int, block_size: int | None, journal_size: int | None
) -> Layout:
    """Return the layout of a new image; sizes have been validated, None chooses."""
    base_img_size = min(round_up(base_length, SECTOR), virtual_disk_size)
    if block_size is None:
        block_size = choose_block_size(base_img_size)
    bitmap_offset = bitmap_size = journal_offset = 0
    end = HEADER_SIZE_DEFAULT
    if base_img_size:
        bitmap_offset = end
        bitmap_size = round_up(bitmap_bytes(base_img_size, block_size), PAGE)
        end = bitmap_offset + bitmap_size
    if journal_size is None:
        journal_size = JOURNAL_SIZE_DEFAULT if base_img_size else 0
    journal_size = round_up(journal_size, PAGE)
    if journal_size:
        journal_offset = end
        end += journal_size
    data_offset = round_up(end, DATA_ALIGNMENT)
    return Layout(
        base_img_size, block_size, bitmap_offset, bitmap_size, journal_offset, journal_size,
        data_offset, data_offset + virtual_disk_size,
    )  # fmt: skip


def sections(header: Header) -> list[Section]:
    """Return the sections that `header` describes, the header itself first, the rest by offset."""
    named = [
        Section("bitmap", header.bitmap_offset, header.bitmap_size),
        Section("journal", header.journal_offset, header.journal_size),
        Section("table", header.table_offset, header.table_size),
        Section("data area", header.data_offset, header.virtual_disk_size),
    ]
    present = sorted((s for s in named if s.size), key=lambda s: (s.offset, s.size))
    return [Section("header", 0, header.header_size), *present]


def required_length(header: Header) -> int:
    """Return the shortest file that holds every section of `header`."""
    return max(section.end for section in sections(header))


def overlaps(parts: list[Section]) -> Iterator[tuple[Section, Section]]:
    """Yield neighbouring sections, sorted by offset, of which the first runs into the second."""
    for before, after in zip(parts, parts[1:], strict=False):
        if after.offset < before.end:
            yield before, after
