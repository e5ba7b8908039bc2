# SPDX-License-Identifier: Apache-2.0
"""What processes have mapped of a disk: a mapping outlives the descriptor that it was made from.

A look at a process's mappings waits where one of its threads hangs in a change of them, on storage
that has nothing to do with the disk. It is left out then, and that is logged.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
from collections.abc import Callable
from typing import Final

from fvdd.attach import sysfs

log = logging.getLogger("fvdd.attach")

READ_LIMIT_SECONDS: Final = 1.0
# Place, sharing, and the file: its file system's device, its inode, its name.
_LINE: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ...([ps]) \S+ (\S+ \d+ +/.*)$", re.MULTILINE)


def find(process: str, numbers: dict[str, tuple[int, int]], safe: set[str]) -> str | None:
    """Which of the devices `numbers` the process maps; `process` is its folder in /proc, `safe` are
    the devices of file systems where a look at a file waits for nobody."""
    names = {own: name for name, own in numbers.items()}
    done: set[tuple[bytes, bytes]] = set()  # some programs map a file many thousand times
    for start, end, sharing, file in _LINE.findall(_read(f"{process}/maps")):
        if (sharing, file) in done:
            continue
        device, _, raw = file.split(maxsplit=2)
        name = os.fsdecode(raw).removesuffix(" (deleted)").rpartition("/")[2]
        is_likely = sharing == b"s" or raw.startswith(b"/dev/")
        if name not in numbers and not (is_likely and _device(device) in safe):
            done.add((sharing, file))
            continue
        try:
            status = os.stat(f"{process}/map_files/{int(start, 16):x}-{int(end, 16):x}")
        except OSError as error:
            sysfs.raise_if_lacking(error)
            if name in numbers and error.errno in (errno.EPERM, errno.EACCES):
                return name  # its word is taken where nothing better can be had
            continue
        done.add((sharing, file))
        number = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if stat.S_ISBLK(status.st_mode) and number in names:
            return names[number]
    return None


def _device(text: bytes) -> str:
    """As mountinfo writes it: in decimals."""
    major, _, minor = text.partition(b":")
    return f"{int(major, 16)}:{int(minor, 16)}"


def _read(path: str) -> bytes:
    return _within(READ_LIMIT_SECONDS, path, lambda: _content(path))


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return b""  # ended, or not for us


def _within(limit: float, path: str, call: Callable[[], bytes]) -> bytes:
    done: list[bytes] = []
    failed: list[OSError] = []

    def body() -> None:
        try:
            done.append(call())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="fvdd-maps", daemon=True)
    thread.start()
    thread.join(limit)
    if failed:
        raise failed[0]
    if not done:
        log.warning("%s cannot be read in time, it is left out", path)
        return b""
    return done[0]
