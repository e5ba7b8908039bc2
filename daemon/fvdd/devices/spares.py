# SPDX-License-Identifier: Apache-2.0
"""One warm worker for the whole host: a successor that has done the slow part of its start already.

Most of what a device is silent for after its worker's death is the start of a Python process. So
while there are devices one worker waits, everything imported, for the order whose it is to be; who
needs a worker (a recovery, an upgrade, an attach) takes it, also while it still starts, and another
is started a moment later, when the machine is less busy. It costs some 20 MiB of memory for the
host, not for a device.

A spare is of the installed version, or it is not used: it is dropped when any file of the programs
has changed since it was started. It dies with fvdd, whose channel it holds. Under systemd it is
started in the scope that it goes on in, as any worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fvdapi.errors import ApiError
from fvdd.devices import supervise
from fvdd.devices.supervise import WORKER_FAULTS, Spawn, Worker
from fvdd.log import fields

log = logging.getLogger("fvdd.devices")

# The longest name of a device fits into its place; no device has a name that begins like this.
SPARE_PLACE: Final = "_spare".ljust(64, "_")
PERIOD_SECONDS: Final = 1.0
# After somebody took the spare: his device comes first.
SETTLE_SECONDS: Final = 0.1
# A spare that cannot be started is no hurry: workers start without one.
RETRY_SECONDS: Final = 60.0
WARM_LIMIT_SECONDS: Final = 60.0
# It does nothing else, so a spare that does not answer at once is of no use.
ASSIGN_LIMIT_SECONDS: Final = 2.0

Stamp = frozenset[tuple[str, int, int, int]]


@dataclass(slots=True)
class _Spare:
    starting: asyncio.Task[Worker]
    stamp: Stamp
    is_warm: bool = False


class Spares:
    """Starts workers, and keeps one in advance."""

    def __init__(
        self, launch: Spawn, devices: Path, stamp: Callable[[], Stamp] | None = None
    ) -> None:
        self._launch = launch
        self._spare_place = str(devices / SPARE_PLACE)
        self._stamp = stamp or installed_stamp
        self._spare: _Spare | None = None
        self._asked = asyncio.Event()

    @property
    def is_warm(self) -> bool:
        """Whether a spare waits."""
        return self._spare is not None and self._spare.is_warm

    async def spawn(self, directory: str) -> Worker:
        """A worker for the device whose live state is in `directory`: the spare, or a new one."""
        spare, self._spare = self._spare, None
        self._asked.set()
        if spare is not None:
            worker = await self._take(spare, directory)
            if worker is not None:
                return worker
        return await self._launch(directory)

    async def _take(self, spare: _Spare, directory: str) -> Worker | None:
        """The spare as the worker of `directory`, or None, and it is gone. One that is not warm yet
        is still ahead of one that would be started now, and both would be in each other's way."""
        limit = ASSIGN_LIMIT_SECONDS if spare.is_warm else WARM_LIMIT_SECONDS
        try:
            worker = await asyncio.shield(spare.starting)
            if worker.is_running and spare.stamp == self._stamp():
                await worker.request("assign", directory=directory, timeout=limit)
                return worker
        except (ApiError, *WORKER_FAULTS) as error:
            log.warning("the spare worker is of no use: %s", error)
        except BaseException:
            await asyncio.shield(_end(spare))
            raise
        await _end(spare)
        return None

    async def keep(self, is_wanted: Callable[[], bool]) -> None:
        """Have a spare while it is wanted, until cancelled; then there is none."""
        try:
            while True:
                pause = PERIOD_SECONDS
                if self._spare is not None and not (is_wanted() and self._is_good(self._spare)):
                    await self._drop()
                if self._spare is None and is_wanted() and not await self._warm():
                    pause = RETRY_SECONDS
                await self._pause(pause)
        finally:
            await asyncio.shield(self._drop())

    async def _pause(self, seconds: float) -> None:
        """Wait, but not longer than a moment after a worker was asked for."""
        if seconds == RETRY_SECONDS:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        if self._asked.is_set():
            self._asked.clear()
            await asyncio.sleep(SETTLE_SECONDS)

    def _is_good(self, spare: _Spare) -> bool:
        return spare.starting.result().is_running and spare.stamp == self._stamp()

    async def _warm(self) -> bool:
        """Start a spare; False when that is not possible."""
        # Looked at first: what is replaced meanwhile makes the spare a stale one.
        stamp = self._stamp()
        starting = asyncio.create_task(supervise.start_worker(self._launch, self._spare_place))
        spare = self._spare = _Spare(starting, stamp)
        try:
            worker = await asyncio.shield(starting)
            await worker.request("prepare", timeout=WARM_LIMIT_SECONDS)
        except (ApiError, *WORKER_FAULTS) as error:
            if self._spare is not spare:  # whoever has taken it deals with that
                return True
            log.warning("no spare worker: %s", error)
            await self._drop()
            return False
        spare.is_warm = True
        log.debug("a spare worker waits", extra=fields(pid=worker.pid))
        return True

    async def _drop(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await _end(spare)


async def _end(spare: _Spare) -> None:
    try:
        worker = await asyncio.shield(spare.starting)
    except (ApiError, *WORKER_FAULTS):
        return  # it never came to be
    await supervise.make_gone(worker)


def installed_stamp() -> Stamp:
    """What the installed programs are made of: their files, with inode, size and time of change."""
    found = {_mark(os.path.realpath(sys.executable))}
    for folder in _package_folders():
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            found.update(
                _mark(f"{place}/{name}") for name in names if name.endswith((".py", ".so"))
            )
    return frozenset(found)


def _package_folders() -> list[str]:
    """Where the worker's packages are, without importing the engine."""
    import importlib.util

    folders: list[str] = []
    for name in ("fvdd", "fvdengine", "fvdcore"):
        spec = importlib.util.find_spec(name)
        folders.extend(spec.submodule_search_locations or () if spec is not None else ())
    return folders


def _mark(path: str) -> tuple[str, int, int, int]:
    try:
        status = os.stat(path)
    except OSError:  # replaced at this very moment: differs from any other mark
        return path, -1, -1, -1
    return path, status.st_ino, status.st_size, status.st_mtime_ns
