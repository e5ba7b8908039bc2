# SPDX-License-Identifier: Apache-2.0
"""This process's command line as others see it in /proc: read by systemd at shutdown, by fvdd when
it looks for the worker of a directory, and by people.

It is changed in place, in the memory that the kernel shows; nothing in this process reads it again.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

_log = logging.getLogger(__name__)


def mark_for_shutdown() -> None:
    """Ask systemd to spare this process when it ends all others at shutdown: a file system on the
    device may still have to be written back. The sign is a "@" at the beginning of the command
    line; it is put over the first character, since Python needs its own name to start."""
    try:
        start = _start()
        if ctypes.string_at(start, 1) == b"/":
            ctypes.memset(start, ord("@"), 1)
    except (OSError, ValueError, IndexError):
        _log.warning("the process is not marked for shutdown")


def replace_word(old: bytes, new: bytes) -> bool:
    """Put the word `new`, which may not be longer, in the place of `old`; whether that was done."""
    try:
        start = _start()
        place = Path("/proc/self/cmdline").read_bytes().find(b"\0" + old + b"\0")
    except (OSError, ValueError, IndexError):
        return False
    if place < 0 or not old or len(new) > len(old):
        return False
    ctypes.memmove(start + place + 1, new.ljust(len(old), b"\0"), len(old))
    return True


def _start() -> int:
    """The address of the command line."""
    return int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[45])
