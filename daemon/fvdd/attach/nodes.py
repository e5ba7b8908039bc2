# SPDX-License-Identifier: Apache-2.0
"""Open a block device by its number, whatever its usual node is by now: renamed, gone, another's.

Where the node in /dev is not the device's, one is made for the moment, in /dev as well: /run and
/tmp are mostly on file systems that have no devices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from typing import Final

FOLDER: Final = "/dev"


def number_of(path: str) -> tuple[int, int] | None:
    """The device's number that a node has; None: there is no such node of a block device."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _block_number(status)


def open_node(name: str, number: tuple[int, int], flags: int, folder: str = FOLDER) -> int:
    """A descriptor of the device `number`, whose usual node is called `name`; OSError."""
    usual = os.path.join(folder, name)
    if number_of(usual) == number:
        with contextlib.suppress(FileNotFoundError):
            return _open_checked(usual, number, flags)
    own = os.path.join(folder, f".fvdd-{os.getpid()}-{secrets.token_hex(8)}")
    os.mknod(own, stat.S_IFBLK | 0o600, os.makedev(*number))
    try:
        return _open_checked(own, number, flags)
    finally:
        os.unlink(own)


def _open_checked(path: str, number: tuple[int, int], flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    if _block_number(os.fstat(fd)) != number:  # exchanged since it was looked at
        os.close(fd)
        raise OSError(errno.EAGAIN, "its node was exchanged just now")
    return fd


def _block_number(status: os.stat_result) -> tuple[int, int] | None:
    if not stat.S_ISBLK(status.st_mode):
        return None
    return os.major(status.st_rdev), os.minor(status.st_rdev)
