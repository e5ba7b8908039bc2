# SPDX-License-Identifier: Apache-2.0
"""What is done only when somebody asks for it: go on with an image that was moved, or without what
was not flushed.

A failed flush is kept for good, because the kernel has forgotten which pages it dropped. Starting
over ends that: a new worker opens the image as after a power cut, so what was acknowledged after
the last flush that succeeded may be lost. A file system that is mounted would not learn of it (its
next flush succeeds); so nobody may use the device meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Mapping
from typing import Any

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, RecoverRequest
from fvdd.config import Config
from fvdd.devices.adoption import aside_path
from fvdd.devices.giving_up import extension_of
from fvdd.devices.record import DeviceRecord
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import (
    SESSION_FAULTS,
    Session,
    timeouts_for,
    to_api_error,
)
from fvdd.devices.troubles import fault_meaning
from fvdd.devices.whereabouts import file_id, has_name, look
from fvdengine.errors import from_os_error
from fvdengine.live import LIVE_NAME, live_session


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
            f"the image of device {name} has stopped: {fault_meaning(fault)}. What was written "
            "after the last flush that succeeded may be lost",
            hint="remove the cause, end what uses the device, then give that up with "
            f"fvdctl recover {name} --discard-unflushed, and check the file system",
        )


def terms(record: DeviceRecord, asked: RecoverRequest, config: Config) -> dict[str, Any]:
    """What `asked` tells of how the device is attached, as changes of its record; ApiError."""
    request, changes = record.request, dict[str, Any]()
    for name in ("allow_dirs", "allow_uris"):
        if more := getattr(asked, name):
            changes[name] = tuple(dict.fromkeys((*getattr(request, name), *more)))
    if asked.accept_changed_base:
        changes["accept_changed_base"] = True
    if asked.connections is None:
        return _changed(record, changes)
    if not record.rebuilt:
        raise ApiError(
            "invalid_request",
            f"the record of device {record.name} knows how many connections the kernel has: "
            f"{request.connections}",
            hint="leave out --connections",
        )
    changes["connections"] = asked.connections
    return {**_changed(record, changes), "timeouts": timeouts_for(config, asked.connections)}


def _changed(record: DeviceRecord, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The record with these terms; during a backup, also those that hold again behind it."""
    if not changes:
        return {}
    found = {"request": record.request.model_copy(update=changes)}
    if record.kept is not None:
        found["kept"] = record.kept.model_copy(update=changes)
    return found


def lost_terms(record: DeviceRecord) -> str:
    """What else to give where a recovery fails since the record is lost; "" where it is not."""
    if not record.rebuilt:
        return ""
    return (
        "its record was lost, and with it what its attach was told: if it needs that, give it to "
        f"fvdctl recover {record.name}: --allow-dir, --allow-uri, --accept-changed-base, "
        "--connections"
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


async def check_image(session: Session, image: str) -> None:
    """ApiError unless `image` may be the file to which the device's own image was moved."""
    try:
        extension = await look(image, lambda: extension_of(image))
        live = live_session(session.directory)
    except (*SESSION_FAULTS, OSError) as error:
        raise to_api_error(error) from error
    name, record = session.name, session.record
    found = uuid.UUID(bytes=extension.image_uuid) if extension is not None else None
    known = record.image_uuid
    if found is not None and known is not None and uuid.UUID(known) != found:
        raise ApiError(
            "invalid_request",
            f"{image} is another image than that of device {name}",
            hint="name the file to which it was moved",
        )
    if not await _is_moved(record) and record.image_id != await look(
        image, lambda: file_id(image)
    ):
        raise ApiError(
            "invalid_request",
            f"{image} is a copy: the image of device {name} itself is where it was, "
            f"{record.request.image}",
            hint=f"leave out --image; to use the copy: fvdctl detach {name}, then attach the copy",
        )
    if live is not None and (extension is None or extension.open_session != live):
        raise ApiError(
            "invalid_request",
            f"{image} is not from the time of this attachment of device {name}: what was written "
            "since would be lost",
            hint="name the file to which the image was moved; to use the older copy: "
            f"fvdctl detach {name}, then attach the copy",
        )


async def _is_moved(record: DeviceRecord) -> bool:
    """Whether the image is not where it was, as far as can be told: that storage may be dead."""
    try:
        return not await has_name(record)
    except ApiError:
        return True


def move_to(session: Session, image: str) -> None:
    """Let the device be on the file `image` from now on."""
    # The descriptor that is held leads to the old file, and its number would lead back to it.
    session.release_owner()
    session.update_record(**_moved(session, image))


def _moved(session: Session, image: str) -> dict[str, Any]:
    request = session.record.request.model_copy(update={"image": image})
    return {"request": request, "image_id": None}


async def start_over(
    session: Session, recovery: Recovery, reason: str, image: str | None = None
) -> None:
    """Let a new worker open the image, or the file `image` to which it was moved, as after a power
    cut: what was written after the last flush that succeeded is given up, and with it the fault.
    ATTACHED, or FAILED with the reason.

    ApiError: somebody uses the device, and nothing has changed."""
    async with session.unused():
        await recovery.stop()
        await _start_over(session, recovery, reason, image)


async def _start_over(session: Session, recovery: Recovery, reason: str, image: str | None) -> None:
    life = session.life
    life.move(DeviceState.RECOVERING, reason)
    session.restarts.reset()
    session.replacements.reset()
    try:
        await session.drop_worker()
        if image is None:
            await session.lock_owner()
            await session.open(takeover=False, discard=True)
        else:
            await _open_moved(session, image)
        await session.restore_prefetch()
        await session.reconnect(session.record.request.connections)
    except SESSION_FAULTS as error:
        life.move(DeviceState.FAILED, to_api_error(error).message)
        return
    life.move(DeviceState.ATTACHED)
    recovery.start()


async def _open_moved(session: Session, image: str) -> None:
    """Open the moved image without the state of the old file, or leave everything as it was.

    The record, which names the new file only once that is open, is the commit point: until then
    the old state is aside, where this fvdd or the next one takes it back from.
    """
    before = session.record
    live, aside = session.directory / LIVE_NAME, aside_path(session)
    try:
        with contextlib.suppress(FileNotFoundError):
            live.rename(aside)
        session.release_owner()
        session.record = before.model_copy(update=_moved(session, image))
        await session.lock_owner()
        await session.open(takeover=False, discard=True)
        session.update_record(required=True)
    except BaseException as error:
        await asyncio.shield(session.drop_worker())
        with contextlib.suppress(FileNotFoundError):
            aside.rename(live)
        session.release_owner()
        session.update_record(**dict(before))
        with contextlib.suppress(*SESSION_FAULTS):
            await session.lock_owner()
        if isinstance(error, OSError):
            raise to_api_error(from_os_error(error, str(live), "move")) from error
        raise
    aside.unlink(missing_ok=True)
