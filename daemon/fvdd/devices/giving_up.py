# SPDX-License-Identifier: Apache-2.0
"""Take a device down that cannot be brought back, because somebody says so: an image that is gone
for good has nobody who could close it.

  > the kernel's device is held exclusively: nobody uses it, and nobody can mount it
    the session is noted as given up
    the kernel lets go
    a worker that still lives closes the image clean; a dead or stuck one is made sure of
    the owner lock and the device's directory, with its live state, go

The image is not touched: it stays as it was last durable. It still says that it is open in this
boot, with live state, so nobody would open it without; the note lets fvdd attach it all the same,
which goes on from the journal as after a power cut. The notes lie in the state directory, and so
end with the boot, too.

Whoever dies in between: the next fvdd finds a device that is to be detached and cannot be closed,
and the same can be said again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.attachment import AttachError, Attachment, stuck
from fvdd.devices.adoption import end_worker, worker_pids
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, to_api_error
from fvdd.devices.supervise import WORKER_FAULTS, stop_worker
from fvdd.devices.whereabouts import has_name, look
from fvdd.log import fields
from fvdengine import paths
from fvdengine.chain import read_header
from fvdengine.errors import EngineError
from fvdengine.header import Extension
from fvdengine.live import LivePresence, live_presence, live_session, state_error

log = logging.getLogger("fvdd.devices")

# Notes of sessions whose live state was given up, beside the folder of the devices.
FOLDER: Final = "given-up"
# A node may wait for the driver, and who uses it is looked for among all processes.
HOLD_LIMIT_SECONDS: Final = 30.0


async def give_up(session: Session, recovery: Recovery) -> AttachError | None:
    """Take a failed device down without its image. ApiError: somebody uses it, or it cannot be
    told, and nothing has changed. What is returned is a release that takes its time."""
    await recovery.stop()
    attachment = await _find_kernel_device(session)
    released = None
    if attachment is not None:
        await _hold(attachment)
    try:
        await _note(session)
        session.life.move(DeviceState.DRAINING)
        session.update_record(wanted="detached")
        if attachment is not None:
            released = await _disconnect(session, attachment)
    except BaseException as error:
        if attachment is not None:
            await attachment.unlock()
        if session.life.state is DeviceState.DRAINING:
            session.life.move(DeviceState.FAILED, str(error))
        raise
    await _end_worker(session)
    session.release_owner()
    session.forget_directory()
    log.warning(
        "given up, with what was not flushed",
        extra=fields(name=session.name, image=session.record.request.image),
    )
    session.life.move(DeviceState.CLOSED)
    return released


async def _find_kernel_device(session: Session) -> Attachment | None:
    """The kernel's device, also where an adoption did not get as far as to look for it."""
    try:
        if session.attachment is not None and not session.attachment.exists():
            await session.attachment.abandon()
            session.attachment = None
        if session.attachment is None:
            session.attachment = await session.services.transport.adopt(
                session.spec(), session.record.index
            )
    except TimeoutError as error:
        raise to_api_error(stuck("the kernel did not say what devices it has")) from error
    except SESSION_FAULTS as error:
        raise to_api_error(error) from error
    return session.attachment


async def _hold(attachment: Attachment) -> None:
    try:
        async with asyncio.timeout(HOLD_LIMIT_SECONDS):
            await attachment.lock()
    except TimeoutError as error:
        raise ApiError(
            "timed_out",
            f"whether somebody uses {attachment.device} could not be found out in time",
            hint="end what uses it or hangs (dmesg may say), then try again",
        ) from error
    except (AttachError, OSError) as error:
        raise to_api_error(error) from error


async def _disconnect(session: Session, attachment: Attachment) -> AttachError | None:
    released = None
    try:
        await attachment.disconnect(session.config.limits.release_timeout)
    except AttachError as error:
        if error.code != "device_not_released":
            raise to_api_error(error) from error
        released = error
    session.attachment = None
    session.connections = set()
    return released


async def _end_worker(session: Session) -> None:
    """Let a worker that still answers close the image clean; else be sure that it is gone, as far
    as the kernel lets it go."""
    if session.opened is not None:
        with contextlib.suppress(*WORKER_FAULTS):
            await stop_worker(session.opened.worker, session.worker_limit)
            session.opened = None
    try:
        await session.drop_worker()
        for pid in worker_pids(session.directory):
            await end_worker(pid, session.directory)
    except ApiError as error:
        # Killed, it hangs in the kernel on storage that does not answer: when that ends it, its
        # lock on the image ends, and until then nobody can open that.
        log.error("%s", error, extra=fields(name=session.name))
        session.opened = None
    session.image_is_open = False


# Sessions that were given up


async def _note(session: Session) -> None:
    """Note that the live state of the image's session is given up; ApiError names the directory
    in which that cannot be written."""
    given_up = await _session_of(session)
    if given_up is None:
        return
    folder = _folder(session)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / given_up.hex()).touch(mode=0o600)
    except OSError as error:
        raise to_api_error(state_error(error, str(folder))) from error


async def _session_of(session: Session) -> bytes | None:
    """The session that the image says is open: by its live state, or else by the image itself,
    where that is still the device's own file."""
    found = live_session(session.directory)
    if found is not None or session.record.request.read_only:
        return found
    path = session.record.request.image
    with contextlib.suppress(ApiError, EngineError, OSError):
        if await has_name(session.record):
            extension = await look(path, lambda: extension_of(path))
            return extension.open_session if extension is not None else None
    return None


async def is_given_up(session: Session) -> bool:
    """Whether the live state of the image that is to be opened was given up."""
    folder, path = _folder(session), session.record.request.image
    if not folder.is_dir():
        return False
    try:
        extension = await look(path, lambda: extension_of(path), limit=session.worker_limit)
    except (EngineError, OSError):
        return False  # whoever opens it says what is wrong
    return extension is not None and (folder / extension.open_session.hex()).exists()


def extension_of(image: str) -> Extension | None:
    fd = paths.open_file(image)
    try:
        return read_header(fd, image).trusted_extension
    finally:
        os.close(fd)


def _folder(session: Session) -> Path:
    return session.directory.parent.parent / FOLDER


def what_is_kept(session: Session) -> str:
    """What there still is of a device that cannot be detached, and the ways out."""
    option = f"fvdctl detach {session.name} --discard-unflushed"
    match live_presence(session.directory):
        case LivePresence.FOUND:
            return (
                "its live state is kept; remove the cause, then detach again; if that cannot be, "
                f"give up the device, with what was not flushed: {option}"
            )
        case LivePresence.INVALID:
            return (
                "its live state cannot be read: what was not flushed is lost unless an fvdd of "
                f"another version knows it; give up the device: {option}"
            )
    return (
        "it has no live state (any more); remove the cause, then detach again; if that cannot be, "
        f"give up the device: {option}"
    )
