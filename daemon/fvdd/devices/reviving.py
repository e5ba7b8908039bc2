# SPDX-License-Identifier: Apache-2.0
"""What is done only when somebody asks for it: go on with an image that was moved, or without what
was not flushed.

A failed flush is kept for good, because the kernel has forgotten which pages it dropped. Starting
over ends that: a new worker opens the image as after a power cut, so what was acknowledged after
the last flush that succeeded may be lost. A file system that is mounted would not learn of it (its
next flush succeeds); so nobody may use the device meanwhile.
"""

from __future__ import annotations

import os
import uuid

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState
from fvdd.attach.threads import run_blocking
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, to_api_error
from fvdengine import paths
from fvdengine.chain import read_header
from fvdengine.live import LIVE_NAME


def check_recoverable(session: Session, fault: int, *, discard_unflushed: bool) -> None:
    """ApiError unless the device has failed, or its image has stopped with the errno `fault` and
    what is not flushed is given up."""
    name, state = session.name, session.life.state
    if state is DeviceState.FAILED:
        if discard_unflushed:
            _check_device(session)
        return
    if state is not DeviceState.ATTACHED or fault == 0:
        raise ApiError(
            "device_state",
            f"device {name} is {state.value}: only a failed device, or one whose image has "
            "stopped at an I/O error, can be recovered",
        )
    if not discard_unflushed:
        raise ApiError(
            "device_state",
            f"the image of device {name} has stopped: {os.strerror(fault)}. What was written "
            "after the last flush that succeeded may be lost",
            hint="remove the cause, end what uses the device, then give that up with "
            f"fvdctl recover {name} --discard-unflushed, and check the file system",
        )


def _check_device(session: Session) -> None:
    name = session.name
    if session.attachment is None:
        raise ApiError(
            "device_state",
            f"what is left of device {name} was not found yet ({session.life.reason})",
            hint=f"remove the cause, then first: fvdctl recover {name}",
        )
    if not session.attachment.exists():
        raise ApiError(
            "device_state",
            f"device {name} is gone from the kernel: nobody uses it, and nothing need be lost",
            hint=f"fvdctl detach {name}, then attach the image again",
        )


async def move_to(session: Session, image: str) -> None:
    """Let the device be on the file `image` from now on. ApiError: it is no such image."""
    try:
        found = await run_blocking(lambda: _uuid_of(image))
    except (*SESSION_FAULTS, OSError) as error:
        raise to_api_error(error) from error
    known = session.record.image_uuid
    if found is not None and known is not None and uuid.UUID(known) != found:
        raise ApiError(
            "invalid_request",
            f"{image} is another image than that of device {session.name}",
            hint="name the file to which it was moved",
        )
    # The descriptor that is held leads to the old file, and its number would lead back to it.
    session.release_owner()
    request = session.record.request.model_copy(update={"image": image})
    session.update_record(request=request, image_id=None)


def _uuid_of(image: str) -> uuid.UUID | None:
    fd = paths.open_file(image)
    try:
        extension = read_header(fd, image).trusted_extension
    finally:
        os.close(fd)
    return uuid.UUID(bytes=extension.image_uuid) if extension is not None else None


async def start_over(session: Session, recovery: Recovery, reason: str) -> None:
    """Let a new worker open the image as after a power cut: what was written after the last flush
    that succeeded is given up, and with it the fault. ATTACHED, or FAILED with the reason.

    ApiError: somebody uses the device, and nothing has changed."""
    async with session.unused():
        await recovery.stop()
        await _start_over(session, recovery, reason)


async def _start_over(session: Session, recovery: Recovery, reason: str) -> None:
    life = session.life
    life.move(DeviceState.RECOVERING, reason)
    session.restarts.reset()
    session.replacements.reset()
    try:
        await session.drop_worker()
        await session.lock_owner()
        if session.record.image_id is None:  # moved; the state of the other file is given up, too
            (session.directory / LIVE_NAME).unlink(missing_ok=True)
        await session.open(takeover=False, discard=True)
        await session.restore_prefetch()
        await session.reconnect(session.record.request.connections)
    except SESSION_FAULTS as error:
        life.move(DeviceState.FAILED, to_api_error(error).message)
        return
    life.move(DeviceState.ATTACHED)
    recovery.start()
