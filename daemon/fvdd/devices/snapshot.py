# SPDX-License-Identifier: Apache-2.0
"""Put a new image over the one that a device is on: the old image stays as it was, as its base.

    the new image is made over the old one, and owned                       no pause yet
  > successor is started and loads everything, the old worker flushes
  > the old worker stops between two messages and gives its sockets away    the pause
  > the old worker closes the old image clean and ends
  > the old image is what the new one was made over
  > the record is renamed into place: the commit point
  > the successor opens the new image and goes on with the sockets

No write is lost or reordered: whatever was answered before is in the old image, everything after
goes to the new one, which is run as the old one was. Whoever dies at whatever moment: the record
says which image the device is on, that image is clean or has live state, and recovery or adoption
opens it. A new image that was made, but not committed to, is an unused file.

The storage of the new image may hang. It is asked by a process of its own first, so that fvdd can
end however long that waits; and all that may wait for it is done while the device serves, but for a
last look at the name, which is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.threads import run_blocking
from fvdd.devices import supervise, whereabouts
from fvdd.devices.handing_over import (
    check_openable,
    handed_over,
    is_refusal,
    refuse_while_full,
    room_reserved,
)
from fvdd.devices.new_file import check_new_name
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import (
    SESSION_FAULTS,
    Session,
    to_api_error,
)
from fvdd.devices.supervise import Worker
from fvdd.devices.troubles import fault_in
from fvdd.devices.upgrade import prepare
from fvdd.devices.whereabouts import check_name, file_id, hangs, has_name, id_of, look
from fvdd.log import fields
from fvdengine import patience
from fvdengine.create import create_over, is_as_created
from fvdengine.header import Header
from fvdengine.new_files import unlink_if
from fvdengine.opening import check_direct, keep_owner
from fvdengine.options import CreateOptions
from fvdengine.overlay import header_of, session_in

log = logging.getLogger("fvdd.devices")

# Storage that is busy writes an image in seconds; the device serves meanwhile.
MAKE_LIMIT_SECONDS: Final = 30.0

# Changes which image the record names, or what lies under that name; or says why it cannot.
Change = Callable[[], Awaitable[ApiError | None]]


async def snapshot(session: Session, recovery: Recovery, target: str) -> tuple[float, str]:
    """Go on with the new image `target`; the seconds of the pause, and the old image. ApiError:
    nothing changed, or the device goes on with the old image."""
    # The record names it for later openings, which resolve links: so does the making.
    folder, name = os.path.split(target)
    await check_answers(target)
    target = os.path.join(await look(target, lambda: os.path.realpath(folder)), name)
    await _check(session, target)
    base = session.record.request.image
    try:
        made = await _made(session, target)
        try:
            pause = await continue_on(session, recovery, lambda: _change_image(session, made))
        except Exception:
            await _discard(session, made)
            raise
    except ApiError as error:
        raise not_made(session, target, error) from error
    log.info("snapshot", extra=fields(name=session.name, image=target, seconds=round(pause, 4)))
    return pause, base


def not_made(session: Session, target: str, error: ApiError) -> ApiError:
    """That a new file does not exist because of `error`, and that the device is what it was."""
    if session.life.state is DeviceState.FAILED:
        return error  # which says that
    hint = error.hint
    if fault_in(session.directory):
        hint = (
            "its image has stopped at an I/O error: remove the cause, end what uses the device, "
            f"then: fvdctl recover {session.name} --discard-unflushed"
        )
    elif error.code == "worker_failed":
        hint = "try again; fvdd's log has the last words of the worker"
    return ApiError(
        error.code,
        f"{target} was not made: {error.message}; {session.name} goes on as before, with "
        f"{session.record.request.image}",
        hint=hint or "try again",
        details=error.details,
    )


async def continue_on(session: Session, recovery: Recovery, change: Change) -> float:
    """Let the device continue on another image, that `change` puts in place of the present one
    while that is closed, or on the same one where `change` says why it did nothing; the seconds
    of the pause. ApiError: nothing changed, or the device goes on with the old image."""
    session.check_directory()
    await session.follow_image()
    async with room_reserved(session):
        return await _continue_on(session, recovery, change)


async def _continue_on(session: Session, recovery: Recovery, change: Change) -> float:
    try:
        await check_openable(session)
        new = await supervise.start_worker(session.services.spawn, str(session.directory))
        await prepare(session, new)
        try:
            await session.worker().worker.request("flush", timeout=session.worker_limit)
        except BaseException:
            await asyncio.shield(supervise.make_gone(new))
            raise
    except SESSION_FAULTS as error:
        raise to_api_error(error) from error
    await recovery.stop()
    begin = asyncio.get_running_loop().time()
    try:
        await _move(session, recovery, new, change)
    finally:
        session.release_shared()
        recovery.start()
    pause = asyncio.get_running_loop().time() - begin
    session.counters.last_pause_seconds = pause
    return pause


async def check_answers(target: str) -> None:
    """ApiError where the storage of a new file does not answer. fvdd itself does not wait for it:
    a process with a thread there could not end."""
    folder = os.path.dirname(target)
    if not await run_blocking(lambda: patience.changes(folder, whereabouts.LOOK_LIMIT_SECONDS)):
        raise hangs(target)


async def _check(session: Session, target: str) -> None:
    await session.follow_image()  # what has its name now may be another file
    image = session.record.request.image
    if session.record.request.read_only:
        raise ApiError(
            "invalid_request",
            f"device {session.name} is read-only: there is nothing to keep apart",
            hint=f"make a clone instead: fvdctl create {target} --base {image}",
        )
    if not await has_name(session.record):
        raise ApiError(
            "invalid_request",
            f"the image of {session.name} has no name any more, it was deleted: a new one over it "
            "would have no base",
            hint=f"save the disk, as long as it is attached: fvdctl backup {session.name} FILE",
        )
    await refuse_while_full(session, "try again")  # which have no space for a new image either
    await look(target, lambda: check_new_name(target))


async def _move(session: Session, recovery: Recovery, new: Worker, change: Change) -> None:
    old = session.worker().worker
    is_changed = False
    failure: ApiError | None = None
    try:
        async with handed_over(session, old) as parted:
            await supervise.stop_worker(old, session.worker_limit)
            session.opened = None
            failure = await change()
            is_changed = failure is None
            await session.follow_image()
            session.opened = await supervise.open_in(
                new, session.opening(takeover=False), session.worker_limit
            )
            await parted.resume(new)
            await session.note_opened()
            await session.restore_prefetch()
    except SESSION_FAULTS as error:
        await asyncio.shield(supervise.make_gone(new))
        if is_refusal(error):
            raise to_api_error(error) from error
        reason = to_api_error(error).message
        log.error("changing the image failed: %s", reason, extra=fields(name=session.name))
        failure = failure if is_changed else to_api_error(error)
        await recovery.recover("its image is being changed")
    if session.life.state is not DeviceState.ATTACHED:
        raise ApiError(
            "device_failed",
            f"device {session.name} could not be served again: {session.life.reason}",
            hint=f"remove the cause, then: fvdctl recover {session.name}",
        )
    if failure is not None:
        raise failure


@dataclass(slots=True)
class _Made:
    """A new image that nobody but us has had open: what owns it, what it is, and the directory of
    the one below."""

    target: str
    owner: int
    header: Header
    folder: str
    is_committed: bool = False

    def remove(self) -> None:
        """Let go of it, and remove it where its name is still its own."""
        try:
            with contextlib.suppress(OSError):
                unlink_if(self.target, self.owner)
        finally:
            os.close(self.owner)

    @property
    def base(self) -> str:
        return os.path.join(os.path.dirname(self.target), self.header.base_img)


def _make(target: str, options: CreateOptions, *, is_direct: bool) -> _Made:
    """Make it over the base of the options, and own it from its first moment on."""
    owners: list[int] = []
    try:
        header = create_over(target, options, lambda fd: owners.append(keep_owner(fd)))
    except BaseException:
        for owner in owners:
            os.close(owner)
        raise
    made = _Made(target, owners[0], header, os.path.dirname(os.path.realpath(options.base or "")))
    try:
        if is_direct:  # else no successor could open it
            check_direct(target)
    except BaseException:
        made.remove()
        raise
    return made


def _options(session: Session) -> CreateOptions:
    return replace(session.clone_options(), like=header_of(session.record.request.image))


async def _made(session: Session, target: str) -> _Made:
    """The new image, while the device serves; ApiError: there is none. What comes of storage that
    does not answer is removed when it does."""
    is_direct = session.open_arguments(takeover=False)["cache"] == "none"
    try:
        options = await look(session.record.request.image, lambda: _options(session))
        session.update_record(begun=target)
        return await look(
            target,
            lambda: _make(target, options, is_direct=is_direct),
            limit=MAKE_LIMIT_SECONDS,
            discard=_Made.remove,
        )
    except (*SESSION_FAULTS, OSError) as error:
        failure = to_api_error(error)
        if failure.code != "storage_hangs":  # else it may come to be there
            session.update_record(begun=None)
        raise failure from error


async def _discard(session: Session, made: _Made) -> None:
    """Remove a new image that the device is not on."""
    if made.is_committed:
        return
    try:
        try:
            await check_answers(made.target)
        except ApiError:
            os.close(made.owner)  # it is durable: this does not wait
            raise
        await look(made.target, made.remove)
        session.update_record(begun=None)
    except ApiError as error:
        log.warning("%s, it may be left there", error, extra=fields(name=session.name))


async def _change_image(session: Session, made: _Made) -> ApiError | None:
    """Commit to the new image. Not possible: why, and the old one stays."""
    old = session.record
    try:
        # As a base the old image is read by everybody; nobody writes it until that is open.
        session.share_owner()
        await check_name(old)
        await _check_made(session, made)
        await check_name(old)
        allowed = (*old.request.allow_dirs, made.folder)
        request = old.request.model_copy(
            update={"image": made.target, "allow_dirs": tuple(dict.fromkeys(allowed))}
        )
        session.update_record(
            required=True, request=request, image_id=id_of(os.fstat(made.owner)), image_uuid=None,
            sessions=(session_in(made.header),), begun=None,
        )  # fmt: skip
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        await session.lock_owner()
        return to_api_error(error)
    session.owner_fd, made.is_committed = made.owner, True
    return None


async def _check_made(session: Session, made: _Made) -> None:
    """ApiError unless the new image is what would be made now, over the image that is closed."""
    target, image = made.target, session.record.request.image
    if await look(target, lambda: file_id(target)) != id_of(os.fstat(made.owner)):
        raise ApiError("device_state", f"{target} was moved or removed", hint="try again")
    base = made.base
    is_right = await look(base, lambda: file_id(base)) == session.record.image_id
    # As long as the next worker may take for the same.
    limit = session.worker_limit
    if not is_right or not await look(
        base, lambda: is_as_created(made.header, _options(session)), limit=limit
    ):
        raise ApiError(
            "device_state", f"{image} was renamed or opened anew meanwhile", hint="try again"
        )
