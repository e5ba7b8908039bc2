# SPDX-License-Identifier: Apache-2.0
"""One device: an image in a worker, a kernel attachment, and the state between them.

Attaching and detaching are sequences of steps, each of which can be undone; the order is what
keeps data safe:

- the owner lock is taken first and given back last, so nobody else opens the image in between;
- the live directory exists before the worker, and is removed only after the image was closed clean;
- the kernel's sockets are served before the kernel gets them;
- on detach the node is held exclusively before anything is flushed, and the worker is stopped after
  the kernel has let go.

While a device is attached one task watches its worker and replaces it when it dies. That task alone
replaces workers; detach ends it only when nothing needs the worker's answers any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, DeviceStatus
from fvdd.attach.attachment import AttachError, Attachment, AttachSpec, Transport
from fvdd.attach.threads import run_blocking
from fvdd.config import Config
from fvdd.devices import supervise
from fvdd.devices.record import DeviceRecord, load_record, remove_directory, store_record
from fvdd.devices.rendering import render_status
from fvdd.devices.states import Life
from fvdd.devices.supervise import (
    WORKER_FAULTS,
    Opened,
    RestartBudget,
    Spawn,
    as_api_error,
)
from fvdd.log import fields
from fvdd.worker.client import WorkerError, WorkerLost
from fvdengine.errors import EngineError
from fvdengine.opening import lock_owner

log = logging.getLogger("fvdd.devices")

STATUS_LIMIT_SECONDS: Final = 2.0
# How long to wait for the kernel to notice that its connections are dead; it takes milliseconds.
DEATH_NOTICE_SECONDS: Final = 1.0
RETRY_DELAYS: Final = (0.0, 0.1, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class Services:
    """What every device needs from its surroundings."""

    config: Config
    transport: Transport
    spawn: Spawn


@dataclass(slots=True)
class Counters:
    restarts: int = 0
    reconnects: int = 0
    stalled_seconds: float = 0.0


@dataclass(slots=True)
class _Running:
    """What exists while a device is alive."""

    opened: Opened | None = None
    attachment: Attachment | None = None
    connections: set[int] = field(default_factory=set)
    owner_fd: int = -1
    # From the first request to open the image until it is closed clean (or was never opened).
    image_is_open: bool = False
    last_status: dict[str, Any] = field(default_factory=dict)


class Device:
    """One attached image."""

    def __init__(self, services: Services, record: DeviceRecord, directory: Path) -> None:
        self._services = services
        self._record = record
        self._directory = directory
        self._run = _Running()
        self._life = Life(record.name)
        self._operation = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._restarts = RestartBudget(services.config.restarts)
        self._replacements = RestartBudget(services.config.restarts)
        self.counters = Counters()

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def state(self) -> DeviceState:
        return self._life.state

    @property
    def reason(self) -> str | None:
        return self._life.reason

    @property
    def record(self) -> DeviceRecord:
        return self._record

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def worker_pid(self) -> int | None:
        opened = self._run.opened
        return opened.worker.pid if opened is not None and opened.worker.is_running else None

    @property
    def connections_alive(self) -> int:
        return len(self._run.connections)

    @property
    def last_status(self) -> dict[str, Any]:
        """What the worker said when it was asked last."""
        return self._run.last_status

    # Attach

    async def attach(self) -> None:
        """Bring the device up; on failure everything done so far is undone and ApiError raised."""
        async with self._operation:
            try:
                await self._bring_up()
            except (ApiError, AttachError, EngineError, *WORKER_FAULTS) as error:
                await self._take_down()
                raise _api_error(error) from error
            except BaseException:
                await asyncio.shield(self._take_down())
                raise
            log.info(
                "attached",
                extra=fields(name=self.name, device=self._record.device, image=self._image),
            )

    async def _bring_up(self) -> None:
        request = self._record.request
        if not request.read_only:
            self._run.owner_fd = await run_blocking(
                lambda: lock_owner(request.image), discard=os.close
            )
        try:
            self._directory.mkdir(mode=0o700)
        except FileExistsError as error:
            raise ApiError(
                "device_exists",
                f"the directory {self._directory} of a device of that name exists",
                hint="fvdctl status shows what was left behind; choose another --name",
            ) from error
        store_record(self._directory, self._record)
        await self._open(takeover=False)
        opened = self._opened
        self._check_size(opened.size_bytes)
        self._life.move(DeviceState.READY)
        await self._connect(opened)
        self._life.move(DeviceState.ATTACHED)
        # From here on a dying worker is replaced: reading the partition table needs one.
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")
        limit = self._services.config.limits.ready_timeout
        await self._unless_failed(self._attachment.ready(request.wait, limit))

    def _check_size(self, size: int) -> None:
        sector = self._record.request.sector_size
        if size <= 0 or size % sector != 0:
            raise ApiError(
                "invalid_size",
                f"the image's size of {size} bytes is not a multiple of the sector size {sector}",
                hint="attach with --sector-size 512" if sector != 512 else "resize the image",
            )

    async def _connect(self, opened: Opened) -> None:
        """Serve fresh connections and make the kernel device from their other ends."""
        count = self._record.request.connections
        limit = self._services.config.limits.worker_timeout
        numbers, ends = await supervise.serve_sockets(opened.worker, count, limit)
        try:
            self._run.attachment = await self._services.transport.connect(self._spec(opened), ends)
        finally:
            supervise.close_sockets(ends)
        self._run.connections = set(numbers)
        self._update_record(
            index=self._attachment.index,
            device=self._attachment.device,
            size_bytes=opened.size_bytes,
            flags=opened.flags,
        )

    def _spec(self, opened: Opened) -> AttachSpec:
        request, times = self._record.request, self._record.timeouts
        number = request.device.removeprefix("/dev/nbd") if request.device is not None else None
        return AttachSpec(
            backend=self._record.backend,
            size_bytes=opened.size_bytes,
            sector_size=request.sector_size,
            flags=opened.flags,
            connections=request.connections,
            index=int(number) if number is not None else None,
            resend_timeout=times.resend_timeout,
            kernel_timeout=times.kernel_timeout,
            dead_timeout=times.dead_timeout,
        )

    async def _open(self, *, takeover: bool) -> None:
        request = self._record.request
        arguments: dict[str, object] = {
            "image": request.image,
            "read_only": request.read_only,
            "live_dir": str(self._directory),
            # A reader leaves nothing behind that could be taken over.
            "takeover": takeover and not request.read_only,
            "owner_held": not request.read_only,
            "allow_dirs": [*self._services.config.daemon.allow_dirs, *request.allow_dirs],
            "accept_changed_base": request.accept_changed_base,
            "copy_on_read": request.copy_on_read,
            "prefetch_delay": request.prefetch_delay,
            "cache": "writeback",
            "name": self.name,
            "attachment": self._record.attachment,
        }
        limit = self._services.config.limits.worker_timeout
        self._run.image_is_open = True
        try:
            self._run.opened = await supervise.open_worker(
                self._services.spawn, str(self._directory), arguments, limit
            )
        except WorkerError:
            # Refused: nothing was written. (A worker that died may have begun a session.)
            self._run.image_is_open = takeover
            raise
        self._run.last_status = {}
        self._update_record(worker_pid=self._opened.worker.pid, image_uuid=self._opened.image_uuid)

    async def _take_down(self) -> None:
        """Undo a failed attach, last step first. What cannot be undone safely is kept."""
        await self._stop_watching()
        attachment, self._run.attachment = self._run.attachment, None
        if attachment is not None:
            try:
                await attachment.disconnect(self._services.config.limits.release_timeout)
            except AttachError as error:
                log.error("undoing the attach: %s", error, extra=fields(name=self.name))
        clean = True
        if self._life.state is not DeviceState.OPENING:
            self._life.move(DeviceState.DRAINING)
        if self._run.image_is_open:
            clean = await self._close_image_quietly()
        self._release_owner()
        if clean:
            if self._record_is_ours():
                remove_directory(self._directory)
            self._life.move(DeviceState.CLOSED)
        else:
            self._life.move(DeviceState.FAILED, "the attach failed, and then closing the image")

    def _record_is_ours(self) -> bool:
        """Whether the directory was made by this attachment (and not by a namesake before)."""
        try:
            return load_record(self._directory).attachment == self._record.attachment
        except ValueError:
            return False

    async def _close_image_quietly(self) -> bool:
        try:
            await self._close_image()
        except (ApiError, *WORKER_FAULTS) as error:
            reason = as_api_error(error).message
            log.error("the image was not closed: %s", reason, extra=fields(name=self.name))
            if self._run.opened is not None:
                with contextlib.suppress(ApiError):
                    await supervise.make_gone(self._run.opened.worker)
            return False
        return True

    # Detach

    async def detach(self) -> None:
        """Take the device down cleanly; ApiError when somebody holds it, and nothing changed."""
        async with self._operation:
            if self._life.state is DeviceState.FAILED:
                await self._revive()
            elif self._life.state not in (DeviceState.ATTACHED, DeviceState.RECOVERING):
                raise ApiError(
                    "device_state", f"device {self.name} is {self._life.state.value} now"
                )
            try:
                released = await self._detach()
            except (AttachError, *WORKER_FAULTS) as error:
                raise _api_error(error) from error
            log.info("detached", extra=fields(name=self.name, device=self._record.device))
            if released is not None:
                raise _api_error(released) from released

    async def _detach(self) -> AttachError | None:
        attachment = self._run.attachment
        released: AttachError | None = None
        if attachment is not None:
            await self._quiesce(attachment)
            self._life.move(DeviceState.DRAINING)
            await self._stop_watching()
            released = await self._disconnect(attachment)
        elif self._life.state is not DeviceState.DRAINING:
            self._life.move(DeviceState.DRAINING)
        try:
            await self._close_image()
        except (ApiError, *WORKER_FAULTS) as error:
            reason = f"the image was not closed: {as_api_error(error).message}"
            self._life.move(DeviceState.FAILED, reason)
            raise
        self._release_owner()
        remove_directory(self._directory)
        self._life.move(DeviceState.CLOSED)
        return released

    async def _quiesce(self, attachment: Attachment) -> None:
        """Keep others out, then move every byte from the kernel's caches to the image."""
        await attachment.lock()
        try:
            await self._unless_failed(attachment.sync())
            # The worker may be replaced in between; its successor has everything as well.
            with contextlib.suppress(WorkerLost):
                limit = self._services.config.limits.worker_timeout
                await self._opened.worker.request("flush", timeout=limit)
        except BaseException:
            await attachment.unlock()
            raise

    async def _disconnect(self, attachment: Attachment) -> AttachError | None:
        """Let the kernel drop the device; a slow release is reported, not undone."""
        try:
            await attachment.disconnect(self._services.config.limits.release_timeout)
        except AttachError as error:
            if error.code != "device_not_released":
                self._life.move(DeviceState.FAILED, error.message)
                raise
            self._run.attachment = None
            return error
        self._run.attachment = None
        self._run.connections = set()
        return None

    async def _close_image(self) -> None:
        """Stop the worker cleanly; if it dies over it, a successor does what is left."""
        limit = self._services.config.limits.worker_timeout
        while self._run.image_is_open:
            if self._run.opened is None:
                self.counters.restarts += 1
                await self._open(takeover=True)
            try:
                await supervise.stop_worker(self._opened.worker, limit)
                self._run.image_is_open = False
            except WorkerLost:
                await supervise.make_gone(self._opened.worker)
                if not self._restarts.take():
                    raise
            self._run.opened = None

    def _release_owner(self) -> None:
        if self._run.owner_fd >= 0:
            os.close(self._run.owner_fd)
            self._run.owner_fd = -1

    # Supervision

    async def _watch(self) -> None:
        """Follow the worker's events; replace it when it dies, its connections when they do."""
        try:
            while self._life.state in (DeviceState.ATTACHED, DeviceState.RECOVERING):
                event = await self._opened.worker.events.get()
                match event.get("event"):
                    case "channel_closed":
                        await self._recover()
                    case "connection_closed":
                        await self._connection_closed(event.get("connection"))
                    case other:
                        log.info(
                            "worker event",
                            extra=fields(name=self.name, event=other, **_flat(event)),
                        )
        except Exception as error:  # a defect here must not leave the device unwatched in silence
            log.exception("watching failed", extra=fields(name=self.name))
            if self._life.state in (DeviceState.ATTACHED, DeviceState.RECOVERING):
                self._life.move(DeviceState.FAILED, f"fvdd failed to watch the worker: {error}")

    async def _recover(self) -> None:
        """Replace a dead worker; the kernel holds requests back until the successor serves."""
        begin = asyncio.get_running_loop().time()
        reason = "the worker died"
        if self._run.opened is not None:
            reason = f"the worker process {self._run.opened.worker.pid} died"
        self._run.connections = set()
        self._life.move(DeviceState.RECOVERING, reason)
        for attempt in range(self._services.config.restarts.count_max + 1):
            if not self._restarts.take():
                break
            await asyncio.sleep(RETRY_DELAYS[min(attempt, len(RETRY_DELAYS) - 1)])
            try:
                if self._run.opened is not None:
                    await supervise.make_gone(self._run.opened.worker)
                    self._run.opened = None
                await self._open(takeover=True)
                await self._reconnect(self._record.request.connections)
            except (ApiError, AttachError, *WORKER_FAULTS) as error:
                reason = _api_error(error).message
                log.error(
                    "recovery failed", extra=fields(name=self.name, attempt=attempt, reason=reason)
                )
                if not self._attachment.exists():
                    break
                continue
            self.counters.restarts += 1
            self.counters.stalled_seconds += asyncio.get_running_loop().time() - begin
            self._life.move(DeviceState.ATTACHED)
            return
        self._life.move(DeviceState.FAILED, self._why_given_up(reason))

    def _why_given_up(self, reason: str) -> str:
        if not self._attachment.exists():
            return f"{self._attachment.device} was disconnected by somebody else"
        limits = self._services.config.restarts
        return (
            f"{reason}; after {limits.count_max} restarts within {limits.window:g} s no more "
            "are tried"
        )

    async def _reconnect(self, count: int) -> None:
        """Serve fresh connections and give them to the kernel in place of dead ones."""
        limit = self._services.config.limits.worker_timeout
        numbers, ends = await supervise.serve_sockets(self._opened.worker, count, limit)
        try:
            # Before it has noticed, the kernel would take the sockets for surplus and drop them.
            await self._attachment.wait_dead(count, DEATH_NOTICE_SECONDS)
            await self._attachment.reconnect(ends)
        finally:
            supervise.close_sockets(ends)
        self._run.connections.update(numbers)

    async def _connection_closed(self, number: object) -> None:
        """One connection ended while the worker lives: the kernel cut it off, or dropped it."""
        if not isinstance(number, int) or number not in self._run.connections:
            return
        self._run.connections.discard(number)
        log.warning("connection closed", extra=fields(name=self.name, connection=number))
        if not self._replacements.take():
            self._life.move(
                DeviceState.FAILED, "its connections are closed again and again by the kernel"
            )
            return
        try:
            await self._reconnect(1)
            self.counters.reconnects += 1
        except WorkerLost:
            return  # The next event says so, and the worker is replaced.
        except (ApiError, AttachError, *WORKER_FAULTS) as error:
            reason = _api_error(error).message
            if self._run.connections and self._attachment.exists():
                log.error("a connection is lost: %s", reason, extra=fields(name=self.name))
            else:
                self._life.move(DeviceState.FAILED, reason)

    async def _revive(self) -> None:
        """Bring a failed device back for a detach: one more try, with a fresh budget."""
        await self._stop_watching()
        self._restarts.reset()
        self._replacements.reset()
        if self._run.attachment is None:
            return
        if not self._run.attachment.exists():
            # Somebody else took the kernel device down: what is left is to close the image.
            await self._run.attachment.abandon()
            self._run.attachment = None
            return
        await self._recover()
        if self._life.state is not DeviceState.ATTACHED:
            raise ApiError(
                "device_failed",
                f"device {self.name} has no working worker: {self._life.reason}",
                hint="its live state is kept; remove the cause, then detach again",
            )
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def _unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what needs a worker; give up when the device has failed for good meanwhile."""
        task = asyncio.ensure_future(work)
        watching = self._watching
        others = {watching} if watching is not None else set()
        try:
            await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and self._life.state is not DeviceState.FAILED:
                await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise ApiError("device_failed", f"device {self.name} failed: {self._life.reason}")
        await task

    async def _stop_watching(self) -> None:
        if self._watching is not None:
            watching, self._watching = self._watching, None
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    # Questions

    async def status(self) -> DeviceStatus:
        """Ask the worker; without one, what is known."""
        opened = self._run.opened
        if opened is not None and self._life.state is not DeviceState.OPENING:
            with contextlib.suppress(*WORKER_FAULTS):
                self._run.last_status = await opened.worker.request(
                    "status", timeout=STATUS_LIMIT_SECONDS
                )
        return render_status(self)

    async def prefetch(self, action: str) -> None:
        """Start or pause the background copy."""
        opened = self._run.opened
        if opened is None or self._life.state is not DeviceState.ATTACHED:
            raise ApiError("device_state", f"device {self.name} is {self._life.state.value} now")
        limit = self._services.config.limits.worker_timeout
        try:
            await opened.worker.request("prefetch", action=action, timeout=limit)
        except WORKER_FAULTS as error:
            raise as_api_error(error) from error

    async def leave(self) -> None:
        """Let go of the device without touching it: fvdd ends, the worker goes on."""
        await self._stop_watching()
        if self._run.opened is not None:
            await self._run.opened.worker.close()
        if self._run.attachment is not None:
            await self._run.attachment.abandon()
        self._release_owner()

    # Inside

    @property
    def opened(self) -> Opened | None:
        return self._run.opened

    @property
    def _image(self) -> str:
        return self._record.request.image

    @property
    def _opened(self) -> Opened:
        if self._run.opened is None:
            raise ApiError("device_failed", f"device {self.name} has no worker")
        return self._run.opened

    @property
    def _attachment(self) -> Attachment:
        if self._run.attachment is None:
            raise ApiError("device_failed", f"device {self.name} has no kernel device")
        return self._run.attachment

    def _update_record(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        store_record(self._directory, self._record)


def _api_error(error: BaseException) -> ApiError:
    if isinstance(error, AttachError):
        return ApiError(error.code, error.message, hint=error.hint)
    if isinstance(error, EngineError):
        details = {key: str(value) for key, value in error.details.items()}
        return ApiError(error.code, error.message, hint=error.hint, details=details)
    return as_api_error(error)


def _flat(event: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in event.items() if key != "event"}
