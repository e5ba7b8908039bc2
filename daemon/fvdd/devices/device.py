# SPDX-License-Identifier: Apache-2.0
"""One device: an image in a worker, a kernel attachment, and the state between them.

Attaching and detaching are sequences of steps, each of which can be undone; the order is what
keeps data safe:

- the owner lock is taken first and given back last, so nobody else opens the image in between;
- the live directory exists before the worker, and is removed only after the image was closed clean;
- the kernel's sockets are served before the kernel gets them;
- on detach the node is held exclusively before anything is flushed, and the worker is stopped after
  the kernel has let go.

One operation at a time; what happens by itself (a worker that dies) is `recovery`'s, which detach
ends only when nothing needs the worker's answers any more. What an earlier fvdd left, and what has
failed, is brought back by `adoption`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, DeviceStatus, RecoverRequest
from fvdd.attach.attachment import AttachError, Attachment
from fvdd.attach.threads import run_blocking
from fvdd.devices.adoption import adopt
from fvdd.devices.backup import Backup
from fvdd.devices.giving_up import give_up, is_given_up, what_is_kept
from fvdd.devices.handing_over import refuse_while_full
from fvdd.devices.leftovers import Leftover, find_leftovers, remove_leftover
from fvdd.devices.maps import Maps
from fvdd.devices.read_only import set_read_only
from fvdd.devices.record import DeviceRecord
from fvdd.devices.recovery import Recovery
from fvdd.devices.rendering import render_status
from fvdd.devices.resizing import Resized, follow_later, resize, update
from fvdd.devices.reviving import (
    check_image,
    check_recoverable,
    lost_terms,
    move_to,
    start_over,
    terms,
)
from fvdd.devices.session import (
    SESSION_FAULTS,
    Counters,
    Services,
    Session,
    gather_quietly,
    to_api_error,
)
from fvdd.devices.snapshot import snapshot
from fvdd.devices.states import Life
from fvdd.devices.supervise import WORKER_FAULTS, Opened, as_api_error
from fvdd.devices.troubles import base_is_down, page_of
from fvdd.devices.upgrade import Upgrade, upgrade
from fvdd.devices.whereabouts import look
from fvdd.log import fields
from fvdd.worker.client import WorkerLost

log = logging.getLogger("fvdd.devices")

MAP_LIMIT_SECONDS: Final = 10.0
# The worker may ask a base that does not answer, and a picture is not worth the wait.
MAP_WITHOUT_BASE_SECONDS: Final = 2.0


class Device:
    """One attached image."""

    def __init__(
        self,
        services: Services,
        record: DeviceRecord,
        directory: Path,
        state: DeviceState = DeviceState.OPENING,
    ) -> None:
        self._life = Life(record.name, state)
        self._session = Session(services, record, directory, self._life)
        self._session.has_directory = state is DeviceState.ORPHANED
        self._recovery = Recovery(self._session)
        self._operation = asyncio.Lock()
        self._recovery.on_recovered = self._recovered
        self._following: asyncio.Task[None] | None = None
        self._backup = Backup(self._session, self._recovery, self._operation)
        self._maps = Maps(lambda cells: self._look("map", cells=cells))

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def state(self) -> DeviceState:
        return self._life.state

    @property
    def reason(self) -> str | None:
        return self._life.reason

    @property
    def silent_seconds(self) -> float:
        """For how long the worker has not answered, although it was asked."""
        asked = self._session.asked_at
        return time.monotonic() - asked if asked is not None else 0.0

    @property
    def stalled_seconds(self) -> float:
        """How long nobody has served it so far, this moment included."""
        return self._life.stalled_seconds

    @property
    def record(self) -> DeviceRecord:
        return self._session.record

    @property
    def directory(self) -> Path:
        return self._session.directory

    @property
    def counters(self) -> Counters:
        return self._session.counters

    @property
    def opened(self) -> Opened | None:
        return self._session.opened

    @property
    def worker_pid(self) -> int | None:
        opened = self._session.opened
        return opened.worker.pid if opened is not None and opened.worker.is_running else None

    @property
    def connections_alive(self) -> int:
        return len(self._session.connections)

    @property
    def failures(self) -> Mapping[str, Mapping[str, object]]:
        """What failed last: of "request" and "base", the event that told it."""
        return self._session.failures

    @property
    def last_status(self) -> dict[str, Any]:
        """What the worker said when it was asked last."""
        return self._session.last_status

    # Attach

    async def attach(self) -> None:
        """Bring the device up; on failure everything done so far is undone and ApiError raised."""
        async with self._operation:
            try:
                await self._bring_up()
            except SESSION_FAULTS as error:
                await self._take_down()
                raise to_api_error(error) from error
            except BaseException:
                await asyncio.shield(self._take_down())
                raise
            log.info(
                "attached",
                extra=fields(
                    name=self.name, device=self.record.device, image=self.record.request.image
                ),
            )

    async def _bring_up(self) -> None:
        session = self._session
        await session.lock_owner()
        session.make_directory()
        await session.open(takeover=False, discard=await is_given_up(session))
        self._check_size(session.worker().size_bytes)
        self._life.move(DeviceState.READY)
        await session.connect()
        self._life.move(DeviceState.ATTACHED)
        # From here on a dying worker is replaced: reading the partition table needs one.
        self._recovery.start()
        limit = session.config.limits.ready_timeout
        await self._unless_failed(session.kernel().ready(self.record.request.wait, limit))

    def _check_size(self, size: int) -> None:
        sector = self.record.request.sector_size
        if size <= 0 or size % sector != 0:
            raise ApiError(
                "invalid_size",
                f"the image's size of {size} bytes is not a multiple of the sector size {sector}",
                hint="attach with --sector-size 512" if sector != 512 else "resize the image",
            )

    async def _take_down(self) -> None:
        """Undo a failed attach, last step first. What cannot be undone safely is kept."""
        await self._recovery.stop()
        session = self._session
        attachment, session.attachment = session.attachment, None
        if attachment is not None:
            session.update_record(wanted="detached")
            try:
                await attachment.disconnect(session.config.limits.release_timeout)
            except AttachError as error:
                log.error("undoing the attach: %s", error, extra=fields(name=self.name))
                await attachment.abandon()
        clean = True
        if self._life.state is not DeviceState.OPENING:
            self._life.move(DeviceState.DRAINING)
        if session.image_is_open:
            clean = await self._close_image_quietly()
        session.release_owner()
        if clean:
            session.forget_directory()
            self._life.move(DeviceState.CLOSED)
        else:
            self._life.move(DeviceState.FAILED, "the attach failed, and then closing the image")

    async def _close_image_quietly(self) -> bool:
        try:
            await self._session.close_image()
        except (ApiError, *WORKER_FAULTS) as error:
            reason = as_api_error(error).message
            log.error("the image was not closed: %s", reason, extra=fields(name=self.name))
            with contextlib.suppress(ApiError):
                await self._session.drop_worker()
            return False
        return True

    # Detach

    async def detach(self, *, discard_unflushed: bool = False) -> bool:
        """Take the device down cleanly; ApiError when somebody holds it, and nothing changed.

        `discard_unflushed`: one that has failed and cannot be brought back is taken down all the
        same, without its image. Whether that was done.
        """
        async with self._operation:
            self._session.check_directory()
            must_revive = self._life.state is DeviceState.FAILED
            was_given_up = False
            try:
                released = await self._detach_clean(1 if discard_unflushed else None)
            except ApiError as error:
                if self.state is not DeviceState.FAILED:
                    raise
                if not (must_revive and discard_unflushed):
                    hint = "; ".join(filter(None, (error.hint, what_is_kept(self._session))))
                    raise ApiError(
                        error.code, error.message, hint=hint, details=error.details
                    ) from error
                log.warning("%s", error, extra=fields(name=self.name))
                released = await give_up(self._session, self._recovery)
                was_given_up = True
            log.info("detached", extra=fields(name=self.name, device=self.record.device))
            if released is not None:
                raise to_api_error(released) from released
            return was_given_up

    async def _detach_clean(self, tries: int | None) -> AttachError | None:
        if self._life.state is DeviceState.FAILED:
            await self._revive(tries)
            if self.state is DeviceState.CLOSED:
                return None
        elif self._life.state not in (DeviceState.ATTACHED, DeviceState.RECOVERING):
            raise ApiError("device_state", f"device {self.name} is {self._life.state.value} now")
        try:
            return await self._detach()
        except (AttachError, *WORKER_FAULTS) as error:
            raise to_api_error(error) from error

    async def _detach(self) -> AttachError | None:
        session = self._session
        released: AttachError | None = None
        if session.attachment is not None:
            await refuse_while_full(self._session, "detach again")
            await self._quiesce(session.attachment)
            self._life.move(DeviceState.DRAINING)
            await self._recovery.stop()
            session.update_record(wanted="detached")
            released = await self._disconnect(session.attachment)
        elif self._life.state is not DeviceState.DRAINING:
            self._life.move(DeviceState.DRAINING)
        try:
            await session.close_image()
        except (ApiError, *WORKER_FAULTS) as error:
            reason = f"the image was not closed: {as_api_error(error).message}"
            self._life.move(DeviceState.FAILED, reason)
            raise
        session.release_owner()
        session.forget_directory()
        self._life.move(DeviceState.CLOSED)
        return released

    async def _quiesce(self, attachment: Attachment) -> None:
        """Keep others out, then move every byte from the kernel's caches to the image."""
        await attachment.lock()
        try:
            await self._unless_failed(attachment.sync())
            # The worker may be replaced in between; its successor has everything as well.
            with contextlib.suppress(WorkerLost):
                session = self._session
                await session.worker().worker.request("flush", timeout=session.worker_limit)
        except BaseException:
            await attachment.unlock()
            raise

    async def _disconnect(self, attachment: Attachment) -> AttachError | None:
        """Let the kernel drop the device; a slow release is reported, not undone."""
        session = self._session
        try:
            await attachment.disconnect(session.config.limits.release_timeout)
        except AttachError as error:
            if error.code != "device_not_released":
                self._life.move(DeviceState.FAILED, error.message)
                raise
            session.attachment = None
            return error
        session.attachment = None
        session.connections = set()
        return None

    # Coming back

    async def adopt(self) -> None:
        """Take over what an earlier fvdd left; how that went is in the state."""
        async with self._operation:
            await adopt(self._session, self._recovery, "fvdd was started anew")
            self._recovered()

    async def recover(self, asked: RecoverRequest) -> None:
        """Bring a failed device back to life; also one whose image has stopped at an I/O error,
        where what is not flushed is given up."""
        image, discard_unflushed = asked.image, asked.discard_unflushed
        async with self._operation:
            fault = (await self.status()).fault_errno
            check_recoverable(self._session, fault, discard_unflushed=discard_unflushed)
            if image is not None and self.state is not DeviceState.FAILED:
                raise ApiError(
                    "device_state",
                    f"device {self.name} has its image open",
                    hint="leave out --image",
                )
            if image is not None:
                await check_image(self._session, image)
            await self._recover_by(asked)
            if self.state is DeviceState.CLOSED:  # of a detach that was broken off
                return
            if self.state is not DeviceState.ATTACHED:
                raise ApiError(
                    "device_failed",
                    f"device {self.name} cannot be recovered: {self._life.reason}",
                    hint=lost_terms(self.record) or "remove the cause, then try again",
                )
            self._recovered()

    async def _recover_by(self, asked: RecoverRequest) -> None:
        """Bring it back; what is asked for is kept only where that succeeds."""
        session, before, reason = self._session, self.record, "recovery was asked for"
        changes = terms(before, asked, session.config)
        is_back = False
        try:
            if changes:
                session.update_record(**changes)
            if asked.discard_unflushed:
                await start_over(session, self._recovery, reason, asked.image)
            else:
                await self._adopt_again(reason, asked.image)
            is_back = self.state is not DeviceState.FAILED
        finally:
            if changes and not is_back:
                session.update_record(**{name: getattr(before, name) for name in changes})

    async def _adopt_again(self, reason: str, image: str | None) -> None:
        before = self.record
        try:
            if image is not None:
                move_to(self._session, image)
            await adopt(self._session, self._recovery, reason)
        finally:
            if image is not None and self.state is DeviceState.FAILED:  # the wrong one, maybe
                self._session.update_record(request=before.request, image_id=before.image_id)

    async def upgrade(self) -> Upgrade:
        """Replace the worker by one of the installed version, without a reconnect."""
        async with self._operation:
            self._session.check_attached()
            return await upgrade(self._session, self._recovery)

    async def snapshot(self, target: str) -> tuple[float, str]:
        """Continue on the new image `target` over the present one: the seconds of the pause, and
        the image that is the base now."""
        async with self._operation:
            self._session.check_attached()
            await self._backup.check_whole()
            return await snapshot(self._session, self._recovery, target)

    async def resize(self, size: str) -> Resized:
        """Grow the image, and let the kernel's device follow; `size` is [+]SIZE."""
        async with self._operation:
            return await resize(self._session, self._recovery, size)

    async def update(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """Change how the image is run: what the worker says has changed."""
        async with self._operation:
            await self._backup.check_whole()
            return await update(self._session, fields)

    def _recovered(self) -> None:
        """Finish a resize that was broken off, once nothing else is under way."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(
                follow_later(self._session, self._recovery, self._operation),
                name=f"follow {self.name}",
            )

    async def set_read_only(self, wanted: bool) -> None:
        """Make the device read-only or writable while it stays attached and nobody uses it."""
        async with self._operation:
            self._session.check_attached()
            self._backup.check_none()
            await set_read_only(self._session, self._recovery, wanted)

    async def backup(self, target: str) -> tuple[int, list[float]]:
        """Copy the disk as it is at one moment to a file: bytes, and the seconds of the pauses."""
        return await self._backup.run(target)

    def end_backup(self) -> None:
        """fvdd is about to stop."""
        self._backup.end()

    async def backup_leftover(self) -> tuple[str, str] | None:
        """What a backup that was broken off left beside the image, and how that is undone."""
        return await self._backup.leftover()

    async def leftovers(self, *, remove: bool = False) -> list[Leftover]:
        """Files that operations left which were broken off; with `remove`, those that went."""
        if self._operation.locked() or self._backup.is_running:
            return []  # what lies there may be in use
        async with self._operation:
            image, record = self.record.request.image, self.record
            try:
                found = await look(
                    image,
                    lambda: find_leftovers(self.directory, image, record.begun, record.part),
                )
            except ApiError:  # a store that does not answer holds up nothing else
                return []
            if not remove:
                return found
            # To its end: what would go later may be in use again by then.
            return await run_blocking(lambda: [one for one in found if remove_leftover(one)])

    async def _revive(self, tries: int | None) -> None:
        """Bring a failed device back for a detach: one more try, with a fresh budget."""
        session = self._session
        await self._recovery.stop()
        session.restarts.reset(tries)
        session.replacements.reset()
        if session.attachment is None and session.record.index is None:
            return
        if session.attachment is not None and not session.attachment.exists():
            # Somebody else took the kernel device down: what is left is to close the image.
            await session.attachment.abandon()
            session.attachment = None
        if session.attachment is None:
            session.update_record(wanted="detached")
        await adopt(session, self._recovery, "it is to be detached", tries)
        if self._life.state not in (DeviceState.ATTACHED, DeviceState.CLOSED):
            raise ApiError(
                "device_failed",
                f"device {self.name} has no working worker: {self._life.reason}",
            )

    async def _unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what needs a worker; give up when the device has failed for good meanwhile."""
        task = asyncio.ensure_future(work)
        watching = self._recovery.watching
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

    # Questions

    async def status(self) -> DeviceStatus:
        """Ask the worker; without one, what is known."""
        await self._session.refresh_status()
        return render_status(self)

    async def map(self, cells: int, *, is_observed: bool = False) -> dict[str, Any]:
        """Where the parts of the disk are, as the worker finds it."""
        return await self._maps.map(cells, is_observed=is_observed)

    async def extents(self, offset: int) -> dict[str, Any]:
        """The extents of the disk from `offset` on, as many as the worker tells at once."""
        return await self._look("extents", offset=offset)

    async def _look(self, op: str, **arguments: Any) -> dict[str, Any]:
        opened = self._working()
        is_slow = op == "map" and (page := page_of(self)) is not None and base_is_down(page)
        limit = MAP_WITHOUT_BASE_SECONDS if is_slow else MAP_LIMIT_SECONDS
        try:
            return await opened.worker.request(op, timeout=limit, **arguments)
        except WORKER_FAULTS as error:
            raise as_api_error(error) from error

    async def prefetch(self, action: str) -> None:
        """Start or pause the background copy."""
        async with self._operation:
            if action == "start":
                await self._backup.check_whole()
            opened = self._working()
            limit = self._session.worker_limit
            with self._noted(prefetch=action):
                await opened.worker.request("prefetch", action=action, timeout=limit)

    async def set_policy(self, policy: str) -> None:
        """Let the background copy behave so from now on, in successors of the worker, too."""
        async with self._operation:
            await self._backup.check_whole()
            request = self.record.request.model_copy(update={"prefetch_policy": policy})
            with self._noted(request=request):
                await self._control_prefetch(policy=policy)

    @contextlib.contextmanager
    def _noted(self, **changes: object) -> Iterator[None]:
        """Let the record say what the worker is told, for its successors; ApiError: neither."""
        before = {key: getattr(self.record, key) for key in changes}
        try:
            self._session.update_record(required=True, **changes)
            yield
        except SESSION_FAULTS as error:
            self._session.update_record(**before)
            raise to_api_error(error) from error

    async def set_budget(self, rate: int) -> None:
        """This device's part of the host's budget, in bytes a second; 0: no limit."""
        await self._control_prefetch(budget=rate)

    async def _control_prefetch(self, **values: Any) -> None:
        opened, limit = self._working(), self._session.worker_limit
        try:
            await opened.worker.request("prefetch", action="control", timeout=limit, **values)
        except WORKER_FAULTS as error:
            raise as_api_error(error) from error

    async def trace(self, seconds: float) -> int:
        """Let the worker write what it does into a pipe; its reading end, which is the caller's."""
        opened = self._working()
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            limit = self._session.worker_limit
            await opened.worker.request("trace", [theirs], seconds=seconds, timeout=limit)
        except WORKER_FAULTS as error:
            os.close(ours)
            raise as_api_error(error) from error
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def _working(self) -> Opened:
        """The worker of a device that is attached; ApiError when it is not."""
        self._session.check_attached()
        return self._session.worker()

    async def leave(self) -> None:
        """Let go of the device without touching it: fvdd ends, the worker goes on."""
        if self._following is not None:
            await gather_quietly(self._following)
        await self._recovery.stop()
        await self._session.leave()
