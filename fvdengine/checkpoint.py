# SPDX-License-Identifier: Apache-2.0
"""Settle an image that nobody has open: what the journal says goes into table and bitmap.

The offline counterpart of the engine's checkpoint, with the same order (I3): what was read made
durable, table, bitmap, epoch, and only then the journal emptied. After it nothing is left to
replay, so bits may be cleared and chunks freed. An image that an older writer left behind gets
a new extension, as a writable open would give it.
"""

import os
import sys
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fvdengine import editing, geometry, metadata, paths, records
from fvdengine import header as codec
from fvdengine.content import file_extents
from fvdengine.editing import ImageFile
from fvdengine.errors import EngineError
from fvdengine.header import Extension, Header
from fvdengine.metadata import Metadata, bit_runs
from fvdengine.units import MIB, PAGE, SECTOR

UNKNOWN_IDENTITY = bytes(32)
_FEW_PLACES = 1 << 23  # a MiB of bits


@dataclass(frozen=True, slots=True)
class Files:
    """The image and the file with its data, which are the same without a data file."""

    image: ImageFile
    data: ImageFile

    def flush(self) -> None:
        """Make both durable, data first."""
        if self.data is not self.image:
            self.data.flush()
        self.image.flush()


def settle(files: Files, header: Header, loaded: Metadata) -> Header:
    """Make the replayed state of `loaded` the one on disk; return the header that is there now.

    The clean flag is taken away where there is something to write (I4), and not set again.
    """
    files.flush()  # what was read so far may have been in the page cache alone
    if header.is_clean and (loaded.journal.live or loaded.changes.blocks or loaded.changes.chunks):
        header = editing.write_header(files.image, header, replace(header, clean_shutdown=0))
    write_metadata(files.image, header, loaded)
    epoch = records.next_epoch(loaded.journal, header)
    header = editing.write_header(
        files.image, header, replace(header, stable_journal_epoch=epoch)
    )
    clear_journal(files.image, header)
    if records.numbers_used_up(loaded.journal, header):
        header = editing.write_header(files.image, header, replace(header, stable_journal_epoch=1))
    return renew_extension(files.image, header)


def clear_journal(image: ImageFile, header: Header) -> None:
    """Fill the journal with zeros, durably."""
    write_pages(image, header.journal_offset, header.journal_size, lambda _, size: bytes(size))
    image.flush()


def write_metadata(image: ImageFile, header: Header, loaded: Metadata) -> None:
    """Write the pages of table and bitmap that differ: mappings before the bits that need them."""
    table = loaded.table
    if table is not None:
        write_pages(
            image, header.table_offset, header.table_size,
            lambda at, size: table_part(table, at, size),
        )  # fmt: skip
        image.flush()
    write_pages(
        image, header.bitmap_offset, len(loaded.bitmap),
        lambda at, size: bytes(loaded.bitmap[at : at + size]),
    )  # fmt: skip
    for at, data in _padding(image.fd, header, image.path, len(loaded.bitmap)):
        if any(data):
            image.write(at, bytes(len(data)))
    image.flush()


