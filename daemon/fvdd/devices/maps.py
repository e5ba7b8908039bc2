# SPDX-License-Identifier: Apache-2.0
"""Maps of a device's disk, which anybody who reaches the metrics address may ask for.

A worker answers few requests at once, and what changes the device needs them. So it is asked for
one map at a time. Who asks for a map that others wait for already shares theirs, and of those who
may only look but few wait for different ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fvdapi.errors import ApiError

# Of different maps that are asked for at the metrics address and have not begun.
OBSERVED_MAX: Final = 4

Map = dict[str, Any]


class Maps:
    """Those of one device."""

    def __init__(self, ask: Callable[[int], Awaitable[Map]]) -> None:
        self._ask = ask
        self._one = asyncio.Lock()
        self._waiting: dict[int, asyncio.Task[Map]] = {}

    async def map(self, cells: int, *, is_observed: bool = False) -> Map:
        """Ask, or share what is asked soon; ApiError where too many wait."""
        task = self._waiting.get(cells)
        if task is None:
            if is_observed and len(self._waiting) >= OBSERVED_MAX:
                raise ApiError(
                    "map_busy", "too many maps of the device are waited for", hint="try again"
                )
            task = self._waiting[cells] = asyncio.create_task(self._next(cells))
            # Who asked may have gone.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _next(self, cells: int) -> Map:
        async with self._one:
            # From now on it is too old for others.
            del self._waiting[cells]
            return await self._ask(cells)
