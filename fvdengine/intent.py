# SPDX-License-Identifier: Apache-2.0
"""An update of several sectors of the header is made or not made, whatever happens in between.

The new header goes into the backup copy first; then one bit of the extension says that it counts
(`FEATURE_UPDATE_STAGED`), and only then the sectors are written and the bit is taken back. Whoever
reads an image with the bit takes the fields that an update may change from the copy; the next
writer finishes what was begun.

An update of names is announced by another bit first: until it is taken back the copy may have other
names. Without it they differ by damage alone, see two_headers.

A shrink that can no longer be taken back is a size in the extension. The sizes of the header are
valid before and after each of its steps, so readers go by them; the next writer finishes it.
"""

import os
from dataclasses import replace

from fvdengine import geometry
from fvdengine.errors import EngineError
from fvdengine.header import (
    BACKUP_OFFSET,
    FEATURE_NAMES_CHANGING,
    FEATURE_UPDATE_STAGED,
    HEADER_COPY_SIZE,
    Extension,
    Header,
)
from fvdengine.validation import validate_header

# What an update may change; where things lie is none of it.
UPDATE_FIELDS = (
    "journal_buf_size", "journal_clean_buf_period", "storage_grow_unit", "add_storage_cmd",
    "copy_on_read", "max_outstanding_copy_on_read_data", "prefetch_start_delay",
    "num_prefetch_slots", "bytes_per_prefetch", "prefetch_read_throughput_measure_time",
    "prefetch_write_throughput_measure_time", "prefetch_min_read_throughput",
    "prefetch_min_write_throughput", "prefetch_max_read_throughput",
    "prefetch_max_write_throughput", "prefetch_throttle_time", "base_img", "base_img_fmt",
    "data_file", "data_file_fmt", "need_zero_init",
)  # fmt: skip
NAME_FIELDS = ("base_img", "base_img_fmt", "data_file", "data_file_fmt")
_CHANGING = FEATURE_UPDATE_STAGED | FEATURE_NAMES_CHANGING
_IDENTITY = ("base_kind", "base_id", "base_length")


def has_room(header: Header) -> bool:
    """Whether the image has a backup copy."""
    return header.header_size >= BACKUP_OFFSET + HEADER_COPY_SIZE


def can_stage(header: Header) -> bool:
    """Whether an update of several sectors can be made whole: not where an older version wrote
    the image last, either."""
    return has_room(header) and header.trusted_extension is not None


def is_staged(header: Header) -> bool:
    """Whether the backup copy holds an update that counts already."""
    extension = header.trusted_extension
    return extension is not None and bool(extension.compatible_features & FEATURE_UPDATE_STAGED)


def is_renaming(header: Header) -> bool:
    """Whether names were being changed, so that those of the backup copy may be others."""
    extension = header.trusted_extension
    return extension is not None and bool(extension.compatible_features & _CHANGING)


def is_shrinking(header: Header) -> bool:
    """Whether a shrink was cut short that counts already."""
    extension = header.trusted_extension
    return extension is not None and extension.shrink_size != 0


def shrunk(header: Header) -> Header:
    """Return `header` with the sizes at the end of the shrink that is under way, if one is.

    A size above that of the disk, which no shrink has written, changes nothing.
    """
    if not is_shrinking(header):
        return header
    assert header.extension is not None
    size = min(header.virtual_disk_size, header.extension.shrink_size)
    return replace(
        header, virtual_disk_size=size, base_img_size=min(header.base_img_size, size)
    )


def good_backup(fd: int, path: str) -> Header | None:
    """Return the header in the backup copy if it could replace one that is lost."""
    try:
        data = os.pread(fd, HEADER_COPY_SIZE, BACKUP_OFFSET)
        header = Header.unpack(data, path)
        validate_header(header, path, geometry.SIZE_MAX)
    except (EngineError, OSError):
        return None
    return header if has_room(header) and header.extension is not None else None


def copy_of(header: Header, fd: int, path: str) -> Header | None:
    """Return the backup copy, if it can be read and belongs to the image of `header`."""
    if not has_room(header) or header.extension is None:
        return None
    try:
        copy = Header.unpack(os.pread(fd, HEADER_COPY_SIZE, BACKUP_OFFSET), path)
    except (EngineError, OSError):
        return None
    if copy.extension is None or copy.extension.image_uuid != header.extension.image_uuid:
        return None
    return copy


def marked(header: Header) -> Header:
    """Return `header` with the bit that the copy holds an update; no other is needed then."""
    assert header.extension is not None
    return replace(header, extension=_with_bit(header.extension, FEATURE_UPDATE_STAGED))


def renaming(header: Header) -> Header:
    """Return `header` with the bit that names are being changed."""
    assert header.extension is not None
    return replace(header, extension=_with_bit(header.extension, FEATURE_NAMES_CHANGING))


def plain(header: Header) -> Header:
    """Return `header` without either bit."""
    assert header.extension is not None
    return replace(header, extension=_with_bit(header.extension, 0))


def settled(header: Header, fd: int, path: str) -> Header:
    """Return the header that counts where `header` stands at the front of the file.

    If the copy cannot be used, as after damage, the front counts as it is, without the bit.
    """
    if not is_staged(header):
        return header
    front = plain(header)
    copy = copy_of(front, fd, path)
    if copy is None:
        return front
    found = _joined(front, copy)
    try:
        validate_header(found, path, geometry.SIZE_MAX)
    except EngineError:
        return front
    return found


def _joined(front: Header, copy: Header) -> Header:
    assert front.extension is not None
    assert copy.extension is not None
    identity = {name: getattr(copy.extension, name) for name in _IDENTITY}
    values = {name: getattr(copy, name) for name in UPDATE_FIELDS}
    return replace(front, extension=replace(front.extension, **identity), **values)


def _with_bit(extension: Extension, bit: int) -> Extension:
    features = extension.compatible_features & ~_CHANGING
    return replace(extension, compatible_features=features | bit)