def _padding(fd: int, header: Header, path: str, used: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what is stored of the bitmap behind its first `used` bytes."""
    end = header.bitmap_offset + header.bitmap_size
    for start, length, is_data in file_extents(fd, header.bitmap_offset + used, end):
        for at in range(start, start + length if is_data else start, MIB):
            yield at, metadata.read_area(fd, at, min(MIB, start + length - at), path)


def padding_bits(fd: int, header: Header, path: str, stored: bytes) -> int:
    """Count the bits behind the last block; `stored` is the bitmap as far as it has blocks."""
    blocks = metadata.block_count(header) if header.has_base else 0
    behind = sum(
        metadata.count_set(data, len(data) * 8)
        for _, data in _padding(fd, header, path, len(stored))
    )
    return behind + metadata.count_set(stored, len(stored) * 8) - metadata.count_set(stored, blocks)


def table_part(table: "array[int]", at: int, size: int) -> bytes:
    """Return `size` bytes of the table section from `at` on; behind the entries is padding."""
    entries = table[at // 4 : (at + size) // 4]
    if sys.byteorder != "little":
        entries.byteswap()
    return entries.tobytes().ljust(size, b"\xff")


def write_pages(
    image: ImageFile, offset: int, size: int, wanted: Callable[[int, int], bytes]
) -> None:
    """Make the section hold `wanted(at, size)`, writing only pages that differ; no flush.

    The pages keep their storage: a full disk must never stop a commit.
    """
    for at in range(0, size, MIB):
        part = min(MIB, size - at)
        stored, new = image.read(offset + at, part), wanted(at, part)
        if stored == new:
            continue
        for page in range(0, part, PAGE):
            if stored[page : page + PAGE] != new[page : page + PAGE]:
                image.write(offset + at + page, new[page : page + PAGE])


def renew_extension(image: ImageFile, header: Header) -> Header:
    """Give an image whose extension does not count a new one; the journal must be empty.

    The identity of the base stays unknown: what nobody has watched is not blessed anew.
    """
    if header.trusted_extension is not None:
        return header
    old = header.extension
    extension = Extension(
        image_uuid=uuid.uuid4().bytes,
        open_session=os.urandom(16),
        boot_id=bytes(16),
        create_time=old.create_time if old is not None else 0,
        compatible_features=codec.FEATURE_JOURNAL_TRAILERS,
        base_length=0,
        base_kind=codec.BASE_UNKNOWN,
        base_id=UNKNOWN_IDENTITY,
    )
    header = editing.write_header(image, header, replace(header, extension=extension))
    version = max(codec.FORMAT_VERSION, header.create_version)
    return editing.write_header(image, header, replace(header, last_open_version=version))


def extend_files(files: Files, image_length: int, data_length: int) -> None:
    """Make files longer where they are shorter, durably; on an error none of them is."""
    wanted = [(files.image, image_length), (files.data, data_length)]
    before = [(file, file.length(), length) for file, length in wanted if length]
    try:
        for file, now, length in before:
            file.truncate(max(length, now))
        if before:
            files.flush()
    except EngineError:
        for file, now, _ in before:
            file.truncate(now)
        raise


def reserve_metadata(image: ImageFile, header: Header) -> None:
    """Raise unless all metadata can be written: give them their space, and write their last
    sector as it is. A failure halfway would leave an image that is marked, and changed in part."""
    parts = [part for part in geometry.sections(header) if part.name != "data area"]
    for part in parts:
        used = geometry.used_bitmap(header) if part.name == "bitmap" else part.size
        image.reserve(part.offset, used)
    last = max(part.end for part in parts) - SECTOR
    image.write(last, image.read(last, SECTOR))


def clear_padding(header: Header, loaded: Metadata) -> None:
    """Clear the bits behind the last block, in memory."""
    blocks = metadata.block_count(header) if header.has_base else 0
    whole, rest = divmod(blocks, 8)
    if rest:
        loaded.bitmap[whole] &= (1 << rest) - 1
        whole += 1
    loaded.bitmap[whole:] = bytes(len(loaded.bitmap) - whole)


def cut_files(files: Files, header: Header, loaded: Metadata) -> None:
    """Cut the image and its data file behind the last byte that they need; devices stay."""
    image_end = geometry.required_length(header)
    data_end = geometry.required_data_length(header)
    if loaded.table is not None:
        end = geometry.place_offset(header, loaded.highest_place() + 1)
        data_end = max(data_end, end)
    if not header.data_file:
        image_end = max(image_end, data_end)
    else:
        files.data.truncate(min(files.data.length(), data_end))
    files.image.truncate(min(files.image.length(), image_end))
    files.flush()


def used_end(header: Header, loaded: Metadata) -> int:
    """Return the end of the storage that a compact image uses."""
    end = geometry.place_offset(header, loaded.highest_place() + 1)
    return end if header.data_file else max(end, geometry.required_length(header))


def unused_data(
    fd: int, header: Header, loaded: Metadata, end: int
) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of storage before `end` in places that no chunk has."""
    table = loaded.table
    assert table is not None
    first = geometry.first_place(header)
    limit = geometry.end_place(header, min(end, paths.file_length(fd)))  # entries may be wrong
    for low, high in _unused_places(table, first, limit):
        start = geometry.place_offset(header, low)
        stop = geometry.place_offset(header, high)
        for offset, length, is_data in file_extents(fd, start, stop):
            if is_data:
                yield offset, length


def _unused_places(table: "array[int]", first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of places in [first, end) that no entry has; a few may lie far apart."""
    if end > _FEW_PLACES and end > 64 * len(table):
        used_places = sorted(entry for entry in table if first <= entry < end)
        for place in (*used_places, end):
            if first < place:
                yield first, place
            first = max(first, place + 1)
        return
    used = bytearray((end >> 3) + 1)
    for entry in table:
        if entry < end:
            used[entry >> 3] |= 1 << (entry & 7)
    for low, high, is_used in bit_runs(used, first, end):
        if not is_used:
            yield low, high


def free_unused(data: ImageFile, header: Header, loaded: Metadata) -> None:
    """Make holes of the storage of a compact image that no chunk has; a device keeps its own."""
    if loaded.table is not None and not data.is_device:
        end = used_end(header, loaded)
        for offset, length in list(unused_data(data.fd, header, loaded, end)):
            data.zero(offset, length)
