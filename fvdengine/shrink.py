# SPDX-License-Identifier: Apache-2.0
"""Make a disk that nobody has open smaller, whatever lies behind its new end.

The order (FORMAT.md, section 5): settle, so that the journal is empty; a session, clean = 0; the
tail zeroed, its chunks unmapped, which leaves a valid disk of the old size; then one sector that
says "shrinking to SIZE", and from there on the shrink is made, if need be by the next writer:
base_img_size, so that growing again shows zeros; virtual_disk_size; padding; the length of the
file; the backup copy; "shrinking" taken back; clean = 1. Between any two of these writes the
sizes at the front are valid, and the backup copy is not read before it is whole.
"""

from dataclasses import replace

from fvdengine import checkpoint, editing, geometry, intent
from fvdengine.checkpoint import Files
from fvdengine.geometry import UNMAPPED
from fvdengine.header import Header
from fvdengine.metadata import Metadata


def shrink(files: Files, header: Header, loaded: Metadata, size: int) -> Header:
    """Cut the disk to `size` bytes; return the header that is there now.

    `loaded` is the state after replay; its bitmap and table are changed as those on disk.
    """
    header = checkpoint.settle(files, header, loaded)
    header = editing.begin_change(files.image, header)
    _free_tail(files, header, loaded, size)
    extension = header.extension
    assert extension is not None
    header = editing.write_header(
        files.image, header, replace(header, extension=replace(extension, shrink_size=size))
    )
    return _go_on(files, header, loaded)


def finish(files: Files, header: Header, loaded: Metadata) -> Header:
    """End a shrink that was cut short after it counted; `header` is the one at the front."""
    return _go_on(files, checkpoint.settle(files, header, loaded), loaded)


def write_sizes(files: Files, header: Header) -> Header:
    """Write the sizes of the shrink that is under way: the base's first, never above the disk's."""
    smaller = intent.shrunk(header)
    header = editing.write_header(
        files.image, header, replace(header, base_img_size=smaller.base_img_size)
    )
    return editing.write_header(files.image, header, smaller)


def _go_on(files: Files, header: Header, loaded: Metadata) -> Header:
    header = write_sizes(files, header)
    if loaded.table is not None:
        del loaded.table[geometry.chunk_count(header.virtual_disk_size, header.chunk_size) :]
    checkpoint.clear_padding(header, loaded)
    checkpoint.write_metadata(files.image, header, loaded)
    checkpoint.cut_files(files, header, loaded)
    checkpoint.free_unused(files.data, header, loaded)
    return editing.end_change(files.image, header)


def _free_tail(files: Files, header: Header, loaded: Metadata, size: int) -> None:
    """Zero what stays mapped behind `size` and unmap the rest, durably."""
    table = loaded.table
    if table is None:
        files.data.zero(header.data_offset + size, header.virtual_disk_size - size)
        files.data.flush()
        return
    first, rest = divmod(size, header.chunk_size)
    if rest and table[first] != UNMAPPED:
        start = geometry.place_offset(header, table[first])
        files.data.zero(start + rest, header.chunk_size - rest)
        files.data.flush()
    first += bool(rest)
    del table[first:]  # what is behind its end is written as unmapped
    checkpoint.write_metadata(files.image, header, loaded)
