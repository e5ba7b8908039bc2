# SPDX-License-Identifier: Apache-2.0
"""Copy the disk of a device as it is at one moment, while the device stays in use.

  > the device continues on an empty image that takes the place of its own (a pause, as for a
    snapshot); the image itself is closed clean and stays still under another name
    a process of its own copies the disk to the file, for as long as that takes
  > what was written meanwhile is put into the image, which gets its name back (a pause that grows
    with what was written)

Both changes are renames, and at every moment the name of the image leads to a complete one: at
worst, after the death of fvdd or of the host, to one with a base beside it, IMAGE.backup-base, that
the next backup puts together again. A worker that dies in between is replaced as ever.

It costs: as much space as is written during the copy, the file, and reading the whole disk, base
included, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import PREFETCH_OFF, DeviceState
from fvdd.attach.threads import run_blocking
from fvdd.devices import supervise
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, gather_quietly, to_api_error
from fvdd.devices.snapshot import continue_on
from fvdd.log import fields
from fvdd.worker.client import WorkerLost, WorkerProcess
from fvdengine import overlay
from fvdengine.errors import EngineError, from_os_error

log = logging.getLogger("fvdd.devices")

SUFFIX: Final = ".backup-base"


class Backup:
    """The backups of one device, one at a time; `operation` is held while the device changes."""

    def __init__(self, session: Session, recovery: Recovery, operation: asyncio.Lock) -> None:
        self._session = session
        self._recovery = recovery
        self._operation = operation
        self._is_running = False

    async def run(self, target: str) -> tuple[int, list[float]]:
        """Copy the disk to `target`: bytes written and the seconds of each pause. ApiError: there
        is no such file, and the device goes on."""
        if self._is_running:
            raise ApiError("device_busy", f"a backup of {self._session.name} is being made already")
        if os.path.lexists(target):
            raise ApiError(
                "invalid_request",
                f"{target} exists already",
                hint="name a file that does not exist",
            )
        if not os.path.isdir(os.path.dirname(target)):
            raise ApiError("invalid_request", f"there is no directory {os.path.dirname(target)}")
        self._is_running = True
        try:
            return await self._run(target)
        finally:
            self._is_running = False

    def check_none(self) -> None:
        """ApiError while one is made: what is changed then would be undone at its end."""
        if self._is_running:
            raise ApiError(
                "device_busy",
                f"a backup of {self._session.name} is being made",
                hint="try again when it has ended",
            )

    async def leftover(self) -> str | None:
        """The base that a backup which was broken off left beside the image."""
        if self._is_running:
            return None
        image = os.path.realpath(self._session.record.request.image)
        base = image + SUFFIX
        try:
            return base if await run_blocking(lambda: overlay.is_over(image, base)) else None
        except (OSError, EngineError):
            return None

    async def _run(self, target: str) -> tuple[int, list[float]]:
        session = self._session
        pauses = []
        async with self._operation:
            self._check_attached()
            image = os.path.realpath(session.record.request.image)
            base = image + SUFFIX
            is_still = session.record.request.read_only  # by itself
            if not is_still:
                if await run_blocking(lambda: overlay.is_over(image, base)):
                    pauses.append(await self._put_together(image, base))
                change = functools.partial(_set_aside, session, image, base)
                pauses.append(await continue_on(session, self._recovery, change))
        if is_still:
            return await self._copy(image, target), []
        try:
            written = await self._copy(base, target)
        finally:
            async with self._operation:
                self._check_attached()
                pauses.append(await self._put_together(image, base))
        log.info(
            "backup",
            extra=fields(name=session.name, target=target, bytes=written, pauses=pauses),
        )
        return written, pauses

    async def _put_together(self, image: str, base: str) -> float:
        session = self._session
        return await continue_on(
            session, self._recovery, lambda: _put_together(session, image, base)
        )

    def _check_attached(self) -> None:
        state = self._session.life.state
        if state is not DeviceState.ATTACHED:
            raise ApiError(
                "device_state",
                f"device {self._session.name} is {state.value} now",
                hint=f"what a backup left as *{SUFFIX} belongs to the image; the next backup "
                "puts both together",
            )

    async def _copy(self, source: str, target: str) -> int:
        """The file has its name only when it is complete and durable."""
        part = f"{target}.part"
        try:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise to_api_error(from_os_error(error, part, "create")) from error
        try:
            answer = await _in_a_worker(self._session, source, {"read_only": True}, "copy_out", fd)
            await run_blocking(lambda: _name(part, target))
        except OSError as error:
            raise to_api_error(from_os_error(error, target, "create")) from error
        except SESSION_FAULTS as error:
            raise to_api_error(error) from error
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(part)
        return int(answer["written"])


def _name(part: str, target: str) -> None:
    os.link(part, target)  # unlike a rename it replaces nothing
    overlay.flush_folder(target)


async def _set_aside(session: Session, image: str, base: str) -> ApiError | None:
    """Put an empty image over the device's own. Not possible: why, and nothing has changed."""
    old = session.record
    try:
        # As a base the image is read by everybody and owned by nobody.
        session.release_owner()
        quiet = old.request.model_copy(
            update={"copy_on_read": False, "prefetch_delay": PREFETCH_OFF}
        )
        session.update_record(
            required=True, request=quiet, kept=old.request, image_id=None, image_uuid=None
        )
        options = session.clone_options()
        await run_blocking(lambda: overlay.put_over(image, base, options))
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        await session.lock_owner()
        return to_api_error(error)
    await session.lock_owner()
    return None


