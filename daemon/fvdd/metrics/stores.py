# SPDX-License-Identifier: Apache-2.0
"""The room of the store that an image's data are in: a file system, or a block device.

Data may lie in a data file of their own, or with an NBD server, which is asked nothing: what is
not known has no series, since a false one would calm or alarm. A block device belongs to the image
alone, so what the engine uses of it is what is taken.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fvdd.metrics.exposition import Exposition

SECTOR = 512


class Store(NamedTuple):
    """Where the data of a device lie."""

    device: str
    # The file or block device; "" where a server has the data, or where nobody knows.
    path: str
    # Which file that is: a path may mean another one by now.
    file_id: tuple[int, int] | None
    # Somebody makes the block device longer when it is full, from what nobody here sees.
    grows: bool
    # Bytes of a block device that the engine uses; None: not known.
    used: int | None


class Room(NamedTuple):
    """Bytes; None: nobody knows."""

    size: int | None
    available: int | None
    taken: int | None


def file_id(status: os.stat_result) -> tuple[int, int]:
    """Which file it is; a block device by its number, since its node may be made anew."""
    if stat.S_ISBLK(status.st_mode):
        return (0, status.st_rdev)
    return (status.st_dev, status.st_ino)


def room_of(store: Store, systems: dict[int, os.statvfs_result] | None = None) -> Room | None:
    """The room of a store; None where it is no file any more. `systems`: by device number, the
    file systems that were looked at already."""
    if not store.path:
        return None
    try:
        status = os.stat(store.path)
        if store.file_id is not None and file_id(status) != store.file_id:
            return None
        if stat.S_ISBLK(status.st_mode):
            return _device_room(store, device_size(status.st_rdev))
        known = systems if systems is not None else {}
        if status.st_dev not in known:
            known[status.st_dev] = os.statvfs(store.path)
        system = known[status.st_dev]
    except (OSError, ValueError):
        return None
    unit = system.f_frsize
    return Room(system.f_blocks * unit, system.f_bavail * unit, status.st_blocks * SECTOR)


def _device_room(store: Store, size: int) -> Room:
    free = max(0, size - store.used) if store.used is not None and not store.grows else None
    return Room(size, free, store.used)


def device_size(number: int) -> int:
    """Bytes of the block device of that number, without opening it; OSError, ValueError."""
    name = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size"
    return int(Path(name).read_text(encoding="ascii")) * SECTOR


_FAMILIES = (
    ("fvd_backing_store_size_bytes", "Size of the file system or block device with the data."),
    ("fvd_backing_store_avail_bytes", "What is free of it."),
    ("fvd_image_allocated_bytes", "What the data take of it."),
)


def write_stores(out: Exposition, stores: Sequence[Store]) -> None:
    """Size and free space of each store, and what the image takes of it."""
    systems: dict[int, os.statvfs_result] = {}
    rooms = [(store, room) for store in stores if (room := room_of(store, systems)) is not None]
    for at, (name, text) in enumerate(_FAMILIES):
        out.family(name, "gauge", text)
        for store, room in rooms:
            if (value := room[at]) is not None:
                out.sample(name, (("device", store.device),), value)
