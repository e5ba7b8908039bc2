# SPDX-License-Identifier: Apache-2.0
"""The header at the front and its backup copy, where they are not alike or one of them is lost."""

import contextlib
from array import array
from dataclasses import replace

from fvdengine import geometry, intent, metadata, paths, records
from fvdengine import header as codec
from fvdengine.errors import (
    ExtensionDamaged,
    HeadersDisagree,
    ImageTruncated,
    InvalidJournal,
    PrefetchedFalsely,
    UnknownBaseFormat,
    UnknownDataFormat,
)
from fvdengine.header import EPOCH_LIMIT, EXTENSION_OFFSET, HEADER_COPY_SIZE, Extension, Header
from fvdengine.table_faults import size_is_damaged
from fvdengine.units import SECTOR
from fvdengine.validation import validate_header

# Where things lie never changes once an image is made (base_img_size only by shrinking): in a copy
# of it that cannot be another's.
LAYOUT_FIELDS = (
    "header_size", "data_offset", "base_img_size", "bitmap_offset", "bitmap_size", "block_size",
    "journal_offset", "journal_size", "table_offset", "chunk_size",
)  # fmt: skip
EPOCH_LEAP = 1 << 20  # no writer gets so far beyond all that its journal holds
_SECTOR_4 = slice(4 * SECTOR, 5 * SECTOR)
_CLEAN_AND_EPOCH = slice(2160, 2172)  # the fields of sector 4 that change at run time


def disagreement(fd: int, path: str, front: Header) -> list[str]:
    """Name the fields in which one of two good headers must be damaged.

    A layout never changes once an image is made; to go on with a wrong one would destroy what
    the right one leads to, and the copy with it. A disk may grow, never beyond its storage; one
    that became smaller was shrunk on purpose, or its size is damaged.
    """
    if size_is_damaged(fd, intent.shrunk(front), path):
        return ["virtual_disk_size"]
    backup = intent.good_backup(fd, path)
    if backup is None or backup.extension is None:
        return []
    is_alike = (
        front.extension is not None
        and front.extension.image_uuid == backup.extension.image_uuid
    )
    if is_alike and front.create_version != backup.create_version:
        return ["create_version"]  # a higher one makes every writer look older
    if front.last_open_version < codec.FORMAT_VERSION:
        return []  # its writer knew no copy
    if not is_alike and (front.extension is not None or not intent.has_room(front)):
        return []  # made anew after an older writer, or there is no copy, only what looks like one
    smaller = intent.shrunk(replace(backup, extension=front.extension))
    fields = [
        name for name in LAYOUT_FIELDS if getattr(front, name) != getattr(backup, name)
        and not (name == "base_img_size" and front.base_img_size == smaller.base_img_size)
    ]  # fmt: skip
    if not intent.is_renaming(front):
        fields += [
            name for name in intent.NAME_FIELDS
            if (getattr(front, name) or "raw") != (getattr(backup, name) or "raw")
            and (front.needs_base or name.startswith("data_file"))
        ]
    size, known = front.virtual_disk_size, backup.virtual_disk_size
    is_stored = not front.is_compact and not front.data_file
    end, known_end = front.data_offset + size, backup.data_offset + known
    if (size < known and size != smaller.virtual_disk_size) or (
        is_stored and known_end <= paths.file_length(fd) < end
    ):
        fields.append("virtual_disk_size")
    if not fields and front.is_compact and _is_table_too_long(fd, path, front, backup):
        fields.append("table_size")
    if not fields and _is_epoch_too_high(fd, path, front, backup):
        fields.append("stable_journal_epoch")
    return fields


def _is_table_too_long(fd: int, path: str, front: Header, backup: Header) -> bool:
    """Whether the table can have grown to its size by damage alone.

    Growing moves chunks out of the way first and says so, and gives the file its length.
    """
    if front.table_size <= backup.table_size:
        return False
    if geometry.required_length(backup) <= paths.file_length(fd) < geometry.required_length(front):
        return True
    first, known_first = geometry.first_place(front), geometry.first_place(backup)
    if not front.data_file and not front.chunks_relocated:
        return front.table_offset + front.table_size > front.data_offset
    if first == known_first:
        return False

    table = metadata.load_table(fd, front, path)
    assert table is not None
    if _has_place(table, known_first, first):
        return True
    with contextlib.suppress(InvalidJournal):
        journal = metadata.load_journal(fd, front, path)
        records.replay(journal, front, bytearray(geometry.used_bitmap(front)), table)
    return _has_place(table, known_first, first)


