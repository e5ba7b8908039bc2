# SPDX-License-Identifier: Apache-2.0
"""The kernel's connections of a device while no worker has them.

A worker stops between two messages, answers what it received and gives its sockets away, each with
the bytes of the next message that it has read; another one, or the same, goes on with them. The
kernel sees answers that are late. Where nobody goes on with them they are closed, and that before
anything else happens: the kernel must see its connections end before it gets others.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdd.attach.threads import run_blocking
from fvdd.devices.session import Session, to_api_error
from fvdd.devices.supervise import Worker
from fvdd.devices.whereabouts import LOOK_LIMIT_SECONDS, look
from fvdd.worker.channel import close_all
from fvdd.worker.client import WorkerError
from fvdengine.chain import check_local_bases
from fvdengine.errors import EngineError
from fvdengine.live import release_reserved, reserve
from fvdengine.options import OpenOptions
from fvdengine.overlay import header_of

# How long requests that were received may take to be answered; longer, and nothing is changed.
PART_SECONDS: Final = 5
# The answer itself needs a moment more.
PART_LIMIT_SECONDS: Final = 30.0


# Of a worker that goes on as before.
REFUSALS: Final = ("worker_busy", "storage_full")


def is_refusal(error: BaseException) -> bool:
    """Whether a worker says that it gives nothing away now, and goes on."""
    return isinstance(error, WorkerError) and error.code in REFUSALS


async def refuse_while_full(session: Session, then: str) -> None:
    """ApiError where writes wait for space: whatever waits for them would wait until somebody
    makes some."""
    await session.refresh_status()
    parked = session.last_status.get("parked", 0)
    if parked:
        raise ApiError(
            "storage_full",
            f"{parked} writes to {session.record.device} wait for space on the storage of "
            f"{session.record.request.image}",
            hint=f"make space there, then {then}",
        )


async def check_openable(session: Session) -> None:
    """EngineError where a successor could not open the image or its bases, be it that somebody has
    moved a base away: the worker that has them open is all that the device has."""
    await session.follow_image()
    request, config = session.record.request, session.config.daemon
    options = OpenOptions(
        read_only=request.read_only,
        allow_dirs=(*config.allow_dirs, *request.allow_dirs),
        allow_uris=(*config.allow_uris, *request.allow_uris),
        accept_changed_base=request.accept_changed_base,
    )
    # Storage that does not answer is left to the successor's own patience.
    with contextlib.suppress(TimeoutError):
        await run_blocking(
            lambda: check_local_bases(request.image, options), timeout=LOOK_LIMIT_SECONDS
        )


@contextlib.asynccontextmanager
async def room_reserved(session: Session) -> AsyncIterator[None]:
    """Room in the state directory for a successor that begins anew, which the end of the worker
    would leave to anybody; ApiError where there is none, and nothing has changed."""
    image, directory = session.record.request.image, session.directory
    try:
        header = await look(image, lambda: header_of(image))
        reserve(directory, header)
    except (EngineError, OSError) as error:
        raise to_api_error(error) from error
    try:
        yield
    finally:
        release_reserved(directory)


@dataclass(frozen=True, slots=True)
class Parted:
    """Sockets, and what was read from each; they are open inside `handed_over` only."""

    session: Session
    descriptors: list[int]
    received: list[Any]

    async def resume(self, worker: Worker) -> None:
        """Let `worker` go on with them; raises WORKER_FAULTS."""
        resumed = await worker.request(
            "resume", self.descriptors, received=self.received, timeout=self.session.worker_limit
        )
        self.session.connections = set(resumed["connections"])


@contextlib.asynccontextmanager
async def handed_over(
    session: Session, giver: Worker, op: str = "hand_over", seconds: int = PART_SECONDS
) -> AsyncIterator[Parted]:
    """What `giver` gives away; raises WORKER_FAULTS, where it is a WorkerError everything is as
    before."""
    answer, descriptors = await giver.exchange(op, seconds=seconds, timeout=PART_LIMIT_SECONDS)
    session.connections = set()
    try:
        yield Parted(session, descriptors, answer["received"])
    finally:
        close_all(descriptors)
