# SPDX-License-Identifier: Apache-2.0
"""Replace the worker of a device by one of the installed version, under load, without a reconnect.

    successor is started and loads everything        no pause yet: a version that cannot go on with
                                                     this live state is refused here
    the old worker flushes                           so that the takeover has little left to do
  > the old worker stops between two messages, answers what it received, gives its sockets away
  > the old worker is killed: from its pidfd it is certain that it writes no more
  > the successor takes over image and live state, as after a death
  > the successor goes on with the sockets and the bytes of the next message
    the old one is forgotten

The kernel sees no connection end and no request unanswered, only answers that are late by the time
of the lines marked `>`. Whatever fails in them leaves a dead worker and closed sockets: that is a
crash, and recovery deals with it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.devices import supervise
from fvdd.devices.handing_over import check_openable, handed_over
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, to_api_error
from fvdd.devices.supervise import Worker
from fvdd.log import fields
from fvdd.worker.client import WorkerError

log = logging.getLogger("fvdd.devices")


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What was done: "handed over", or "restarted" where the old worker is too old to hand over."""

    method: str
    version_before: str
    version: str
    pause_seconds: float


async def upgrade(session: Session, recovery: Recovery) -> Upgrade:
    """Replace the worker; ApiError when nothing was changed."""
    old = session.worker().worker
    session.check_directory()
    try:
        before = str((await old.request("ping", timeout=session.worker_limit)).get("version", "-"))
        await check_openable(session)
        new = await supervise.start_worker(session.services.spawn, str(session.directory))
        version = await prepare(session, new)
        try:
            await old.request("flush", timeout=session.worker_limit)
        except BaseException:
            await asyncio.shield(supervise.make_gone(new))
            raise
    except SESSION_FAULTS as error:
        raise to_api_error(error) from error
    await recovery.stop()
    begin = asyncio.get_running_loop().time()
    try:
        method = await _replace(session, recovery, new)
    finally:
        recovery.start()
    pause = asyncio.get_running_loop().time() - begin
    session.counters.upgrades += 1
    session.counters.last_pause_seconds = pause
    log.info(
        "worker replaced",
        extra=fields(
            name=session.name, method=method, pid=session.record.worker_pid, seconds=round(pause, 4)
        ),
    )
    return Upgrade(method, before, version, pause)


async def prepare(session: Session, new: Worker) -> str:
    """Let a successor load everything; its version. On failure it is gone."""
    try:
        answer = await new.request(
            "prepare", live_dir=str(session.directory), timeout=session.worker_limit
        )
    except BaseException:
        await asyncio.shield(supervise.make_gone(new))
        raise
    return str(answer.get("version", "-"))


async def _replace(session: Session, recovery: Recovery, new: Worker) -> str:
    try:
        async with handed_over(session, session.worker().worker) as parted:
            await session.drop_worker()
            session.opened = await supervise.open_in(
                new, session.opening(takeover=True), session.worker_limit
            )
            await parted.resume(new)
            await session.note_opened()
            await session.restore_prefetch()
        return "handed over"
    except SESSION_FAULTS as error:
        await asyncio.shield(supervise.make_gone(new))
        if isinstance(error, WorkerError) and error.code == "worker_busy":
            raise to_api_error(error) from error
        # What waits for space is never answered by this worker: the kernel sends it to the next.
        reason = to_api_error(error).message
        log.warning("no hand-over: %s", reason, extra=fields(name=session.name))
        await recovery.recover("its worker is being replaced")
    if session.life.state is not DeviceState.ATTACHED:
        raise ApiError(
            "device_failed",
            f"device {session.name} could not be served again: {session.life.reason}",
            hint=f"remove the cause, then: fvdctl recover {session.name}",
        )
    return "restarted"
