# SPDX-License-Identifier: Apache-2.0
"""Loop devices over a disk: they take no exclusive claim, and no process has their descriptor.

The kernel tells a loop device's backing file by name and by numbers. Names lie: a node can be
renamed, and be in another's /dev. To tell the numbers the kernel looks at the file, which may hang
on a network file system; where the name says that it is on one, it is not asked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import Final

from fvdd.attach import nodes, sysfs

LOOP_GET_STATUS64: Final = 0x4C05
# struct loop_info64: lo_device and lo_inode, then lo_rdevice.
_INFO: Final = struct.Struct("=16xQ208x")


def over(
    numbers: dict[str, tuple[int, int]],
    may_hang: Callable[[str], bool],
    sys_block: str = "/sys/block",
) -> Iterator[tuple[str, str]]:
    """The loop devices whose backing device has one of the `numbers`: its name, the loop's name."""
    for loop in _names(sys_block):
        if not re.fullmatch(r"loop[0-9]+", loop):
            continue
        path = sysfs.read_text(f"{sys_block}/{loop}/loop/backing_file")
        if not path:
            continue
        named = path.removesuffix(" (deleted)").rpartition("/")[2]
        if named not in numbers and may_hang(path):
            continue
        number = _backing_number(loop, sysfs.read_text(f"{sys_block}/{loop}/dev"))
        if number is None:
            # It could not be asked: its word is taken for a name that is one of the disk's.
            if named in numbers:
                yield named, loop
            continue
        for name, own in numbers.items():
            if own == number:
                yield name, loop


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _backing_number(loop: str, number: str) -> tuple[int, int] | None:
    """The number of the device below a loop device, (0, 0) for a file; None: it was not told."""
    major, _, minor = number.partition(":")
    try:
        fd = nodes.open_node(loop, (int(major), int(minor)), os.O_RDONLY | os.O_NONBLOCK)
        try:
            answer = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(_INFO.size))
        finally:
            os.close(fd)
    except ValueError:
        return None
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return (0, 0) if error.errno == errno.ENXIO else None  # ENXIO: let go of meanwhile
    (device,) = _INFO.unpack(answer)
    return os.major(device), os.minor(device)
