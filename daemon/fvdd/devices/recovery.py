# SPDX-License-Identifier: Apache-2.0
"""Keeping a device served: replace its worker when it dies or hangs, its connections when they die.

One task follows the worker's events and alone replaces workers; another asks the worker now and
then whether it is there. A worker that does not answer is killed, and so becomes a dead one: a
process that is stopped or stuck must never wake up beside its successor.

The order of a recovery: the old process is gone (its pidfd says so, and the image's writer lock
besides), the successor has the image and serves, then the kernel gets its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.attachment import AttachError
from fvdd.devices.session import SESSION_FAULTS, Session, gather_quietly, to_api_error
from fvdd.devices.supervise import Worker
from fvdd.log import fields
from fvdd.worker.client import WorkerError, WorkerLost
from fvdd.worker.failure import OPENED_SINCE
from fvdengine.errors import LiveStateDamaged

log = logging.getLogger("fvdd.devices")

RETRY_DELAYS: Final = (0.0, 0.1, 0.3, 1.0)
PING_PERIOD_SECONDS: Final = 5.0
# Later than a timer of ours ever is while this process runs.
LATE_SECONDS: Final = 1.0
STATUS_SECONDS: Final = 5.0
# A process whose channel has ended is nearly always gone; its requests wait meanwhile.
REAP_SECONDS: Final = 0.2

_SERVED: Final = (DeviceState.ATTACHED, DeviceState.RECOVERING)


class Recovery:
    """The watch over one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._watching: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._failed = 0
        self._hung: Worker | None = None
        # Told whenever a successor serves.
        self.on_recovered: Callable[[], None] = lambda: None

    @property
    def watching(self) -> asyncio.Task[None] | None:
        """The task that replaces workers; it ends when the device has failed."""
        return self._watching

    def start(self) -> None:
        """Begin to watch; the device is attached."""
        name = self._session.name
        self._watching = asyncio.create_task(self._watch(), name=f"watch {name}")
        self._pinging = asyncio.create_task(self._ping(), name=f"ping {name}")

    async def stop(self) -> None:
        """End the watch; harmless when repeated. A recovery under way is broken off."""
        tasks = [task for task in (self._pinging, self._watching) if task is not None]
        self._watching = self._pinging = None
        await gather_quietly(*tasks)

    async def _watch(self) -> None:
        session, life = self._session, self._session.life
        try:
            while life.state in _SERVED:
                if session.opened is None:  # a recovery was broken off
                    await self.recover("it has no worker")
                    continue
                event = await session.opened.worker.events.get()
                match event.get("event"):
                    case "channel_closed":
                        await self.recover(await self._end_of(session.opened.worker))
                    case "connection_closed":
                        await self._connection_closed(event.get("connection"))
                    case other:
                        if other == "failed":
                            session.note_failure(event)
                        _log_event(session.name, str(other), event)
        except Exception as error:  # a defect here must not leave the device unwatched in silence
            log.exception("watching failed", extra=fields(name=session.name))
            if life.state in _SERVED:
                life.move(DeviceState.FAILED, f"fvdd failed to watch the worker: {error}")

    async def _ping(self) -> None:
        """Kill a worker that does not answer: stopped, or stuck where no I/O error can free it."""
        session = self._session
        limit = session.config.limits.hang_timeout
        was_late = False
        while session.life.state in _SERVED:
            await asyncio.sleep(min(PING_PERIOD_SECONDS, limit))
            opened = session.opened
            if opened is not None and session.life.state is DeviceState.ATTACHED:
                asked = session.asked_at = time.monotonic()
                try:
                    await opened.worker.request("ping", timeout=limit)
                    was_late = False
                except TimeoutError:
                    # Was fvdd itself stopped, or its host, then the answer waits to be read.
                    is_late = time.monotonic() - asked > limit + LATE_SECONDS
                    if is_late and not was_late:
                        was_late = True
                        continue
                    log.error(
                        "the worker hangs and is killed",
                        extra=fields(name=session.name, pid=opened.worker.pid, seconds=limit),
                    )
                    self._hung = opened.worker
                    opened.worker.kill()
                except (WorkerError, WorkerLost, OSError):
                    continue  # The event of its end comes to the watch.
                finally:
                    session.asked_at = None
                await self._ask_writeback()

    async def _end_of(self, worker: Worker) -> str:
        text = await death_of(worker)
        if worker is self._hung:
            text = f"the worker process {worker.pid} hung and was killed"
        return text

    async def _ask_writeback(self) -> None:
        """Look for write-back errors of the node, but only after a request has failed: the
        question makes the kernel write what it has."""
        session = self._session
        failed = await self._failed_requests()
        if failed == self._failed or session.attachment is None:
            return
        self._failed = failed
        reason = await session.attachment.writeback_error()
        if reason is not None:
            session.counters.writeback_errors += 1
            log.error(
                "write-back of the device failed",
                extra=fields(name=session.name, device=session.record.device, reason=reason),
            )

    async def _failed_requests(self) -> int:
        """How many requests the worker has answered with an error so far."""
        try:
            said = await self._session.worker().worker.request("status", timeout=STATUS_SECONDS)
        except (ApiError, WorkerError, WorkerLost, OSError):
            return self._failed
        count = said.get("failed_requests")
        return count if isinstance(count, int) else self._failed

    async def recover(self, reason: str) -> None:
        """Replace a dead worker; the kernel holds requests back until the successor serves."""
        session, life = self._session, self._session.life
        begin = asyncio.get_running_loop().time()
        session.connections = set()
        if life.state is not DeviceState.RECOVERING:
            life.move(DeviceState.RECOVERING, reason)
        for attempt in range(session.config.restarts.count_max + 1):
            if not session.restarts.take():
                break
            await asyncio.sleep(RETRY_DELAYS[min(attempt, len(RETRY_DELAYS) - 1)])
            try:
                await session.drop_worker()
                await session.open(takeover=True)
                await session.reconnect(session.record.request.connections)
            except SESSION_FAULTS as error:
                reason = to_api_error(error).message
                log.error(
                    "recovery failed",
                    extra=fields(name=session.name, attempt=attempt, reason=reason),
                )
                if _is_gone(session):
                    break
                remedy = _remedy(session.name, to_api_error(error).code)
                if remedy:  # no try will help
                    life.move(DeviceState.FAILED, f"{reason}; {remedy}")
                    return
                continue
            session.counters.restarts += 1
            session.counters.last_pause_seconds = asyncio.get_running_loop().time() - begin
            life.move(DeviceState.ATTACHED)
            self.on_recovered()
            return
        life.move(DeviceState.FAILED, self._why_given_up(reason))

    def _why_given_up(self, reason: str) -> str:
        session = self._session
        if _is_gone(session):
            return f"{session.kernel().device} was disconnected by somebody else"
        limits = session.config.restarts
        return (
            f"{reason}; after {limits.count_max} restarts within {limits.window:g} s no more "
            "are tried"
        )

    async def _connection_closed(self, number: object) -> None:
        """One connection ended while the worker lives: the kernel cut it off, or dropped it."""
        session = self._session
        if not isinstance(number, int) or number not in session.connections:
            return
        session.connections.discard(number)
        log.warning("connection closed", extra=fields(name=session.name, connection=number))
        if not session.replacements.take():
            session.life.move(
                DeviceState.FAILED, "its connections are closed again and again by the kernel"
            )
            return
        try:
            await session.reconnect(1)
            session.counters.reconnects += 1
        except WorkerLost:
            return  # The next event says so, and the worker is replaced.
        except SESSION_FAULTS as error:
            reason = to_api_error(error).message
            if _is_gone(session):
                session.life.move(DeviceState.FAILED, reason)
            elif session.connections:
                log.error("a connection is lost: %s", reason, extra=fields(name=session.name))
            else:
                # The worker lives and cannot serve: an older write may be stuck in it.
                await self.recover(reason)


