# SPDX-License-Identifier: Apache-2.0
"""Do something while no request of a device is under way, in the worker that serves it.

    the worker stops between two messages, answers what it received, gives its sockets away
    what is to be done
    the same worker goes on with the sockets

The kernel sees answers that are late. Whatever fails leaves closed sockets at worst: that is a
crash, and recovery deals with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fvdd.devices.handing_over import handed_over, is_refusal
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session

_T = TypeVar("_T")


async def standing(
    session: Session, recovery: Recovery, action: Callable[[], Awaitable[_T]]
) -> tuple[_T, float]:
    """What `action` gives, and the seconds of the pause; raises SESSION_FAULTS: requests that do
    not end, or what `action` raises."""
    await recovery.stop()
    begin = asyncio.get_running_loop().time()
    try:
        done = await _standing(session, recovery, action)
    finally:
        recovery.start()
    session.counters.last_pause_seconds = asyncio.get_running_loop().time() - begin
    return done, session.counters.last_pause_seconds


async def _standing(
    session: Session, recovery: Recovery, action: Callable[[], Awaitable[_T]]
) -> _T:
    worker = session.worker().worker
    try:
        async with handed_over(session, worker) as parted:
            try:
                return await action()
            finally:
                await parted.resume(worker)
    except SESSION_FAULTS as error:
        if not session.connections and not is_refusal(error):
            await recovery.recover("its connections were lost")
        raise
