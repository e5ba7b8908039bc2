# SPDX-License-Identifier: Apache-2.0
"""The live-state files of an attached image: made, adopted after a death, removed.

A state directory holds `live` (first page: the header below; from 4096 on the engine's bitmap)
and `stats` (the counters). The engine maps both. A successor of a dead process may take the
content of `live` for the truth only if it belongs to exactly this image, session and boot: the
header says so, and anything that does not match is refused, never guessed (invariant I7).

Life of a live file: made under another name, with the session that the engine is going to begin and
the one that the image had before -> renamed -> the engine begins that session on the disk ->
adopted any number of times -> removed after a clean close. While the disk still has the former
session, nobody was served: dropping the file then loses nothing.
"""

import contextlib
import enum
import errno
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from fvdengine import geometry, opening
from fvdengine.crc32c import crc32c
from fvdengine.errors import (
    EngineError,
    LiveStateDamaged,
    LiveStateMismatch,
    LiveStateOutdated,
    LiveStateUnfinished,
    NoSpace,
    ReadOnlyStore,
    from_os_error,
)
from fvdengine.header import Header
from fvdengine.opening import OpenPlan
from fvdengine.units import PAGE, round_up

MAGIC = b"FVDLIVE\0"
VERSION = 1
HEADER_SIZE = 4096
LIVE_NAME = "live"
_NEW_NAME = "live.new"
STATS_NAME = "stats"
# Memory for a successor's files; never written to, so that it holds zeros.
_RESERVED = {_NEW_NAME: "live.reserved", STATS_NAME: "stats.reserved"}

_HEADER = struct.Struct("<8sIIQQQ16s16s16sQQQ16s16s")
_CRC_OFFSET = 12


class LivePresence(enum.Enum):
    """What a state directory holds."""

    ABSENT = "absent"
    FOUND = "found"
    INVALID = "invalid"  # unreadable, another version, or damaged


@dataclass(frozen=True, slots=True)
class LiveHeader:
    """The first page of a live file. `path` identifies a block device, whose inode may change.

    open_session is the session that the engine is to begin, former_session the one that the image
    had before: they tell whether the process died before its session stood on the disk.
    """

    virtual_size: int
    bitmap_size: int
    block_size: int
    image_uuid: bytes
    open_session: bytes
    boot_id: bytes
    st_dev: int
    st_ino: int
    st_rdev: int
    attachment_uuid: bytes
    former_session: bytes
    path: str

    def pack(self) -> bytes:
        """Return the whole page with its sum."""
        body = _HEADER.pack(
            MAGIC, VERSION, 0, self.virtual_size, self.bitmap_size, self.block_size,
            self.image_uuid, self.open_session, self.boot_id, self.st_dev, self.st_ino,
            self.st_rdev, self.attachment_uuid, self.former_session,
        )  # fmt: skip
        encoded = os.fsencode(self.path)[: HEADER_SIZE - _HEADER.size - 1]
        page = (body + encoded).ljust(HEADER_SIZE, b"\0")
        return page[:_CRC_OFFSET] + struct.pack("<I", crc32c(page)) + page[_CRC_OFFSET + 4 :]

    @classmethod
    def unpack(cls, page: bytes) -> "LiveHeader":
        """Return the header in `page`; raise ValueError saying what is wrong with it."""
        if len(page) < HEADER_SIZE or page[:8] != MAGIC:
            raise ValueError("it is not a live-state file")
        version, expected = struct.unpack_from("<2I", page, 8)
        if version != VERSION:
            raise ValueError(f"it has version {version}, known is {VERSION}")
        if crc32c(page[:_CRC_OFFSET] + bytes(4) + page[_CRC_OFFSET + 4 : HEADER_SIZE]) != expected:
            raise ValueError("its header is damaged")
        values = _HEADER.unpack_from(page)[3:]
        encoded = page[_HEADER.size : HEADER_SIZE].rstrip(b"\0")
        return cls(*(*values, os.fsdecode(encoded)))


@dataclass(slots=True)
class LiveState:
    """The open files of a state directory; `close` them, `remove` them after a clean stop."""

    directory: Path
    live_fd: int
    stats_fd: int
    header: LiveHeader
    is_closed: bool = False

    @property
    def attachment_uuid(self) -> bytes:
        return self.header.attachment_uuid

    def close(self) -> None:
        """Close the descriptors and leave the files; idempotent."""
        if not self.is_closed:
            self.is_closed = True
            os.close(self.live_fd)
            os.close(self.stats_fd)

    def remove(self) -> None:
        """Close and remove the files: only after the image was closed cleanly."""
        self.close()
        for name in (LIVE_NAME, STATS_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.directory / name)


