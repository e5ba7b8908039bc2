# SPDX-License-Identifier: Apache-2.0
"""Take over a device that an earlier fvdd left, or that has failed: find its parts, mend the rest.

Three parts may each be there or not: the worker (found through the socket in its directory), the
kernel's device (found by its backend identifier, wherever it is), and what was wanted of it (the
record). What follows from them:

    kernel device  worker          then
    there          serves          take both as they are; replace connections that died meanwhile
    there          dead or stuck   a successor takes over the live state and reconnects
    gone           any             nobody uses the device: when that was wanted, or the attach never
                                   got so far, close the image clean and forget it; otherwise
                                   somebody else took it away, and the device has failed

A worker that does not answer is killed before anything else happens: it must not come back to life
beside its successor. It is known by its command line, which names the directory; numbers in records
may be somebody else's by now.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import select
import signal
from pathlib import Path
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.threads import run_blocking
from fvdd.devices import supervise
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, timeouts_for, to_api_error
from fvdd.devices.supervise import GONE_LIMIT_SECONDS, Opened
from fvdd.devices.whereabouts import LOOK_LIMIT_SECONDS
from fvdd.log import fields
from fvdd.worker.client import WorkerError, WorkerLost, WorkerProcess
from fvdd.worker.relaying import COMM as RELAY_COMM
from fvdengine.chain import boot_id
from fvdengine.errors import EngineError
from fvdengine.live import LIVE_NAME, live_header_in, release_reserved

log = logging.getLogger("fvdd.devices")

CONTROL_SOCKET: Final = "control.sock"
# What begins the name of live state that may have to come back.
ASIDE: Final = f"{LIVE_NAME}.of-"
# Connections that ended while no fvdd was there have long been noticed by the kernel.
NOTICE_SECONDS: Final = 0.1
# A relay goes home within milliseconds, or as long as the base takes to answer.
RELAY_LIMIT_SECONDS: Final = 130.0


async def adopt(
    session: Session, recovery: Recovery, reason: str, tries: int | None = None
) -> None:
    """Bring the device back to ATTACHED, or CLOSED, or FAILED with the reason; never raises.
    `tries`: how many workers are started at most, if not as many as ever."""
    life = session.life
    await recovery.stop()
    release_reserved(session.directory)  # by a verb that died with its fvdd
    if life.state is not DeviceState.RECOVERING:
        life.move(DeviceState.RECOVERING, reason)
    session.restarts.reset(tries)
    session.replacements.reset()
    try:
        await _find_parts(session)
        if session.attachment is None:
            await _without_kernel_device(session)
        elif session.opened is None:
            await recovery.recover(reason)
        else:
            await _go_on(session, recovery)
    except SESSION_FAULTS as error:
        life.move(DeviceState.FAILED, to_api_error(error).message)
    except Exception as error:  # a defect here must not leave the device in between for ever
        log.exception("adopting failed", extra=fields(name=session.name))
        if life.state is not DeviceState.FAILED:
            life.move(DeviceState.FAILED, f"fvdd failed to take it over: {error}")
    if life.state is DeviceState.ATTACHED:
        if session.record.wanted != "attached":
            # Its detach was broken off while the kernel still had it: it goes on being a device.
            session.update_record(wanted="attached")
        recovery.start()
        log.info(
            "adopted",
            extra=fields(
                name=session.name, device=session.record.device, pid=session.record.worker_pid
            ),
        )


async def _go_on(session: Session, recovery: Recovery) -> None:
    """Take a worker that serves as it is; one that cannot serve any more gets a successor."""
    try:
        await _mend_connections(session)
    except SESSION_FAULTS as error:
        if not session.connections:
            await recovery.recover(to_api_error(error).message)
            return
        reason = to_api_error(error).message
        log.error("a connection is lost: %s", reason, extra=fields(name=session.name))
    session.life.move(DeviceState.ATTACHED)


async def _find_parts(session: Session) -> None:
    session.image_is_open = True
    limit = session.config.limits.hang_timeout
    if session.opened is None:
        await _take_back_state(session)
        session.opened = await find_worker(session.directory, limit)
    elif not await _answers(session.opened, limit):
        await session.drop_worker()
    await session.follow_image([session.opened.worker.pid] if session.opened is not None else [])
    if session.opened is not None:
        await session.note_opened()
        await _learn_connections(session)
    if session.attachment is not None and not session.attachment.exists():
        await session.attachment.abandon()
        session.attachment = None
    if session.attachment is None:
        session.attachment = await session.services.transport.adopt(
            session.spec(), session.record.index
        )
        if session.attachment is not None:
            session.note_attachment()
    await _hold_image(session)  # last: without it the rest is known, and can be given up


async def _learn_connections(session: Session) -> None:
    """A record that was made anew does not know how many connections the kernel has; the worker
    does, and the times depend on it."""
    record = session.record
    if not record.rebuilt:
        return
    answer = await session.worker().worker.request("ping", timeout=session.worker_limit)
    alive = answer.get("connections")
    count = len(alive) if isinstance(alive, list) else 0
    if count > record.request.connections:
        session.update_record(
            request=record.request.model_copy(update={"connections": count}),
            timeouts=timeouts_for(session.config, count),
        )


async def _hold_image(session: Session) -> None:
    """Hold the image against other owners. A worker that serves has it open and locked: that fvdd
    cannot open it now (its file system has become read-only, say) is no reason to give up."""
    try:
        await session.lock_owner(LOOK_LIMIT_SECONDS if session.opened is not None else None)
    except (EngineError, ApiError) as error:
        if session.opened is None:
            raise
        log.warning(
            "fvdd cannot open the image, its worker goes on: %s", error,
            extra=fields(name=session.name),
        )  # fmt: skip


def aside_path(session: Session) -> Path:
    """Where the live state of the file that the record names waits while another one is tried."""
    place = "-".join(str(number) for number in session.record.image_id or ())
    return session.directory / f"{ASIDE}{place}"


async def _take_back_state(session: Session) -> None:
    """Undo a recovery on a moved image that was broken off before the record named that."""
    wanted = aside_path(session)
    for path in list(session.directory.glob(f"{ASIDE}*")):
        if path != wanted:
            path.unlink(missing_ok=True)  # the record names another file: it was committed to
            continue
        for pid in worker_pids(session.directory):  # it has the file that was tried
            await end_worker(pid, session.directory)
        path.rename(session.directory / LIVE_NAME)


async def _without_kernel_device(session: Session) -> None:
    record = session.record
    if record.index is not None and record.wanted == "attached":
        if _is_of_an_earlier_boot(session.directory):
            raise ApiError(
                "device_failed",
                f"the host was started anew while the device was attached, as {record.device}",
                hint=f"fvdctl detach {session.name} closes the image; then attach it again",
            )
        raise ApiError(
            "device_failed",
            f"{record.device} was disconnected by somebody else",
            hint=f"fvdctl detach {session.name} closes the image; then attach it again",
        )
    session.life.move(DeviceState.DRAINING)
    log.info("closing what a broken off attach or detach left", extra=fields(name=session.name))
    if session.opened is None and record.image_uuid is None and not session.has_live_state():
        session.image_is_open = False  # no worker ever had it
    await session.close_image()
    session.release_owner()
    session.forget_directory()
    session.life.move(DeviceState.CLOSED)


def _is_of_an_earlier_boot(directory: Path) -> bool:
    header = live_header_in(directory)
    return header is not None and header.boot_id != boot_id()


async def _mend_connections(session: Session) -> None:
    """Replace the connections that ended while nobody was there to notice."""
    worker = session.worker().worker
    answer = await worker.request("ping", timeout=session.worker_limit)
    alive = answer.get("connections")
    session.connections = set(alive) if isinstance(alive, list) else set()
    missing = session.record.request.connections - len(session.connections)
    if missing > 0:
        await session.reconnect(missing, NOTICE_SECONDS)
        session.counters.reconnects += missing


# Workers of a directory


async def find_worker(directory: Path, limit: float) -> Opened | None:
    """The worker that serves from `directory`; None when there is none, and surely none is left."""
    await wait_for_relays(directory)
    opened = None
    with contextlib.suppress(OSError):
        worker = await WorkerProcess.connect(str(directory / CONTROL_SOCKET), limit)
        with contextlib.suppress(WorkerError, WorkerLost, TimeoutError, OSError):
            answer = await worker.request("ping", timeout=limit)
            opened = supervise.opened_from(worker, answer)
        if opened is None:  # it has no image, or is of a version that does not say
            await supervise.make_gone(worker)
    others = [pid for pid in worker_pids(directory) if opened is None or pid != opened.worker.pid]
    for pid in others:
        await end_worker(pid, directory)
    return opened


async def wait_for_relays(directory: Path) -> None:
    """Let a relay of an fvdd that has died bring the kernel's connections to their worker."""
    for pid in worker_pids(directory):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() != RELAY_COMM:
                continue
            pidfd = os.pidfd_open(pid)
            try:
                await run_blocking(functools.partial(_ended, pidfd, RELAY_LIMIT_SECONDS))
            finally:
                os.close(pidfd)


