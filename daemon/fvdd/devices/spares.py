# SPDX-License-Identifier: Apache-2.0
"""One warm worker for the whole host: a successor that has done the slow part of its start already.

Most of what a device is silent for after its worker's death is the start of a Python process. So
while there are devices one worker waits, everything imported, for the order whose it is to be; who
needs a worker (a recovery, an upgrade, an attach) takes it, and another is started a moment later,
when the machine is less busy. It costs some 20 MiB of memory for the host, not for a device.

A spare is of the installed version, or it is not used: it is dropped when any file of the programs
has changed since it was started. It dies with fvdd, whose channel it holds. Under systemd it is
started in the scope that it goes on in, as any worker.
"""

from __future__ import annotations

import asyncio
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
# A spare that cannot be started is no hurry: workers start without one.
RETRY_SECONDS: Final = 60.0
WARM_LIMIT_SECONDS: Final = 60.0
# It does nothing else, so a spare that does not answer at once is of no use.
ASSIGN_LIMIT_SECONDS: Final = 2.0

Stamp = frozenset[tuple[str, int, int, int]]


@dataclass(frozen=True, slots=True)
class _Spare:
    worker: Worker
    stamp: Stamp


class Spares:
    """Starts workers, and keeps one in advance."""

    def __init__(
        self, launch: Spawn, devices: Path, stamp: Callable[[], Stamp] | None = None
    ) -> None:
        self._launch = launch
        self._spare_place = str(devices / SPARE_PLACE)
        self._stamp = stamp or installed_stamp
        self._spare: _Spare | None = None

    @property
    def is_warm(self) -> bool:
        """Whether a spare waits."""
        return self._spare is not None

    async def spawn(self, directory: str) -> Worker:
        """A worker for the device whose live state is in `directory`: the spare, or a new one."""
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.worker.is_running and spare.stamp == self._stamp():
                try:
                    await spare.worker.request(
                        "assign", directory=directory, timeout=ASSIGN_LIMIT_SECONDS
                    )
                    return spare.worker
                except WORKER_FAULTS as error:
                    log.warning("the spare worker is of no use: %s", error)
            await supervise.make_gone(spare.worker)
        return await self._launch(directory)

    async def keep(self, is_wanted: Callable[[], bool]) -> None:
        """Have a spare while it is wanted, until cancelled; then there is none."""
        try:
            while True:
                pause = PERIOD_SECONDS
                if self._spare is not None and not (is_wanted() and self._is_good(self._spare)):
                    await self._drop()
                if self._spare is None and is_wanted():
                    try:
                        self._spare = await self._warm()
                    except (ApiError, *WORKER_FAULTS) as error:
                        log.warning("no spare worker: %s", error)
                        pause = RETRY_SECONDS
                await asyncio.sleep(pause)
        finally:
            await asyncio.shield(self._drop())

    def _is_good(self, spare: _Spare) -> bool:
        return spare.worker.is_running and spare.stamp == self._stamp()

    async def _warm(self) -> _Spare:
        # Looked at first: what is replaced meanwhile makes the spare a stale one.
        stamp = self._stamp()
        worker = await supervise.start_worker(self._launch, self._spare_place)
        try:
            await worker.request("prepare", timeout=WARM_LIMIT_SECONDS)
        except BaseException:
            await asyncio.shield(supervise.make_gone(worker))
            raise
        log.debug("a spare worker waits", extra=fields(pid=worker.pid))
        return _Spare(worker, stamp)

    async def _drop(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await supervise.make_gone(spare.worker)


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