def live_header(plan: OpenPlan, attachment_uuid: bytes, session: bytes) -> LiveHeader:
    """Return the header that describes the image of `plan`."""
    header = plan.header
    extension = header.extension
    status = os.fstat(plan.layers[0].fd)
    is_device = stat.S_ISBLK(status.st_mode)
    return LiveHeader(
        virtual_size=header.virtual_disk_size,
        bitmap_size=header.bitmap_size,
        block_size=header.block_size,
        image_uuid=extension.image_uuid if extension else bytes(16),
        open_session=session,
        boot_id=plan.boot_id,
        st_dev=0 if is_device else status.st_dev,
        st_ino=0 if is_device else status.st_ino,
        st_rdev=status.st_rdev if is_device else 0,
        attachment_uuid=attachment_uuid,
        former_session=extension.open_session if extension else bytes(16),
        path=os.path.realpath(plan.path),
    )


def check_live(live: LiveHeader, plan: OpenPlan, directory: str) -> None:
    """Raise unless `live` is the state of exactly the image, session and boot of `plan`."""
    extension = plan.header.trusted_extension
    if extension is None:
        raise LiveStateMismatch(
            directory=directory, path=plan.path, reason="the image does not say its session"
        )
    wanted = live_header(plan, live.attachment_uuid, extension.open_session)
    if live.boot_id != plan.boot_id and extension.boot_id != plan.boot_id:
        raise LiveStateOutdated(
            directory=directory, path=plan.path, reason="it is from an earlier boot"
        )
    names = {
        "boot_id": "it is from an earlier boot",
        "st_dev": "it belongs to another file",
        "st_ino": "it belongs to another file",
        "st_rdev": "it belongs to another device",
        "image_uuid": "it belongs to another image",
        "bitmap_size": "the size of the bitmap differs",
        "block_size": "the block size differs",
        "open_session": "the image was opened for writing since",
    }
    if live.open_session != wanted.open_session and live.former_session == wanted.open_session:
        names["open_session"] = ""
    # In one session a disk may have grown, and nothing else.
    if live.virtual_size > wanted.virtual_size:
        names["virtual_size"] = "the size differs"
    if wanted.st_rdev:
        names["path"] = "it belongs to another device"
    for name, reason in names.items():
        if getattr(wanted, name) != getattr(live, name):
            if not reason:
                raise LiveStateUnfinished(
                    directory=directory, path=plan.path,
                    reason="its process died before its session began",
                )  # fmt: skip
            raise LiveStateMismatch(directory=directory, path=plan.path, reason=reason)
    if extension.boot_id != plan.boot_id or plan.header.is_clean:
        raise LiveStateMismatch(
            directory=directory, path=plan.path, reason="the image was closed since"
        )


def state_error(error: OSError, path: str, action: str = "write to") -> EngineError:
    """What `error` means for `path` in a state directory, with the remedy for that."""
    made = from_os_error(error, path, action)
    if isinstance(made, ReadOnlyStore):
        made.hint = "Remount it for writing (mount -o remount,rw), or use another state directory."
    elif isinstance(made, NoSpace):
        made.hint = "Free some space there, or enlarge the tmpfs (mount -o remount,size=...)."
    return made


def live_presence(directory: str | os.PathLike[str]) -> LivePresence:
    """Return what `directory` holds, without judging which image it belongs to."""
    try:
        _read_header(Path(directory))
    except FileNotFoundError:
        return LivePresence.ABSENT
    except ValueError:
        return LivePresence.INVALID
    return LivePresence.FOUND


def live_header_in(directory: str | os.PathLike[str]) -> LiveHeader | None:
    """Whose state `directory` holds; None where it holds none that can be read."""
    try:
        return _read_header(Path(directory))
    except (FileNotFoundError, ValueError):
        return None


def live_session(directory: str | os.PathLike[str]) -> bytes | None:
    """The session whose state `directory` holds; None where it holds none that can be read."""
    header = live_header_in(directory)
    return header.open_session if header is not None else None


def live_image(directory: str | os.PathLike[str]) -> str | None:
    """The path of the image whose state `directory` holds; None where it holds none to be read."""
    header = live_header_in(directory)
    return header.path if header is not None else None


def create_live(
    directory: str | os.PathLike[str],
    plan: OpenPlan,
    attachment_uuid: bytes,
    sizes: tuple[int, int] | None = None,
    session: bytes | None = None,
) -> LiveState:
    """Make fresh state files for the image of `plan`, each allocated as a whole. `session` is that
    of the opening, 16 bytes, by default of chance.

    Files that a former attachment of the same image left are replaced (the plan would not exist
    if they still mattered); the live state of another image of this boot is refused.
    """
    target = Path(directory)
    live_size, stats_size = sizes or _sizes(plan)
    header = live_header(plan, attachment_uuid, session or os.urandom(16))
    descriptors: list[int] = []
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign_state(target, header, plan.path, plan.options.discard_live_state)
        # The counters first: a live file is only ever found beside a complete statistics page.
        descriptors.append(_allocate(target / STATS_NAME, stats_size))
        descriptors.append(_allocate(target / _NEW_NAME, live_size))
        os.pwrite(descriptors[1], header.pack(), 0)
        # Under its name only with its header: whoever dies before leaves no live state at all.
        os.rename(target / _NEW_NAME, target / LIVE_NAME)
    except BaseException as error:
        for fd in descriptors:
            os.close(fd)
        if isinstance(error, OSError):
            raise state_error(error, str(error.filename or target)) from error
        raise
    return LiveState(target, descriptors[1], descriptors[0], header)


