# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel lets anybody write to a block device: the flag of `blockdev --setro`.

It belongs to each node apart, so a disk's partitions get it as well. What the driver was told at
connect (a device that was attached read-only) it cannot take back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

BLKROSET: Final = 0x125D
BLKROGET: Final = 0x125E


def set_read_only(name: str, wanted: bool, sys_block: str = "/sys/block") -> None:
    """Set the flag of the disk called `name` in /sys/block and of its partitions; OSError."""
    parts = sorted(path.name for path in Path(sys_block, name).glob(f"{name}p*"))
    for node in (name, *parts):
        fd = os.open(f"/dev/{node}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, BLKROSET, struct.pack("i", wanted))
        finally:
            os.close(fd)
    if not wanted and is_read_only(f"/dev/{name}"):
        raise OSError(errno.EROFS, "it was attached read-only")


def is_read_only(node: str) -> bool:
    """What the kernel says of a node."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        answer: bytes = fcntl.ioctl(fd, BLKROGET, struct.pack("i", 0))
    finally:
        os.close(fd)
    return any(answer)
