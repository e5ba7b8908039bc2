# SPDX-License-Identifier: Apache-2.0
"""The files of a new image: made, locked, filled in the right order, removed on failure.

Order (FORMAT.md, create): the data file; then table, bitmap, journal and the length of the image
file, with the header's backup copy, fsync; the header last, fsync; then the directory. An
interrupted create leaves a file without the magic, never an image that only looks whole. A file
that is to be overwritten is replaced at the very end by one made beside it, so a failure leaves
the old one.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from fvdengine import chain, locking, paths, remote, stores, uris
from fvdengine import header as codec
from fvdengine.errors import (
    EngineError,
    ImageExists,
    ImageNotFound,
    InvalidOption,
    LiveStateLeft,
    UnsupportedStore,
)
from fvdengine.geometry import Layout
from fvdengine.header import Header
from fvdengine.locking import BOTH
from fvdengine.units import MIB

_BLKZEROOUT = 0x127F
_FILE_MODE = 0o666  # the umask decides, as with any file
_STEP = 4 * MIB

Identity = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class NewImage:
    """What is to be written. `bitmap` is that of the blocks found to be holes, or empty.

    `holes` are the stretches (offset, length) of the disk that these blocks cover.
    """

    layout: Layout
    header: Header
    bitmap: bytes = b""
    holes: tuple[tuple[int, int], ...] = ()

    @property
    def first_local(self) -> int:
        """Where the disk has no bitmap bits any more."""
        return self.layout.base_img_size


@contextlib.contextmanager
def image_target(
    path: str, force: bool, others: Collection[Identity], warnings: list[str]
) -> Iterator[int]:
    """Give a descriptor to write the image to; on success the image has its name, durably."""
    real = os.path.realpath(path)
    if not os.path.lexists(real):
        with new_file(real, warnings) as fd:
            yield fd
        return
    if not force:
        raise ImageExists(path=path)
    old = paths.open_file(real, writable=True, exclusive=True)
    try:
        if paths.file_identity(old) in others:
            raise InvalidOption(
                option=path, reason="is the base or one of its bases, or the data file",
                hint="Choose another name.",
            )  # fmt: skip
        locking.lock(old, path, BOTH, exclusive=True)
        _check_old_image(old, path)
        status = os.fstat(old)
        if stat.S_ISBLK(status.st_mode):
            yield old
        else:
            beside = f"{real}.{secrets.token_hex(4)}.new"
            with _new_file(beside, stat.S_IMODE(status.st_mode), warnings) as fd:
                yield fd
                os.rename(beside, real)
                _sync_directory(real)
    finally:
        os.close(old)


def _check_old_image(fd: int, path: str) -> None:
    """Even --force does not throw away what a dead process had acknowledged and not merged."""
    try:
        header = chain.read_header(fd, path)
    except EngineError:
        return
    try:
        chain.check_not_left_live(header, path)
    except LiveStateLeft as error:
        raise LiveStateLeft(
            path=path,
            hint="Serve it once with the same --state directory, or remove the file first.",
        ) from error


@contextlib.contextmanager
def new_file(real: str, warnings: list[str]) -> Iterator[int]:
    """Give a descriptor of the new file `real`, a real path; on success it has its name durably."""
    with _new_file(real, _FILE_MODE, warnings) as fd:
        yield fd
        _sync_directory_of(fd)


def unlink_if(path: str, fd: int) -> bool:
    """Remove the name `path`, a real path, if it is that of the open file; whether it was. OSError
    where it cannot be."""
    folder = paths.open_folder(os.path.dirname(path))
    try:
        name = os.path.basename(path)
        if not os.path.samestat(os.lstat(name, dir_fd=folder), os.fstat(fd)):
            return False
        os.unlink(name, dir_fd=folder)
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(folder)


@contextlib.contextmanager
def _new_file(path: str, mode: int, warnings: list[str]) -> Iterator[int]:
    """Make `path`, and remove it again unless the body succeeds: in one and the same directory,
    whatever leads there meanwhile."""
    folder = paths.open_folder(os.path.dirname(path))
    try:
        yield from _in_folder(folder, path, mode, warnings)
    finally:
        os.close(folder)


def _in_folder(folder: int, path: str, mode: int, warnings: list[str]) -> Iterator[int]:
    flags, name = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, os.path.basename(path)
    try:
        fd = os.open(name, flags, mode, dir_fd=folder)
    except FileExistsError as error:
        raise ImageExists(path=path) from error
    try:
        verdict, store = stores.judge_store(fd)
        if verdict is stores.Verdict.REFUSED:
            raise UnsupportedStore(path=path, store=store)
        if verdict is stores.Verdict.UNTESTED:
            warnings.append(f"{path} lies on {store}, which is not a tested place for images")
        locking.lock(fd, path, BOTH, exclusive=True)
        yield fd
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def data_target(
    name: str,
    image_path: str,
    allow_dirs: tuple[str, ...],
    others: Collection[Identity],
    warnings: list[str],
) -> Iterator[int]:
    """Give a descriptor of the data file, new or empty or a device; undone if the body fails."""
    real = os.path.realpath(name)
    paths.check_allowed(real, image_path, allow_dirs, "data file")
    if real == os.path.realpath(image_path):
        raise InvalidOption(
            option="--data-file", reason="names the image itself", hint="Choose another name."
        )
    if not os.path.lexists(real):
        if not os.path.isdir(os.path.dirname(real)):
            raise ImageNotFound(
                path=f"the directory {os.path.dirname(real)}", hint="Make the directory first."
            )
        with _new_file(real, _FILE_MODE, warnings) as fd:
            yield fd
        return
    fd = paths.open_file(real, writable=True, exclusive=True)
    try:
        is_device = stores.is_device(fd)
        if paths.file_identity(fd) in others:
            raise InvalidOption(
                option="--data-file", reason="is the base or one of its bases",
                hint="Choose another name.",
            )  # fmt: skip
        if not is_device and paths.file_length(fd):
            raise ImageExists(
                path=f"the data file {name}",
                hint="Name a file that does not exist or is empty, or a block device.",
            )
        locking.lock(fd, real, BOTH, exclusive=True)
        try:
            yield fd
        except BaseException:
            if not is_device:
                os.ftruncate(fd, 0)
            raise
    finally:
        os.close(fd)


def write_image(fd: int, data_fd: int | None, new: NewImage) -> Header:
    """Write everything but the header, make it durable, then write the header; return that.

    `data_fd` is the data file, None where the image is its own storage and -1 where an NBD server
    has the data.
    """
    layout, header = new.layout, new.header
    storage = fd if data_fd is None else data_fd
    if new.holes and not layout.table_size and not stores.is_device(storage):
        # Only holes of a file read zeros by themselves: devices are zeroed below.
        header = replace(header, need_zero_init=1)
    packed = header.pack()
    if data_fd is not None and data_fd >= 0:
        _write_data_file(data_fd, new)
    elif data_fd is not None and not layout.table_size:
        remote.zero_data_server(uris.parse_uri(header.data_file), data_zeros(new))
    if stores.is_device(fd):
        _need_room(fd, "the image", layout.file_size)
        os.pwrite(fd, bytes(codec.HEADER_SIZE_DEFAULT), 0)
        os.fsync(fd)
        zero_device(fd, device_zeros(new))
        if data_fd is None:
            zero_device(fd, data_zeros(new))
    else:
        os.ftruncate(fd, layout.file_size)
        # Metadata get their space now: a full disk must never stop a commit.
        os.posix_fallocate(fd, 0, layout.metadata_end)
    _write_metadata(fd, new)
    _write_all(fd, packed, codec.BACKUP_OFFSET)
    os.fsync(fd)
    _write_all(fd, packed, 0)
    os.fsync(fd)
    return header


def _write_metadata(fd: int, new: NewImage) -> None:
    layout = new.layout
    if new.bitmap:
        _write_all(fd, new.bitmap, layout.bitmap_offset)
    unmapped = memoryview(b"\xff" * min(_STEP, layout.table_size))
    for at in range(0, layout.table_size, _STEP):
        _write_all(fd, unmapped[: layout.table_size - at], layout.table_offset + at)


def _write_data_file(fd: int, new: NewImage) -> None:
    """Give the data file its length, or clear a device, and make that and its name durable."""
    if stores.is_device(fd):
        _need_room(fd, "the data file", new.layout.data_size)
        zero_device(fd, data_zeros(new))
    else:
        os.ftruncate(fd, new.layout.data_size)
    os.fsync(fd)
    _sync_directory_of(fd)


def _need_room(fd: int, what: str, needed: int) -> None:
    length = paths.file_length(fd)
    if length < needed:
        raise InvalidOption(
            option=what, reason=f"needs {needed} bytes and the device has {length}",
            hint="Choose a smaller size or a larger device.",
        )  # fmt: skip


def device_zeros(new: NewImage) -> Iterator[tuple[int, int]]:
    """Yield where the metadata of an image on a device lie: old content would be read there."""
    yield codec.HEADER_SIZE_DEFAULT, new.layout.metadata_end - codec.HEADER_SIZE_DEFAULT


def data_zeros(new: NewImage) -> Iterator[tuple[int, int]]:
    """Yield what of the data on a device or server could be read before it is written (I9).

    Nothing of a compact image: the engine clears a chunk before it maps it. Else what no bit
    hides: the disk behind the base, and the holes whose bits are set.
    """
    layout, size = new.layout, new.header.virtual_disk_size
    if layout.table_size:
        return
    for offset, length in (*new.holes, (new.first_local, size - new.first_local)):
        yield layout.data_offset + offset, length


def zero_device(fd: int, parts: Iterator[tuple[int, int]]) -> None:
    """Zero parts of a device: by its own means, or by writing where it has none."""
    for offset, length in parts:
        if not length:
            continue
        try:
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=2Q", offset, length))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP):
                raise
            _write_zeros(fd, offset, length)


def _write_zeros(fd: int, offset: int, length: int) -> None:
    piece = memoryview(bytes(MIB))
    end = offset + length
    while offset < end:
        offset += os.pwrite(fd, piece[: end - offset], offset)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _sync_directory_of(fd: int) -> None:
    """Make the name durable that the open file has by now, whatever its path leads to."""
    _sync_directory(os.readlink(f"/proc/self/fd/{fd}"))


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


