# SPDX-License-Identifier: Apache-2.0
"""Change the image of a device in use. Growing: first the image, then the kernel, then the record.

    the worker grows the image                       the new size is durable, nobody uses it yet
    a relay is started                               a process of its own, see fvdd.worker.relay
  > the worker stops between two messages; the relay gets the kernel's connections
  > the kernel is told the size, and may wait for every request before it takes it
  > the relay stops between two messages; the worker gets the connections back
    the record is written

Why a relay: a kernel that waits for requests takes no new connections. If the worker died then,
they would never be answered, and the device would hang for good. Behind the relay the worker may
die: its successor answers what it left. fvdd may die as well: the relay then brings the connections
home by itself. The relay itself must live until the kernel has its size: a kernel that waits keeps
its configuration locked, so that nothing (RECONFIGURE, DISCONNECT, ioctl) reaches the device any
more, and how far a dead relay had read and answered nobody can know. That moment is as long as the
requests take that are in flight when it begins; nothing but a kill by hand ends the relay in it.

Whoever dies between any two steps, the image has its old size or its new one, and the kernel never
has more than the image: `follow_image` tells it the rest, after a recovery or an adoption.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.devices import supervise
from fvdd.devices.handing_over import Parted, handed_over
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, to_api_error
from fvdd.devices.supervise import WORKER_FAULTS, Worker, as_api_error
from fvdd.log import fields
from fvdd.worker.client import WorkerError, WorkerLost

log = logging.getLogger("fvdd.devices")

# Growing a table moves chunks, and waits for requests that use them.
GROW_LIMIT_SECONDS: Final = 300.0
FOLLOW_TRIES: Final = 10
FOLLOW_PAUSE_SECONDS: Final = 5.0
# How long requests may take to end behind the relay, a second at a time.
RETURN_TRIES: Final = 120


@dataclass(frozen=True, slots=True)
class Resized:
    """Sizes in bytes."""

    old_size: int
    new_size: int


async def resize(session: Session, recovery: Recovery, text: str) -> Resized:
    """Grow the image to `text` ([+]SIZE) and let the device follow; ApiError."""
    _check(session)
    opened = session.worker()
    try:
        answer = await opened.worker.request(
            "resize",
            size=text,
            sector=session.record.request.sector_size,
            timeout=GROW_LIMIT_SECONDS,
        )
    except WORKER_FAULTS as error:
        raise _described(error, session) from error
    done = Resized(int(answer["old_size"]), int(answer["size"]))
    # The worker may have died since: what its successor says counts.
    if session.opened is opened:
        session.opened = replace(opened, size_bytes=done.new_size)
    try:
        await follow_image(session, recovery)
    except SESSION_FAULTS as error:
        failure = to_api_error(error)
        raise ApiError(
            failure.code,
            f"the image has {done.new_size} bytes now, but the device does not: {failure.message}",
            hint=f"say it again: fvdctl resize {session.name} {done.new_size}",
        ) from error
    log.info("resized", extra=fields(name=session.name, size=done.new_size, previous=done.old_size))
    return done


async def update(session: Session, assignments: Mapping[str, str]) -> dict[str, Any]:
    """Change fields of the image's header through its worker; ApiError, and nothing has changed."""
    _check(session)
    try:
        return await session.worker().worker.request(
            "update", fields=dict(assignments), timeout=session.worker_limit
        )
    except WorkerLost as error:
        raise ApiError(
            "worker_failed",
            f"the worker of {session.name} died and did not say whether it changed anything",
            hint="say it again: what has its value already stays as it is",
        ) from error
    except WORKER_FAULTS as error:
        raise as_api_error(error) from error


def _check(session: Session) -> None:
    session.check_attached()
    if session.record.request.read_only:
        raise ApiError(
            "invalid_request",
            f"device {session.name} is read-only: its image cannot be changed",
            hint="detach it and attach it for writing",
        )


def _described(error: BaseException, session: Session) -> ApiError:
    if isinstance(error, WorkerLost | TimeoutError):
        return ApiError(
            "worker_failed",
            f"the worker of {session.name} did not say whether the image has grown",
            hint=f"fvdctl status {session.name} shows the size; then say it again, without '+'",
        )
    return as_api_error(error)


def needs_following(session: Session) -> bool:
    """Whether the kernel or the record know another size than the image has."""
    if session.opened is None or session.attachment is None:
        return False
    size = session.opened.size_bytes
    return session.attachment.size() != size or session.record.size_bytes != size


async def follow_later(session: Session, recovery: Recovery, operation: asyncio.Lock) -> None:
    """After a recovery or an adoption: finish a resize that was broken off."""
    for _ in range(FOLLOW_TRIES):
        async with operation:
            if session.life.state is not DeviceState.ATTACHED or not needs_following(session):
                return
            try:
                await follow_image(session, recovery)
            except SESSION_FAULTS as error:
                reason = to_api_error(error).message
                log.error("the device's size: %s", reason, extra=fields(name=session.name))
            else:
                return
        await asyncio.sleep(FOLLOW_PAUSE_SECONDS)


