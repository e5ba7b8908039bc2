# SPDX-License-Identifier: Apache-2.0
"""The background copies of all devices: what each may take of the host's budget, and rates.

The budget is shared evenly by the devices whose copy runs. A device that begins between two looks
has all of it until the next one, which comes soon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from fvdapi.errors import ApiError
from fvdapi.models import DeviceStatus, PrefetchRequest, PrefetchState
from fvdd.log import fields

SHARE_PERIOD_SECONDS: Final = 2.0
RATE_UNLIMITED_KB: Final = 1_000_000_000
_KB: Final = 1024

_log = logging.getLogger(__name__)


class Copying(Protocol):
    """What sharing needs of a device."""

    @property
    def name(self) -> str: ...
    async def status(self) -> DeviceStatus: ...
    async def set_budget(self, rate: int) -> None: ...


def rate_fields(request: PrefetchRequest) -> dict[str, str]:
    """The fields of the header that a request for rates sets: these count in KiB a second."""
    found: dict[str, str] = {}
    if request.min_bytes_per_second is not None:
        least = -(-request.min_bytes_per_second // _KB)
        found |= {f"prefetch_min_{way}_throughput": str(least) for way in ("read", "write")}
    if request.max_bytes_per_second is not None:
        most = -(-request.max_bytes_per_second // _KB) or RATE_UNLIMITED_KB
        found |= {f"prefetch_max_{way}_throughput": str(most) for way in ("read", "write")}
    return found


class BudgetSharing:
    """Tells each device its part whenever that has changed."""

    def __init__(self, budget: int, devices: Callable[[], Sequence[Copying]]) -> None:
        self._budget = budget
        self._devices = devices
        # By name: what was told to which worker, since a successor begins with all of it.
        self._told: dict[str, tuple[int | None, int]] = {}

    async def run(self) -> None:
        """Share for ever; at once over, where there is no budget."""
        while self._budget:
            try:
                await self.share()
            except Exception:  # a defect here must not leave the others without their parts
                _log.exception("the budget of prefetch was not shared")
            await asyncio.sleep(SHARE_PERIOD_SECONDS)

    async def share(self) -> None:
        """Look at all devices, and tell those whose part is another one now."""
        devices = self._devices()
        statuses = await asyncio.gather(*(device.status() for device in devices))
        running = [
            status.prefetch.state is PrefetchState.RUNNING
            or status.prefetch.paused_reason == "base"
            for status in statuses
        ]
        part = max(self._budget // max(sum(running), 1), 1)
        self._told = {
            status.name: self._told[status.name]
            for status in statuses if status.name in self._told
        }  # fmt: skip
        for device, status, runs in zip(devices, statuses, running, strict=True):
            told = (status.worker_pid, part)
            if not runs or self._told.get(status.name) == told:
                continue
            try:
                await device.set_budget(part)
            except ApiError as error:
                values = fields(name=status.name, reason=error)
                _log.warning("the budget of prefetch was not told", extra=values)
            else:
                self._told[status.name] = told
