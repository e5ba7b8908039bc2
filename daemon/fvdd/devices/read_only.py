# SPDX-License-Identifier: Apache-2.0
"""Make a device that nobody uses read-only while it stays attached, or writable again.

  > the node is held exclusively, so that nobody can mount it, and everything cached is written
    the kernel refuses writes from now on, or allows them
  > the image is closed clean, and opened for reading by the next worker, or for writing again

The record is changed between the two openings; what is in it is what successors of the worker and
a later fvdd go by. An image that is open for reading may be read by others as well.
"""

from __future__ import annotations

import contextlib
import logging

from fvdapi.errors import ApiError
from fvdd.attach.attachment import AttachError, Attachment
from fvdd.devices.handing_over import refuse_while_full
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, to_api_error
from fvdd.devices.snapshot import continue_on
from fvdd.log import fields

log = logging.getLogger("fvdd.devices")


async def set_read_only(session: Session, recovery: Recovery, wanted: bool) -> None:
    """Change the mode; ApiError names who holds the device, or what else is in the way."""
    is_noted = session.record.request.read_only == wanted
    if is_noted and session.kernel().is_read_only() == wanted:
        return
    async with session.unused() as attachment:
        if is_noted:  # a change was broken off before it was
            await _tell_kernel(attachment, wanted)
        else:
            await _change(session, recovery, attachment, wanted)
    log.info("mode changed", extra=fields(name=session.name, read_only=wanted))


async def _tell_kernel(attachment: Attachment, wanted: bool) -> None:
    try:
        await attachment.set_read_only(wanted)
    except AttachError as error:
        raise to_api_error(error) from error


async def _change(
    session: Session, recovery: Recovery, attachment: Attachment, wanted: bool
) -> None:
    try:
        if wanted:
            await refuse_while_full(session, "try again")
            await attachment.sync()
        else:
            # Between the reader's end and the writer's begin nobody else may write.
            await session.follow_image()
            await session.share_image(session.record.request.image)
        await attachment.set_read_only(wanted)
        await continue_on(session, recovery, lambda: _reopen(session, wanted))
    except SESSION_FAULTS as error:
        if session.record.request.read_only != wanted:
            with contextlib.suppress(AttachError):
                await attachment.set_read_only(not wanted)
        raise to_api_error(error) from error
    finally:
        session.release_shared()


async def _reopen(session: Session, wanted: bool) -> ApiError | None:
    """Let the next worker open the image in the other mode, or say why that cannot be."""
    old = session.record
    try:
        request = old.request.model_copy(update={"read_only": wanted})
        session.update_record(required=True, request=request)
        if wanted:
            session.share_owner()
        else:
            session.release_owner()  # that of a reader: the image is shared besides
        await session.lock_owner()
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        with contextlib.suppress(*SESSION_FAULTS):
            await session.lock_owner()
        return to_api_error(error)
    return None