def _is_gone(session: Session) -> bool:
    """Whether the kernel has the device no more, and that is sure."""
    try:
        return not session.kernel().exists()
    except AttachError:
        return False


def _remedy(name: str, code: str) -> str:
    """What alone helps against a fault; "" where another try may."""
    command = f"fvdctl recover {name} --discard-unflushed"
    if code == LiveStateDamaged.code:
        return f"{command} goes on without it, as after a power cut"
    if code == OPENED_SINCE:
        return f"{command} goes on with what it holds now"
    return ""


async def death_of(worker: Worker) -> str:
    """That a worker is gone, and what it died of as far as its parent can know."""
    text, status = f"the worker process {worker.pid} died", None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REAP_SECONDS):
            status = await worker.wait()
    if status is None:  # of another parent, or not gone yet
        return text
    return f"{text} of signal {-status}" if status < 0 else f"{text} with exit status {status}"


def _log_event(name: str, kind: str, event: Mapping[str, object]) -> None:
    """One line for what a worker tells; what failed says errno, operation, place and file."""
    values = {**event, "name": name}
    if kind == "failed":
        log.error("a request failed", extra=fields(**values))
    elif kind == "fault":
        log.error("the image has stopped", extra=fields(**values))
    elif event.get("state") == "failed" or kind == "failures_lost":
        log.error("worker event: %s", kind, extra=fields(**values))
    elif kind == "parked" and event.get("requests"):
        log.warning("writes wait for space", extra=fields(**values))
    else:
        log.info("worker event: %s", kind, extra=fields(**values))
