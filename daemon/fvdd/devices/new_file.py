# SPDX-License-Identifier: Apache-2.0
"""A file that gets its name only when it is complete, and replaces nothing.

Until then it has none (O_TMPFILE), so that whoever dies leaves nothing behind. A file system that
cannot do that gets NAME.fvd.part, locked while it is written; the next try takes over one that a
dead process left. How that gets its name is found out at once, before hours of copying.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Final

from fvdapi.errors import ApiError
from fvdengine import overlay
from fvdengine.errors import from_os_error

PART: Final = ".fvd.part"
NAME_MAX: Final = 255
# What is made beside an image while it is backed up.
RESERVED: Final = (overlay.SUFFIX, overlay.SUFFIX + overlay.FRESH)
AT_FDCWD: Final = -100
RENAME_NOREPLACE: Final = 1
# Of file systems that have no such thing.
MISSING: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EISDIR)

_libc = ctypes.CDLL(None, use_errno=True)


class NewFile:
    """`fd`: the empty file that will be `path`. Use it as a context: without `keep` nothing
    stays."""

    def __init__(self, path: str, size: int) -> None:
        """EngineError or ApiError: no file of `size` bytes can be made there."""
        check_new_name(path)
        self.path = path
        self._part: str | None = None
        self._give_name: Callable[[str, str], None] = os.link
        try:
            self.fd = self._open()
        except FileNotFoundError as error:  # also where the kernel alone makes files
            raise ApiError(
                "invalid_request",
                f"{path} cannot be created: {error.strerror}",
                hint="name a file in a directory in which files can be made",
            ) from error
        except OSError as error:
            raise from_os_error(error, path, "create") from error
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            self.close()
            raise from_os_error(error, path, "create") from error

    @property
    def part(self) -> str | None:
        """The name that it has meanwhile."""
        return self._part

    def keep(self) -> None:
        """Make it durable under its name. EngineError, ApiError: it has none."""
        try:
            os.fsync(self.fd)
            if self._part is None:
                # With a directory it is linkat, which alone follows that link.
                os.link(f"/proc/self/fd/{self.fd}", self.path, src_dir_fd=self.fd)
            else:
                self._give_name(self._part, self.path)
                if self._give_name is _rename:
                    self._part = None  # who has that name now is another
            self._flush_name()
        except FileExistsError as error:
            raise _exists(self.path) from error
        except OSError as error:
            raise from_os_error(error, self.path, "create") from error

    def _flush_name(self) -> None:
        try:
            overlay.flush_folder(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                    os.unlink(self.path)
            raise

    def close(self) -> None:
        """Let go of it; what was not kept is gone."""
        if self._part is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._part)
        os.close(self.fd)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> int:
        folder = os.path.dirname(self.path)
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in MISSING:
                raise
        part = self.path + PART
        _check_length(part)
        fd = _open_locked(part)
        try:
            self._give_name = _way_of(part)
        except BaseException:
            os.unlink(part)
            os.close(fd)
            raise
        self._part = part
        return fd


def remove_part(path: str) -> bool:
    """Remove what a dead process left; False where somebody writes it, or it is no such file."""
    try:
        fd = _open_locked(path)
    except (ApiError, OSError):
        return False
    os.unlink(path)
    os.close(fd)
    return True


def check_new_name(path: str) -> None:
    """ApiError unless a file may be made at the absolute `path`."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise ApiError("invalid_request", f"there is no directory {folder}")
    if path.endswith(RESERVED):
        raise ApiError(
            "invalid_request",
            f"{path} is a name that backups give to images",
            hint=f"name a file that does not end in {' or '.join(RESERVED)}",
        )
    _check_length(path)
    if os.path.lexists(path):
        raise _exists(path)


def _check_length(path: str) -> None:
    excess = len(os.fsencode(os.path.basename(path))) - NAME_MAX
    if excess > 0:
        raise ApiError(
            "invalid_request",
            f"the name of {path} is too long",
            hint=f"choose one that is shorter by {excess} bytes",
        )


def _exists(path: str) -> ApiError:
    return ApiError(
        "invalid_request", f"{path} exists already", hint="name a file that does not exist"
    )


def _open_locked(part: str) -> int:
    """Make the file, or take over what a dead process left."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(part, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _exists(part)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        if not os.path.samestat(os.fstat(fd), os.stat(part)):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(fd)
        raise ApiError(
            "device_busy",
            f"{part} is being written",
            hint="name another file, or wait for the end of the other backup",
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _way_of(part: str) -> Callable[[str, str], None]:
    """How a file gets another name here without replacing one: tried with `part`."""
    trial = f"{part}~"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(trial)
    for way in (_rename, os.link):
        try:
            way(part, trial)
        except OSError as error:
            if error.errno not in (*MISSING, errno.EPERM):
                raise
            continue
        if way is os.link:
            os.unlink(trial)
        else:
            os.rename(trial, part)
        return way
    raise ApiError(
        "invalid_request",
        f"the file system of {os.path.dirname(part)} cannot rename without replacing",
        hint="make the file on another one, such as ext4 or xfs, and copy it from there",
    )


def _rename(old: str, new: str) -> None:
    """Rename a file, but replace none: FileExistsError."""
    done = _libc.renameat2(
        ctypes.c_int(AT_FDCWD), ctypes.c_char_p(os.fsencode(old)),
        ctypes.c_int(AT_FDCWD), ctypes.c_char_p(os.fsencode(new)),
        ctypes.c_uint(RENAME_NOREPLACE),
    )  # fmt: skip
    if done:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)
