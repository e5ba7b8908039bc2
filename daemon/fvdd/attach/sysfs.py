# SPDX-License-Identifier: Apache-2.0
"""Small files of /sys and /proc. That one is not there is an answer; that it could not be read, for
want of descriptors or memory, is none: a device that is in use would be taken for one that is not.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Final

NOT_THERE: Final = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESRCH)
# What this process or the host lacks, whatever was looked at.
LACKING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def raise_if_lacking(error: OSError) -> None:
    """Let nobody take for an answer that there was nothing left to look with."""
    if error.errno in LACKING:
        raise error


def read_text(path: str) -> str:
    """What the file holds; "" where it is not there. OSError: that cannot be told."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError as error:
        if error.errno in NOT_THERE:
            return ""
        raise


def read_int(path: str) -> int | None:
    text = read_text(path)
    return int(text) if text.isdigit() else None


def find_backend(
    backend: str, index: int | None = None, sys_block: str = "/sys/block"
) -> int | None:
    """N of the device that has this backend identifier; looked for at `index` first."""
    names = [] if index is None else [f"nbd{index}"]
    try:
        names += [name for name in os.listdir(sys_block) if re.fullmatch(r"nbd[0-9]+", name)]
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
    for name in names:
        if read_text(f"{sys_block}/{name}/backend") == backend:
            return int(name.removeprefix("nbd"))
    return None


def owner_of(index: int) -> str:
    """Who has nbd `index`, as part of a sentence; "" where that cannot be told."""
    try:
        backend = read_text(f"/sys/block/nbd{index}/backend")
        if backend:
            return f" by '{backend}'"
        pid = read_int(f"/sys/block/nbd{index}/pid")
        if pid is None:
            return ""
        name = read_text(f"/proc/{pid}/comm")
    except OSError:
        return ""
    return f" by process {pid} ({name})" if name else f" by process {pid}, which is gone"