async def _put_together(session: Session, image: str, base: str) -> ApiError | None:
    """Put what the upper image holds into the lower one, which takes its name again. Not possible:
    why, and the device stays on both."""
    old = session.record
    try:
        session.release_owner()
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await _in_a_worker(session, base, {"copy_on_read": False}, "fold", fd, name=image)
        finally:
            os.close(fd)
        request = (old.kept or old.request).model_copy(update={"image": old.request.image})
        session.update_record(
            required=True, request=request, kept=None, image_id=None, image_uuid=None
        )
        await run_blocking(lambda: overlay.put_back(image, base))
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        await session.lock_owner()
        return to_api_error(error)
    await session.lock_owner()
    return None


async def _in_a_worker(
    session: Session, image: str, opening: Mapping[str, Any], op: str, fd: int, **arguments: Any
) -> dict[str, Any]:
    """Let a process that serves nobody open `image` and do one thing. It has no directory, so that
    nobody takes it for the device's worker, and ends when fvdd does."""
    ours: dict[str, Any] = session.open_arguments(takeover=False)
    keys = ("allow_dirs", "allow_uris", "base_timeout", "accept_changed_base")
    worker = await WorkerProcess.spawn(None)
    try:
        await worker.request(
            "open", image=image, prefetch_delay=PREFETCH_OFF,
            timeout=session.worker_limit, **{key: ours[key] for key in keys}, **opening,
        )  # fmt: skip
        answer = await _watched(worker, session.config.limits.hang_timeout, op, fd, arguments)
        await supervise.stop_worker(worker, session.worker_limit)
        return answer
    finally:
        if worker.is_running:
            with contextlib.suppress(ApiError):
                await asyncio.shield(supervise.make_gone(worker))


async def _watched(
    worker: WorkerProcess, limit: float, op: str, fd: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Wait for what may take long, but not for a process that does not even answer."""
    work = asyncio.ensure_future(worker.request(op, [fd], **arguments))
    try:
        while not (await asyncio.wait({work}, timeout=limit))[0]:
            await worker.request("ping", timeout=limit)
    except TimeoutError:
        worker.kill()
        raise WorkerLost(f"the process {worker.pid} hung and was killed") from None
    finally:
        work.cancel()
        await gather_quietly(work)
    return work.result()
