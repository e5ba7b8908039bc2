# SPDX-License-Identifier: Apache-2.0
"""The nodes of a disk's partitions: taken away before the disk goes, and back if it stays."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from typing import Final

from fvdd.attach import holders
from fvdd.attach.sizes import SCAN_LIMIT_SECONDS
from fvdd.attach.threads import run_blocking

BLKRRPART: Final = 0x125F
_BLKPG: Final = 0x1269
_BLKPG_DEL_PARTITION: Final = 2


def remove(kernel_name: str, fd: int) -> None:
    """Take the partition nodes away: they would stay behind until the index is used again."""
    for name in holders.partitions(kernel_name):
        number = int(name.rsplit("p", 1)[1])
        part = struct.pack("=qqi64s64s4x", 0, 0, number, b"", b"")
        with contextlib.suppress(OSError):
            _blkpg(fd, part)


async def bring_back(kernel_name: str) -> None:
    """Let the kernel look for partitions whose nodes were taken away; not for long, since it reads
    the disk for that."""

    def scan() -> None:
        fd = os.open(f"/dev/{kernel_name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, BLKRRPART)
        finally:
            os.close(fd)

    with contextlib.suppress(OSError, TimeoutError):
        await run_blocking(scan, timeout=SCAN_LIMIT_SECONDS)


def _blkpg(fd: int, part: bytes) -> None:
    """ioctl(BLKPG): its argument holds a pointer, so the buffer must stay put meanwhile."""
    data = ctypes.create_string_buffer(part, len(part))
    argument = struct.pack("iiixxxxP", _BLKPG_DEL_PARTITION, 0, len(part), ctypes.addressof(data))
    fcntl.ioctl(fd, _BLKPG, argument)
