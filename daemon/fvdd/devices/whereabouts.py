# SPDX-License-Identifier: Apache-2.0
"""Which file an image is, and what that is called now: looked at beside fvdd's loop.

The storage of an image may hang (a suspended device, a network file system whose server is gone):
whoever looks at it then waits in the kernel. That must hold up nobody but the one who wants to
know, so every look of fvdd's at the storage of an image is a `look`, which has a time limit.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from fvdapi.errors import ApiError
from fvdd.attach.threads import run_blocking
from fvdd.devices.record import DeviceRecord

# Storage that answers does so in milliseconds; an idle disk may have to begin to turn.
LOOK_LIMIT_SECONDS: Final = 5.0

_T = TypeVar("_T")


async def look(
    path: str,
    call: Callable[[], _T],
    *,
    limit: float | None = None,
    discard: Callable[[_T], object] | None = None,
) -> _T:
    """What `call` finds at `path`; ApiError when the storage does not answer within `limit`
    seconds. What it finds later is given to `discard`."""
    try:
        timeout = LOOK_LIMIT_SECONDS if limit is None else limit
        return await run_blocking(call, timeout=timeout, discard=discard)
    except TimeoutError as error:
        raise hangs(path) from error


def hangs(path: str) -> ApiError:
    """That the storage of a file does not answer."""
    return ApiError(
        "storage_hangs",
        f"the storage of {path} does not answer",
        hint="see what holds it up (dmesg may say), or wait until it answers",
    )


def file_id(path: str) -> tuple[int, int] | None:
    """Which file a path means now; None when it means none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return id_of(status)


def id_of(status: os.stat_result) -> tuple[int, int]:
    """Which file it is. A block device is known by its number: its node may be made anew."""
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def hold(path: str, wanted: tuple[int, int]) -> int:
    """A descriptor that leads to the file `wanted` without its name `path`; -1 where that is not
    its name."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    if id_of(os.fstat(fd)) == wanted:
        return fd
    os.close(fd)
    return -1


def let_go(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


async def has_name(record: DeviceRecord) -> bool:
    """Whether the device's file still has its name (a path by way of a descriptor is none)."""
    path = record.request.image

    def is_there() -> bool:
        try:
            return os.stat(path).st_nlink > 0 and file_id(path) == record.image_id
        except OSError:
            return False

    return await look(path, is_there)


async def check_name(record: DeviceRecord, found: tuple[int, int] | None = None) -> None:
    """ApiError where the image's name means another file by now, or none, or led to another one:
    `found`."""
    if not await has_name(record) or found not in (None, record.image_id):
        raise ApiError(
            "device_state",
            f"the image of {record.name} was renamed meanwhile, "
            f"{record.request.image} is not it any more",
            hint="the device goes on with its own file; try again",
        )


def name_of(
    wanted: tuple[int, int], path: str, ours: Sequence[int], pids: Sequence[int]
) -> str | None:
    """What the file `wanted`, which was `path`, is called now: found by way of our descriptors
    `ours` or those of `pids`. None where nothing leads to it."""
    if file_id(path) == wanted:
        return path
    places = [f"/proc/{os.getpid()}/fd/{fd}" for fd in ours]
    for pid in pids:
        try:
            places.extend(f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
    for place in places:
        try:
            found = os.readlink(place)
        except OSError:
            continue
        if file_id(place) != wanted:
            continue
        # A file that was deleted has no name any more, but the descriptor still leads to it.
        return found if file_id(found) == wanted else place
    return None
