# SPDX-License-Identifier: Apache-2.0
"""Who may open an image: two OFD lock ranges on it, and the names of their holders.

*Owner* is held for a whole attachment (by the daemon, on a descriptor of its own), *writer* by
the process that does the I/O, on the very open file description it does it through: when the
range can be taken, no write of the previous holder is in flight. Writers hold both ranges
exclusively, readers share both, on every image and base of a chain. The ranges lie far behind
any byte of a file, so they never meet a lock on data.

OFD locks belong to the open file description: they survive fork and descriptor passing, and
end when the last descriptor is closed, by a kill too.
"""

import enum
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fvdengine.errors import ImageInUse, IoFailed, from_os_error

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi0q")
_POLL_SECONDS = 0.02
_COMMAND_LENGTH_MAX = 80


class LockRange(enum.IntEnum):
    """The ranges, by the offset of their single byte."""

    OWNER = 1 << 62
    WRITER = (1 << 62) + 1


BOTH = (LockRange.OWNER, LockRange.WRITER)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a lock on an image."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


def _set_lock(fd: int, lock_type: int, start: int) -> bool:
    request = _FLOCK.pack(lock_type, os.SEEK_SET, start, 1, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def try_lock(fd: int, ranges: Iterable[LockRange], *, exclusive: bool) -> bool:
    """Take all `ranges`, or none; return whether they were taken. Never waits."""
    taken: list[LockRange] = []
    for lock_range in ranges:
        if not _set_lock(fd, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, lock_range):
            unlock(fd, taken)
            return False
        taken.append(lock_range)
    return True


def unlock(fd: int, ranges: Iterable[LockRange] = BOTH) -> None:
    """Give the ranges back."""
    for lock_range in ranges:
        _set_lock(fd, fcntl.F_UNLCK, lock_range)


def lock(
    fd: int,
    path: str,
    ranges: Iterable[LockRange] = BOTH,
    *,
    exclusive: bool,
    wait_seconds: float = 0,
) -> None:
    """Take `ranges`, waiting up to `wait_seconds`; raise ImageInUse naming the holder."""
    wanted = tuple(ranges)
    deadline = time.monotonic() + wait_seconds
    try:
        while not try_lock(fd, wanted, exclusive=exclusive):
            if time.monotonic() >= deadline:
                raise in_use(fd, path)
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise IoFailed(
                path=path, reason="its file system has no file locks",
                hint="Move the image to ext4, xfs, btrfs or tmpfs.",
            ) from error  # fmt: skip
        raise from_os_error(error, path, "lock") from error


def in_use(fd: int, path: str) -> ImageInUse:
    """Return the error that names who holds the file open as `fd`."""
    holders = [holder for holder in find_holders(fd) if holder.pid != os.getpid()]
    if holders:
        return ImageInUse(
            path=path, holder=" and ".join(map(str, holders)), pids=[h.pid for h in holders]
        )
    if any(find_holders(fd)):
        return ImageInUse(path=path, holder="this process", pids=[os.getpid()])
    return ImageInUse(path=path, holder="another process that is not visible here", pids=[])


def find_holders(fd: int) -> list[Holder]:
    """Return the processes with one of our locks on the file that `fd` has open.

    A locked descriptor of this process counts too, `fd` itself included.
    """
    wanted = os.fstat(fd)
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return [Holder(pid, _command(pid)) for pid in pids if _holds(pid, wanted)]


def _holds(pid: int, wanted: os.stat_result) -> bool:
    return any(_is_locked(pid, number) for number in _descriptors_of(pid, wanted))


def _descriptors_of(pid: int, wanted: os.stat_result) -> Iterator[str]:
    """Yield the descriptors of `pid` that have the same file open."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return  # gone, or not ours to look into
    for number in numbers:
        try:
            found = os.stat(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) and not stat.S_ISDIR(
            found.st_mode
        ):
            yield number


def _is_locked(pid: int, number: str) -> bool:
    """Whether the descriptor's fdinfo has a lock line for one of our ranges.

    Such a line reads `lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:131 START END`.
    """
    try:
        with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as info:
            lines = info.readlines()
    except OSError:
        return False
    for line in lines:
        words = line.split()
        if words[:1] != ["lock:"] or "OFDLCK" not in words or not words[-2].isdigit():
            continue
        end = (1 << 63) - 1 if words[-1] == "EOF" else int(words[-1])
        if any(int(words[-2]) <= lock_range <= end for lock_range in LockRange):
            return True
    return False


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    text = " ".join(os.fsdecode(word) for word in words if word)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _COMMAND_LENGTH_MAX else text[: _COMMAND_LENGTH_MAX - 3] + "..."
