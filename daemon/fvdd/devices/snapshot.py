# SPDX-License-Identifier: Apache-2.0
"""Put a new image over the one that a device is on: the old image stays as it was, as its base.

    successor is started and loads everything, the old worker flushes       no pause yet
  > the old worker stops between two messages and gives its sockets away
  > the old worker closes the old image clean and ends
  > the new image is made over it
  > the record is renamed into place: the commit point
  > the successor opens the new image and goes on with the sockets

No write is lost or reordered: whatever was answered before is in the old image, everything after
goes to the new one, which is run as the old one was. Whoever dies at whatever moment: the record
says which image the device is on, that image is clean or has live state, and recovery or adoption
opens it. A new image that was made, but not committed to, is an unused file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.threads import run_blocking
from fvdd.devices import supervise
from fvdd.devices.handing_over import check_openable, handed_over, is_refusal
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
from fvdd.devices.whereabouts import check_name, has_name, id_of, look
from fvdd.log import fields
from fvdengine.create import create_image
from fvdengine.opening import check_direct, keep_owner
from fvdengine.overlay import header_of, session_in

log = logging.getLogger("fvdd.devices")

# Changes which image the record names, or what lies under that name; or says why it cannot.
Change = Callable[[], Awaitable[ApiError | None]]


async def snapshot(session: Session, recovery: Recovery, target: str) -> tuple[float, str]:
    """Go on with the new image `target`; the seconds of the pause, and the old image. ApiError:
    nothing changed, or the device goes on with the old image."""
    # The record names it for later openings, which resolve links: so does the making.
    folder, name = os.path.split(target)
    target = os.path.join(await look(target, lambda: os.path.realpath(folder)), name)
    await _check(session, target)
    base = session.record.request.image
    try:
        pause = await continue_on(session, recovery, lambda: _change_image(session, target))
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


@dataclass(frozen=True, slots=True)
class _Made:
    """A new image that nobody but us has had open: what owns it, its session, and the directory of
    the one below."""

    owner: int
    session: str
    folder: str

    def disown(self) -> None:
        os.close(self.owner)


def _make(target: str, session: Session) -> _Made:
    """Make it over the present image, and own it from its first moment on."""
    image = session.record.request.image
    with contextlib.ExitStack() as undo:
        owners: list[int] = []

        def own(fd: int) -> None:
            owners.append(keep_owner(fd))
            undo.callback(os.close, owners[0])

        options = replace(session.clone_options(), like=header_of(image))
        header = create_image(target, options, own).header
        folder = os.path.dirname(os.path.realpath(image))
        made = _Made(owners[0], session_in(header), folder)
        undo.pop_all()
    return made


async def _change_image(session: Session, target: str) -> ApiError | None:
    """Make the new image and commit to it. Not possible: why, and the old one stays."""
    old = session.record
    is_made, owner = False, -1
    try:
        # As a base the old image is read by everybody; nobody writes it until that is open.
        session.share_owner()
        session.update_record(begun=target)
        await check_name(old)
        made = await run_blocking(lambda: _make(target, session), discard=_Made.disown)
        is_made, owner = True, made.owner
        if session.open_arguments(takeover=False)["cache"] == "none":  # no successor could open it
            await run_blocking(lambda: check_direct(target))
        await check_name(old)
        allowed = (*old.request.allow_dirs, made.folder)
        request = old.request.model_copy(
            update={"image": target, "allow_dirs": tuple(dict.fromkeys(allowed))}
        )
        session.update_record(
            required=True, request=request, image_id=id_of(os.fstat(owner)), image_uuid=None,
            sessions=(made.session,), begun=None,
        )  # fmt: skip
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        if owner >= 0:
            os.close(owner)
        if is_made:  # what somebody else made meanwhile is not ours to remove
            with contextlib.suppress(OSError, ApiError):
                await look(target, lambda: os.unlink(target))
        await session.lock_owner()
        return to_api_error(error)
    session.owner_fd = owner
    return None
