# SPDX-License-Identifier: Apache-2.0
"""The nodes of a disk's partitions: taken away before the disk goes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import struct
from typing import Final

from fvdd.attach import holders

_BLKPG: Final = 0x1269
_BLKPG_DEL_PARTITION: Final = 2


def remove(kernel_name: str, fd: int) -> None:
    """Take the partition nodes away: they would stay behind until the index is used again."""
    for name in holders.partitions(kernel_name):
        number = int(name.rsplit("p", 1)[1])
        part = struct.pack("=qqi64s64s4x", 0, 0, number, b"", b"")
        with contextlib.suppress(OSError):
            _blkpg(fd, part)


def _blkpg(fd: int, part: bytes) -> None:
    """ioctl(BLKPG): its argument holds a pointer, so the buffer must stay put meanwhile."""
    data = ctypes.create_string_buffer(part, len(part))
    argument = struct.pack("iiixxxxP", _BLKPG_DEL_PARTITION, 0, len(part), ctypes.addressof(data))
    fcntl.ioctl(fd, _BLKPG, argument)