async def _answers(opened: Opened, limit: float) -> bool:
    if not opened.worker.is_running:
        return False
    try:
        await opened.worker.request("ping", timeout=limit)
    except (WorkerError, WorkerLost, TimeoutError, OSError):
        return False
    return True


def worker_pids(directory: Path) -> list[int]:
    """Processes that are workers of this very directory."""
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and is_worker(int(entry), directory)
    ]


def is_worker(pid: int, directory: Path) -> bool:
    """Whether a process of this very user was started as a worker of the directory: words that
    name both are not enough, a search for workers has them too."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return False
    pairs = [*itertools.pairwise(words)]
    if (b"-m", b"fvdd.worker") not in pairs:
        return False
    behind = pairs[pairs.index((b"-m", b"fvdd.worker")) :]
    if (b"--dir", os.fsencode(directory)) not in behind:
        return False
    user = re.search(rb"^Uid:\t[0-9]+\t([0-9]+)", status, re.MULTILINE)
    return user is not None and int(user[1]) == os.geteuid()


async def end_worker(pid: int, directory: Path) -> None:
    """Kill a worker that does not answer, and wait until it is gone; ApiError when it stays."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Only now the number is certain to mean one process.
        if not is_worker(pid, directory):
            return
        log.warning("a worker that does not answer is killed", extra=fields(pid=pid))
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not await run_blocking(lambda: _ended(pidfd, GONE_LIMIT_SECONDS)):
            raise ApiError(
                "worker_failed",
                f"the worker process {pid} was killed but does not end",
                hint="it hangs in the kernel, most likely in I/O on the image or the base (dmesg)",
            )
    finally:
        os.close(pidfd)


def _ended(pidfd: int, limit: float) -> bool:
    return bool(select.select([pidfd], [], [], limit)[0])