def _is_epoch_too_high(fd: int, path: str, front: Header, backup: Header) -> bool:
    """Whether the journal has sectors, all of them far below the epoch from which on they count.

    In an image that was closed nothing depends on it.
    """
    limit = front.stable_journal_epoch - EPOCH_LEAP
    if front.is_clean or backup.stable_journal_epoch >= limit:
        return False

    def read(at: int, size: int) -> bytes:
        return metadata.read_area(fd, front.journal_offset + at, size, path)

    return 0 <= max(records.trailer_epochs(read, front.journal_size), default=-1) < limit


def _has_place(table: "array[int]", first: int, end: int) -> bool:
    pages = metadata.mapped_pages(table)
    return any(first <= place < end for _, page in pages for place in page)


def validate(fd: int, path: str, front: Header, length: int) -> None:
    """Like validate_header, but raise HeadersDisagree where damage alone lets a file of `length`
    bytes look cut short, or a format look unknown."""
    try:
        validate_header(front, path, length)
    except (ImageTruncated, UnknownBaseFormat, UnknownDataFormat):
        with contextlib.suppress(ImageTruncated):
            if fields := disagreement(fd, path, front):
                raise refusal(path, front, fields) from None
        raise


def refusal(path: str, front: Header, fields: list[str]) -> HeadersDisagree:
    """Return the error for headers that disagree in `fields`; its hint names what can help."""
    error = HeadersDisagree(path=path, fields=", ".join(fields))
    if not intent.has_room(front):
        error.hint = (
            "Copy the image first. Then `fvdctl check --repair --header backup` takes the copy, "
            "for which the header has no room; see what `--dry-run` says of it."
        )
    return error


def is_extension_damaged(header: Header) -> bool:
    """Whether the extension has a wrong sum though its last writer knew it: older ones set their
    own last_open_version."""
    version = max(codec.FORMAT_VERSION, header.create_version)
    return header.extension is None and header.last_open_version >= version


def backup_of_damaged(fd: int, path: str, header: Header) -> Header | None:
    """Return the copy from which the extension of `header` can be restored; in an image without
    room for one guests' bytes may look like it."""
    return intent.good_backup(fd, path) if intent.has_room(header) else None


def refuse_damage(fd: int, path: str, header: Header, *, is_taken_over: bool = False) -> None:
    """Raise HeadersDisagree, ExtensionDamaged or PrefetchedFalsely where only a repair may go on.

    An extension without a copy to restore it from counts as one of an older writer. A successor
    goes on without it: what it would tell is in the live state.
    """
    fields = disagreement(fd, path, header)
    if fields:
        raise refusal(path, header, fields)
    if is_taken_over:
        return
    if is_extension_damaged(header) and backup_of_damaged(fd, path, header) is not None:
        raise ExtensionDamaged(path=path)
    _, missing = metadata.missing_bits(fd, intent.shrunk(header), path)
    if missing:
        raise PrefetchedFalsely(path=path, missing=missing)


def restored(
    raw: bytes, backup: Header, *, is_epoch_damaged: bool = False
) -> tuple[Header, bool]:
    """Return the backup's header with what the lost one still tells, and if that has the epoch.

    Sector 4 is believed if all else in it is as in the copy. Without it all that the journal
    holds from the copy's epoch on is replayed: for bits this is always right.
    """
    extension = None
    if len(raw) == HEADER_COPY_SIZE:
        extension = Extension.unpack(raw[EXTENSION_OFFSET:])
    assert backup.extension is not None
    if extension is None or extension.image_uuid != backup.extension.image_uuid:
        extension = replace(backup.extension, boot_id=bytes(16))
    if intent.is_renaming(replace(backup, extension=extension)):  # what counts is in the copy
        extension = replace(
            backup.extension, open_session=extension.open_session, boot_id=extension.boot_id
        )
    packed = bytearray(backup.pack())
    packed[_CLEAN_AND_EPOCH] = raw[_CLEAN_AND_EPOCH].ljust(12, b"\0")
    epoch = int.from_bytes(packed[2164:2172], "little")
    known = (
        not is_epoch_damaged
        and bytes(packed[_SECTOR_4]) == raw[_SECTOR_4]
        and backup.stable_journal_epoch <= epoch <= EPOCH_LIMIT
    )
    if not known:
        epoch = backup.stable_journal_epoch
    restored = replace(
        backup, clean_shutdown=0, stable_journal_epoch=epoch, extension=extension,
        last_open_version=max(codec.FORMAT_VERSION, backup.create_version),
    )  # fmt: skip
    return restored, known
