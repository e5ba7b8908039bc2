# SPDX-License-Identifier: Apache-2.0
"""The room of the store that an image's data are in: a file system, or a block device.

Data may lie in a data file of their own, or with an NBD server, which is asked nothing: what is
not known has no series, since a false one would calm or alarm. A block device belongs to the image
alone, so what the engine uses of it is what is taken.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fvdd.metrics.exposition import Exposition

SECTOR = 512
# Storage that answers does so in milliseconds; a scraper waits for some seconds.
LIMIT_SECONDS = 1.0


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


Found = tuple[Store, Room]


def file_id(status: os.stat_result) -> tuple[int, int]:
    """Which file it is; a block device by its number, since its node may be made anew."""
    if stat.S_ISBLK(status.st_mode):
        return (0, status.st_rdev)
    return (status.st_dev, status.st_ino)


def room_of(store: Store) -> Room | None:
    """The room of a store; None where it is no file any more."""
    if not store.path:
        return None
    try:
        status = os.stat(store.path)
        if store.file_id is not None and file_id(status) != store.file_id:
            return None
        if stat.S_ISBLK(status.st_mode):
            return _device_room(store, device_size(status.st_rdev))
        system = os.statvfs(store.path)
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


class Looker:
    """Looks at stores, each on a thread of its own: one that does not answer holds up nobody else,
    and is not asked again before it has answered."""

    def __init__(self) -> None:
        self._asked: dict[Store, threading.Thread] = {}

    def rooms(self, stores: Sequence[Store], limit: float = LIMIT_SECONDS) -> list[Found]:
        """What is known of them after `limit` seconds at most; from one thread at a time."""
        deadline = time.monotonic() + limit
        found: dict[Store, Room | None] = {}
        late = {store: thread for store, thread in self._asked.items() if thread.is_alive()}
        paths = {"", *(store.path for store in late)}
        asked = {
            store: threading.Thread(target=functools.partial(_look, store, found), daemon=True)
            for store in stores if store.path not in paths
        }  # fmt: skip
        for thread in asked.values():
            thread.start()
        for thread in asked.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._asked = late | asked
        return [(store, room) for store in stores if (room := found.get(store)) is not None]


def _look(store: Store, found: dict[Store, Room | None]) -> None:
    found[store] = room_of(store)


def write_stores(out: Exposition, rooms: Sequence[Found]) -> None:
    """Size and free space of each store, and what the image takes of it."""
    for at, (name, text) in enumerate(_FAMILIES):
        out.family(name, "gauge", text)
        for store, room in rooms:
            if (value := room[at]) is not None:
                out.sample(name, (("device", store.device),), value)
