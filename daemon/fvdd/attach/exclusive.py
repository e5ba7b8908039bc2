# SPDX-License-Identifier: Apache-2.0
"""Hold a disk so that nobody can mount it, or learn who is in the way."""

from __future__ import annotations

import errno
import os

from fvdd.attach import holders, nodes
from fvdd.attach.attachment import AttachError, Holder


def hold(name: str, sys_block: str = "/sys/block") -> tuple[int, list[Holder]]:
    """A descriptor that holds the disk `name`, or -1 and those who prevent it. Nobody and -1: the
    kernel has no such disk. AttachError: neither can be told, so it must be taken for used."""
    try:
        return _hold(name, sys_block)
    except OSError as error:
        raise AttachError(
            "device_held",
            f"whether somebody uses /dev/{name} cannot be found out ({error.strerror})",
            "remove the cause, then try again",
        ) from error


def _hold(name: str, sys_block: str) -> tuple[int, list[Holder]]:
    disk = holders.read_disk(name, sys_block)
    number = disk.numbers.get(name)
    if number is None:
        return -1, []
    fd, failure = -1, None
    try:
        fd = nodes.open_node(name, number, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        failure = error
    try:
        found = holders.find_holders(disk, own_pid=os.getpid(), sys_block=sys_block)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    if failure is not None and not found:
        if failure.errno != errno.EBUSY:
            raise failure
        found = [Holder("the kernel holds it for somebody it does not name")]
    if found and fd >= 0:
        os.close(fd)
        fd = -1
    return fd, found