def _sizes(plan: OpenPlan) -> tuple[int, int]:
    return opening.state_sizes(plan.header.bitmap_size, plan.header.table_size)


def create_stats(directory: str | os.PathLike[str]) -> int:
    """Make a statistics page alone, for an image that is only read; returns its descriptor."""
    target = Path(directory)
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _allocate(target / STATS_NAME, opening.state_sizes(0)[1])
    except OSError as error:
        raise state_error(error, str(error.filename or target)) from error


def adopt_live(directory: str | os.PathLike[str], plan: OpenPlan) -> LiveState:
    """Open the state that a dead process left, after checking that it belongs to `plan`."""
    target = Path(directory)
    try:
        header = _read_header(target)
    except FileNotFoundError as error:
        raise LiveStateMismatch(
            directory=str(target), path=plan.path, reason="there is none"
        ) from error
    except ValueError as error:
        raise LiveStateDamaged(directory=str(target), path=plan.path, reason=str(error)) from error
    check_live(header, plan, str(target))
    live_size, stats_size = _sizes(plan)
    descriptors: list[int] = []
    try:
        live_fd = os.open(target / LIVE_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        descriptors.append(live_fd)
        if os.fstat(live_fd).st_size < live_size:
            raise LiveStateDamaged(
                directory=str(target), path=plan.path, reason="it is too short"
            )
        descriptors.append(_counters(target / STATS_NAME, stats_size))
    except BaseException as error:
        for fd in descriptors:
            os.close(fd)
        if isinstance(error, OSError):
            raise state_error(error, str(error.filename), "open") from error
        raise
    return LiveState(target, descriptors[0], descriptors[1], header)


def _read_header(directory: Path) -> LiveHeader:
    """FileNotFoundError: there is none; ValueError: it is not to be read, for whatever reason. A
    pipe of that name makes nobody wait."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(directory / LIVE_NAME, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be opened ({error.strerror})") from error
    try:
        return LiveHeader.unpack(os.pread(fd, HEADER_SIZE, 0))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    finally:
        os.close(fd)


def _counters(path: Path, size: int) -> int:
    """Open the page with the counters, or begin a new one: they are no reason to serve nobody."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return _allocate(path, size)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size >= size:
        return fd
    os.close(fd)
    return _allocate(path, size)


def _refuse_foreign_state(directory: Path, header: LiveHeader, path: str, discard: bool) -> None:
    try:
        found = _read_header(directory)
    except FileNotFoundError:
        return
    except ValueError as error:
        # A newer version's, perhaps: not ours to destroy unasked.
        if discard:
            return
        raise LiveStateMismatch(directory=str(directory), path=path, reason=str(error)) from error
    is_same = (found.st_dev, found.st_ino, found.st_rdev, found.image_uuid) == (
        header.st_dev, header.st_ino, header.st_rdev, header.image_uuid,
    )  # fmt: skip
    # An earlier image of the same name is gone for good, and with it what its state was good for.
    if discard and found.path == os.path.realpath(path):
        return
    if found.boot_id == header.boot_id and not is_same:
        same = found.path == os.path.realpath(path)
        described = "an earlier image of that name" if same else found.path
        raise LiveStateMismatch(
            directory=str(directory), path=path, reason=f"it holds the state of {described}"
        )


def reserve(directory: str | os.PathLike[str], header: Header) -> None:
    """Have the memory for the state of the image that `header` describes, or of a clone of it, for
    the next create_live or create_stats in `directory`. NoSpace: nothing is left behind."""
    target = Path(directory)
    bitmap = header.bitmap_size
    if header.block_size:
        whole = geometry.bitmap_bytes(header.virtual_disk_size, header.block_size)
        bitmap = max(bitmap, round_up(whole, PAGE))
    sizes = opening.state_sizes(bitmap, header.table_size)
    try:
        for name, size in zip((_NEW_NAME, STATS_NAME), sizes, strict=True):
            os.close(_allocate_new(target / _RESERVED[name], size))
    except OSError as error:
        release_reserved(target)
        raise state_error(error, str(error.filename or target)) from error


def release_reserved(directory: str | os.PathLike[str]) -> None:
    """Give back what was reserved and is not used."""
    for name in _RESERVED.values():
        with contextlib.suppress(OSError):
            os.unlink(Path(directory) / name)


def _allocate(path: Path, size: int) -> int:
    """Make a new file with all its memory, or take what is reserved for it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    reserved = path.with_name(_RESERVED[path.name])
    try:
        fd = os.open(reserved, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return _allocate_new(path, size)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        os.posix_fallocate(fd, 0, size)
        os.rename(reserved, path)
    except OSError:
        os.close(fd)
        with contextlib.suppress(OSError):  # it may be given back at this moment
            os.unlink(reserved)
        return _allocate_new(path, size)
    return fd


def _allocate_new(path: Path, size: int) -> int:
    """Make a new file with all its memory: a full tmpfs must show here, not as SIGBUS later."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        os.unlink(path)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return fd
