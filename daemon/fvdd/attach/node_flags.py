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
from typing import Final

from fvdd.attach import nodes, sysfs
from fvdd.attach.holders import read_disk

BLKROSET: Final = 0x125D


def set_read_only(name: str, wanted: bool, sys_block: str = "/sys/block") -> None:
    """Set the flag of the disk called `name` in /sys/block and of its partitions; OSError."""
    for node, number in read_disk(name, sys_block).numbers.items():
        fd = nodes.open_node(node, number, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, BLKROSET, struct.pack("i", wanted))
        finally:
            os.close(fd)
    if not wanted and sysfs.read_text(f"{sys_block}/{name}/ro") == "1":
        raise OSError(errno.EROFS, "it was attached read-only")
