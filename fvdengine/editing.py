# SPDX-License-Identifier: Apache-2.0
"""Change an image that nobody has open: the lock, the few ways bytes change, header sectors.

Offline operations (update, shrink, repair) write through `ImageFile`, so that tests can record
every write and try each crash. The header is changed sector by sector, one write each with a
flush behind it: no field of 8 bytes or fewer crosses a sector. What may not come in parts is
staged, see write_update.
Bytes that belong to no known field (the rest of a longer extension) stay as they are.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import replace

from fvdengine import chain, intent, locking, paths, stores
from fvdengine import header as codec
from fvdengine.crc32c import crc32c
from fvdengine.errors import ImageTruncated, UnsupportedStore, from_os_error
from fvdengine.header import EXTENSION_OFFSET, EXTENSION_SIZE, HEADER_COPY_SIZE, Header
from fvdengine.locking import BOTH
from fvdengine.units import MIB, SECTOR

_BLKZEROOUT = 0x127F
_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x03  # with FALLOC_FL_KEEP_SIZE
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
_libc = ctypes.CDLL(None, use_errno=True)


class ImageFile:
    """A file of an image that is being changed; every error is one of ours and names `path`."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    def length(self) -> int:
        """Return the bytes of the file or device."""
        return paths.file_length(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes; raise ImageTruncated if the file ends before."""
        parts: list[bytes] = []
        at, end = offset, offset + size
        while at < end:
            try:
                part = os.pread(self.fd, min(end - at, 4 * MIB), at)
            except OSError as error:
                raise from_os_error(error, self.path, "read") from error
            if not part:
                raise ImageTruncated(path=self.path, actual=at, needed=end)
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self.fd, view, offset)
                view = view[written:]
                offset += written
        except OSError as error:
            raise from_os_error(error, self.path, "write") from error

    def zero(self, offset: int, length: int) -> None:
        """Make the bytes read as zeros, as a hole where the store can; never grows a file."""
        end = min(offset + length, self.length())
        if offset >= end:
            return
        try:
            if self.is_device:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("=2Q", offset, end - offset))
            else:
                self._punch(offset, end - offset)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise from_os_error(error, self.path, "write") from error
            self._write_zeros(offset, end)

    def reserve(self, offset: int, length: int) -> None:
        """Give storage to what is a hole of a file, where the store can; its length stays."""
        if self.is_device or not length:
            return
        try:
            self._fallocate(_FALLOC_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise from_os_error(error, self.path, "write") from error

    def _punch(self, offset: int, length: int) -> None:
        self._fallocate(_FALLOC_PUNCH_HOLE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        if _libc.fallocate(
            ctypes.c_int(self.fd), ctypes.c_int(mode), ctypes.c_int64(offset),
            ctypes.c_int64(length),
        ):  # fmt: skip
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _write_zeros(self, offset: int, end: int) -> None:
        piece = memoryview(bytes(MIB))
        while offset < end:
            part = piece[: end - offset]
            self.write(offset, part)
            offset += len(part)

    def truncate(self, length: int) -> None:
        """Set the length of a regular file; a device keeps its own."""
        if self.is_device:
            return
        try:
            os.ftruncate(self.fd, length)
        except OSError as error:
            raise from_os_error(error, self.path, "write") from error

    def flush(self) -> None:
        """Return when everything written so far is durable."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise from_os_error(error, self.path, "flush") from error


@contextlib.contextmanager
def open_for_change(path: str, *, wait_seconds: float = 0) -> Iterator[ImageFile]:
    """Open the image with both lock ranges, exclusively; raise ImageInUse naming the holder.

    Nothing of the content has been looked at.
    """
    fd = paths.open_file(path, writable=True, exclusive=True)
    try:
        verdict, store = stores.judge_store(fd)
        if verdict is stores.Verdict.REFUSED:
            raise UnsupportedStore(path=path, store=store)
        locking.lock(fd, path, BOTH, exclusive=True, wait_seconds=wait_seconds)
        yield ImageFile(fd, path)
    finally:
        os.close(fd)


def read_free_header(file: ImageFile) -> Header:
    """Return the valid header of an image that no dead process left live state of.

    An update that was cut short counts in it: whoever writes has to `finish_update` before.
    """
    header = chain.read_sound_header(file.fd, file.path)
    chain.check_not_left_live(header, file.path)
    return intent.plain(header) if intent.is_renaming(header) else header


# Header sectors ----------------------------------------------------------------------------


def _field_ranges() -> dict[str, range]:
    """Return where each field stands, from the format string of the codec."""
    ranges: dict[str, range] = {}
    names = iter(codec.HEADER_FIELD_NAMES)
    offset = 0
    for count, kind in re.findall(r"(\d*)([IQqs])", codec.FIELDS_FORMAT):
        times = 1 if kind == "s" else int(count or 1)
        size = struct.calcsize(f"<{count}s" if kind == "s" else f"<{kind}")
        for _ in range(times):
            ranges[next(names)] = range(offset, offset + size)
            offset += size
    return ranges


FIELD_RANGES = _field_ranges()


def patched(raw: bytes, old: Header, new: Header) -> bytes:
    """Return the 8192 bytes `raw`, which `old` was read from, with the fields of `new`."""
    data = bytearray(raw)
    packed = new.pack()
    for name, place in FIELD_RANGES.items():
        if getattr(old, name) != getattr(new, name):
            data[place.start : place.stop] = packed[place.start : place.stop]
    if new.extension != old.extension and new.extension is not None:
        end = EXTENSION_OFFSET + EXTENSION_SIZE
        size = EXTENSION_SIZE
        if old.extension is not None:  # perhaps a longer one, of a newer version
            (size,) = struct.unpack_from("<I", raw, EXTENSION_OFFSET)
        data[EXTENSION_OFFSET:end] = new.extension.pack()
        struct.pack_into("<2I", data, EXTENSION_OFFSET, size, 0)
        crc = crc32c(data[EXTENSION_OFFSET : EXTENSION_OFFSET + size])
        struct.pack_into("<I", data, EXTENSION_OFFSET + 4, crc)
    return bytes(data)


def _sector_order(raw: bytes, changed: bytes) -> list[int]:
    """Return the sectors that differ, in the order in which they are to be written.

    A name that lay wholly in its first sector is still in force until that sector is written,
    if it is written last; one that will lie wholly there is in force at once, if it is written
    first. Only where a name is long before and after does a crash leave a mixture of both.
    """
    sectors = [
        number for number in range(HEADER_COPY_SIZE // SECTOR)
        if raw[number * SECTOR : (number + 1) * SECTOR]
        != changed[number * SECTOR : (number + 1) * SECTOR]
    ]  # fmt: skip
    for name in ("data_file", "base_img", "add_storage_cmd"):
        place = FIELD_RANGES[name]
        boundary = (place.start // SECTOR + 1) * SECTOR
        if raw[boundary : place.stop] == changed[boundary : place.stop]:
            continue
        is_new_short = b"\0" in changed[place.start : boundary]
        return sectors if is_new_short else sectors[::-1]
    return sectors


def write_header(file: ImageFile, old: Header, new: Header) -> Header:
    """Write the sectors in which `new` differs from `old`; return `new`.

    One write and one flush a sector. The extension, which tells who may trust it, comes behind
    the fields. The backup copy is not touched, see `write_backup`.
    """
    raw = file.read(0, HEADER_COPY_SIZE)
    changed = patched(raw, old, new)
    order = _sector_order(raw, changed)
    extension = EXTENSION_OFFSET // SECTOR
    for number in sorted(order, key=lambda number: number == extension):
        file.write(number * SECTOR, changed[number * SECTOR : (number + 1) * SECTOR])
        file.flush()
    return new


def write_update(file: ImageFile, old: Header, new: Header) -> None:
    """Make the image's header `new`, and its backup copy: all of it or nothing, see intent.

    Without a backup copy, or where an older version wrote the image last, a crash may leave some
    of the sectors changed.
    """
    raw = file.read(0, HEADER_COPY_SIZE)
    changed = patched(raw, old, new)
    is_renamed = any(getattr(old, name) != getattr(new, name) for name in intent.NAME_FIELDS)
    is_small = len(_sector_order(raw, changed)) < 2 and not is_renamed
    if not intent.can_stage(old) or is_small:
        write_header(file, old, new)
        write_backup(file, new)
        return
    if is_renamed:
        old = write_header(file, old, intent.renaming(old))
    file.write(codec.BACKUP_OFFSET, changed)
    file.flush()
    write_header(file, write_header(file, old, intent.marked(old)), new)


def is_one_step(old: Header, new: Header) -> bool:
    """Whether write_update makes `new` of `old` whole or not at all, but for the extension, which
    follows and tells of a base that is another."""
    if intent.can_stage(old):
        return True
    changed = [
        place for name, place in FIELD_RANGES.items() if getattr(old, name) != getattr(new, name)
    ]
    sectors = {at // SECTOR for place in changed for at in (place.start, place.stop - 1)}
    return len(changed) <= 1 or len(sectors) <= 1


def finish_update(file: ImageFile) -> None:
    """Write the sectors of an update that was cut short, if there is one; make the copy of one that
    does not count as the header is."""
    front = Header.unpack(file.read(0, HEADER_COPY_SIZE), file.path)
    if intent.is_staged(front):
        write_header(file, front, intent.settled(front, file.fd, file.path))
    elif intent.is_renaming(front):
        write_backup(file, front, intent.plain(front))
        write_header(file, front, intent.plain(front))


def write_backup(file: ImageFile, header: Header, changed: Header | None = None) -> None:
    """Make the backup copy equal to `header`, which is on disk, or to `changed`."""
    if intent.has_room(header):
        raw = file.read(0, HEADER_COPY_SIZE)
        file.write(codec.BACKUP_OFFSET, patched(raw, header, changed or header))
        file.flush()


# A change of metadata or content -----------------------------------------------------------


def begin_change(file: ImageFile, header: Header) -> Header:
    """Begin a session as a writable open does, durably: I4, and clones must see the change.

    The extension must be trusted.
    """
    extension = header.extension
    assert header.trusted_extension is not None
    assert extension is not None
    session = replace(extension, open_session=os.urandom(16), boot_id=bytes(16))
    return write_header(file, header, replace(header, clean_shutdown=0, extension=session))


def end_change(file: ImageFile, header: Header) -> Header:
    """Mark the image clean after all else is durable (I4), the backup copy included.

    A shrink that was under way is over once the copy has its sizes.
    """
    file.flush()
    done = header
    if header.extension is not None:
        extension = replace(header.extension, boot_id=bytes(16), shrink_size=0)
        done = replace(header, extension=extension)
    write_backup(file, header, done)
    done = write_header(file, header, done)
    return write_header(file, done, replace(done, clean_shutdown=1))