async def follow_image(session: Session, recovery: Recovery) -> None:
    """Let kernel and record have the size of the image; raises SESSION_FAULTS."""
    size = session.worker().size_bytes
    there = session.kernel().size()
    if there is not None and there > size:
        raise ApiError(
            "device_failed",
            f"{session.kernel().device} has {there} bytes, more than the image, which has {size}",
        )
    if there != size:
        await _tell_kernel(session, recovery, size)
    if session.record.size_bytes != size:
        session.update_record(size_bytes=size)
    await session.kernel().scan()


async def _tell_kernel(session: Session, recovery: Recovery, size: int) -> None:
    relay = await supervise.start_worker(session.services.spawn, str(session.directory))
    try:
        # From here on it answers at once: its start is no part of the pause.
        await relay.request("ping", timeout=session.worker_limit)
        _check(session)
        await recovery.stop()
        try:
            begin = asyncio.get_running_loop().time()
            await _Crossing(session, recovery, relay).cross(size)
            session.counters.last_pause_seconds = asyncio.get_running_loop().time() - begin
        finally:
            recovery.start()
    except asyncio.CancelledError:
        # fvdd ends: the relay brings the connections home by itself.
        await relay.close()
        raise
    except BaseException:
        await asyncio.shield(supervise.make_gone(relay))
        raise
    await supervise.make_gone(relay)


class _Crossing:
    """One way of the connections: to the relay and back."""

    def __init__(self, session: Session, recovery: Recovery, relay: Worker) -> None:
        self._session = session
        self._recovery = recovery
        self._relay = relay
        self._count = 0

    async def cross(self, size: int) -> None:
        """Tell the kernel its size behind the relay; raises SESSION_FAULTS."""
        await self._go_out()
        telling = asyncio.ensure_future(self._session.kernel().resize(size))
        try:
            await self._keep_served(telling)
            await self._come_back()
        except SESSION_FAULTS as error:
            # The kernel sees its connections end, and gets others.
            reason = to_api_error(error).message
            log.error("resize: %s", reason, extra=fields(name=self._session.name))
            await supervise.make_gone(self._relay)
            await self._recovery.recover("its connections were lost")
        await telling

    async def _go_out(self) -> None:
        session = self._session
        worker = session.worker().worker
        try:
            async with handed_over(session, worker) as parted:
                self._count = len(parted.received)
                try:
                    await self._connect("relay", parted.descriptors, received=parted.received)
                except WorkerError:
                    # The relay does not want them.
                    await parted.resume(worker)
                    raise
        except SESSION_FAULTS as error:
            if not session.connections and not _is_busy(error):
                await supervise.make_gone(self._relay)
                await self._recovery.recover("its connections were lost")
            raise

    async def _connect(self, op: str, descriptors: list[int], **arguments: object) -> None:
        """Connect the relay with the worker that there is."""
        limit = self._session.worker_limit
        worker = self._session.worker().worker
        _, ends = await supervise.serve_sockets(worker, self._count, limit)
        try:
            fds = [*descriptors, *(end.fileno() for end in ends)]
            await self._relay.request(op, fds, timeout=limit, **arguments)
        finally:
            supervise.close_sockets(ends)

    async def _keep_served(self, telling: asyncio.Future[None]) -> None:
        """Until the kernel has its size and there is a worker for its connections to come back
        to, replace one that dies or does not answer."""
        session = self._session
        limit = session.config.limits.hang_timeout
        while True:
            worker = session.worker().worker
            gone = asyncio.ensure_future(worker.wait())
            both: set[asyncio.Future[Any]] = {telling, gone}
            await asyncio.wait(both, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            is_gone = gone.done()
            gone.cancel()
            # It may have died and not be known as dead yet.
            if is_gone or not await self._answers(worker, limit):
                log.warning("the worker died behind the relay", extra=fields(name=session.name))
                await self._replace_worker()
            elif telling.done():
                return

    async def _answers(self, worker: Worker, limit: float) -> bool:
        try:
            await worker.request("ping", timeout=limit)
        except WorkerError:
            return True
        except (WorkerLost, TimeoutError):
            return False
        return True

    async def _replace_worker(self) -> None:
        session = self._session
        while True:
            try:
                await session.drop_worker()
                await session.open(takeover=True)
                await self._connect("relay_to", [])
                break
            except SESSION_FAULTS as error:
                if not session.restarts.take() or not self._relay.is_running:
                    raise
                reason = to_api_error(error).message
                log.error("recovery failed", extra=fields(name=session.name, reason=reason))
        session.counters.restarts += 1

    async def _come_back(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            parted = await self._take_back(stack)
            await parted.resume(self._session.worker().worker)

    async def _take_back(self, stack: contextlib.AsyncExitStack) -> Parted:
        """The kernel's connections, once everything behind the relay is answered."""
        for _ in range(RETURN_TRIES):
            try:
                return await stack.enter_async_context(
                    handed_over(self._session, self._relay, "relay_part", seconds=1)
                )
            except WorkerError as error:
                if not _is_busy(error):
                    raise
            if not self._session.worker().worker.is_running:
                await self._replace_worker()
        raise ApiError("worker_busy", "requests of the device did not end")


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, WorkerError) and error.code == "worker_busy"
