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

An image on a block device has no name to give up, and no room beside it. There the device's worker
copies the disk beside its requests and goes after what is changed meanwhile; the copy is the disk
as it is at the end, in a pause for the last changes. It takes a trace of the device for that long.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from fvdapi.errors import ApiError
from fvdapi.models import PREFETCH_OFF
from fvdd.attach.threads import run_blocking
from fvdd.devices import supervise
from fvdd.devices.leftovers import make_another, remedy_of_leftover
from fvdd.devices.new_file import NAME_MAX, NewFile
from fvdd.devices.recovery import Recovery
from fvdd.devices.session import SESSION_FAULTS, Session, gather_quietly, to_api_error
from fvdd.devices.snapshot import MAKE_LIMIT_SECONDS, check_answers, continue_on, not_made
from fvdd.devices.standing import standing
from fvdd.devices.supervise import WORKER_FAULTS
from fvdd.devices.whereabouts import check_name, file_id, id_of, look
from fvdd.log import fields
from fvdd.worker.client import WorkerLost, WorkerProcess
from fvdengine import overlay
from fvdengine.errors import EngineError
from fvdengine.opening import lock_owner
from fvdengine.overlay import FRESH, SUFFIX

log = logging.getLogger("fvdd.devices")

# How often a copy beside requests is gone on with when too much is left at its end.
ENDS_MAX: Final = 4
# How long putting both images together may still take once fvdd is to stop; the device waits.
FOLD_GRACE_SECONDS: Final = 5.0

_T = TypeVar("_T")
# Waits for something, or for the end of fvdd and so many seconds more: ApiError.
Patience = Callable[[Awaitable[_T], float], Awaitable[_T]]


class Backup:
    """The backups of one device, one at a time; `operation` is held while the device changes."""

    def __init__(self, session: Session, recovery: Recovery, operation: asyncio.Lock) -> None:
        self._session = session
        self._recovery = recovery
        self._operation = operation
        self._is_running = False
        self._ending = asyncio.Event()
        # Keeps writers away from what is copied, whoever else has it open or has died.
        self._still_fd = -1

    async def run(self, target: str) -> tuple[int, list[float]]:
        """Copy the disk to `target`: bytes written and the seconds of each pause. ApiError: there
        is no such file, and the device goes on."""
        if self._is_running:
            raise ApiError("device_busy", f"a backup of {self._session.name} is being made already")
        if self._ending.is_set():
            raise _stopping()
        self._is_running = True
        try:
            # All that can be found out before the device is touched.
            async with self._operation:
                self._session.check_attached()
                await self._session.follow_image()  # what has its name now may be another file
                await self._check_image()
            await check_answers(target)
            size = self._session.record.size_bytes
            file = await look(
                target,
                lambda: NewFile(target, size),
                limit=MAKE_LIMIT_SECONDS,
                discard=NewFile.close,
            )
            try:
                with self._noted(file):
                    return await self._run(file)
            finally:
                await asyncio.shield(run_blocking(file.close))
        except SESSION_FAULTS as error:
            raise to_api_error(error) from error
        finally:
            self._is_running = False
            self._let_go_of_still()

    @contextlib.contextmanager
    def _noted(self, file: NewFile) -> Iterator[None]:
        """Let the record name a file that would stay if fvdd died."""
        session = self._session
        if file.part is None:
            yield
            return
        session.update_record(part=file.part)
        try:
            yield
        finally:
            if session.has_directory:  # it was not detached meanwhile
                session.update_record(part=None)

    def end(self) -> None:
        """fvdd is about to stop: give up a backup that is being made, and make no more."""
        self._ending.set()

    def check_none(self) -> None:
        """ApiError while one is made: what is changed then would be undone at its end."""
        if self._is_running:
            raise ApiError(
                "device_busy",
                f"a backup of {self._session.name} is being made",
                hint="try again when it has ended",
            )

    async def check_whole(self) -> None:
        """ApiError while one is made, or until one that was broken off is put together."""
        self.check_none()
        name, record = self._session.name, self._session.record
        if record.request.read_only:
            return
        left = await self._leftover()
        if record.kept is not None or left is not None:
            raise ApiError(
                "device_state",
                f"a backup of {name} was broken off, and what it changed is not undone yet",
                hint=left[1] if left is not None else make_another(name),
            )

    @property
    def is_running(self) -> bool:
        return self._is_running

    async def leftover(self) -> tuple[str, str] | None:
        """The base that a backup which was broken off left, which bears the name that the image
        had then; and how that is undone. None also where the storage does not answer."""
        if self._is_running:
            return None
        with contextlib.suppress(ApiError):
            return await self._leftover()
        return None

    async def _leftover(self) -> tuple[str, str] | None:
        name, path = self._session.name, self._session.record.request.image

        def find() -> tuple[str, str] | None:
            with contextlib.suppress(OSError, EngineError):
                base = overlay.base_aside(os.path.realpath(path))
                if base is not None:
                    return base, remedy_of_leftover(name, path, base)
            return None

        return await look(path, find)

    async def _check_image(self) -> None:
        """ApiError unless the image can be set aside, or need not be."""
        path = self._session.record.request.image
        if not self._session.record.request.read_only:
            await look(path, lambda: _check_image(self._session.name, path))

    async def _run(self, file: NewFile) -> tuple[int, list[float]]:
        session, target = self._session, file.path
        pauses = []
        async with self._operation:
            self._session.check_attached()
            await session.follow_image()
            path = session.record.request.image
            image, is_file = await look(path, lambda: _resolved(path))
            base = image + SUFFIX
            is_still = session.record.request.read_only  # by itself
            if not is_still and is_file:
                if await run_blocking(lambda: overlay.is_over(image, base)):
                    try:
                        pauses.append(await self._put_together(image, base))
                    except ApiError as error:
                        raise await _left_apart(session, base, target, error, error) from error
                try:
                    pauses.append(await self._set_aside(image, base))
                except ApiError as error:
                    raise not_made(session, target, error) from error
        try:
            if is_still:
                return await self._copy(image, file), []
            if not is_file:
                return await self._copy_in_use(file)
        except SESSION_FAULTS as error:
            raise not_made(session, target, to_api_error(error)) from error
        written, failure = 0, None
        try:
            written = await self._copy(base, file)
        except ApiError as error:
            failure = error
        try:
            if self._ending.is_set():
                raise _stopping()
            async with self._operation:
                self._session.check_attached()
                pauses.append(await self._put_together(image, base))
        except ApiError as error:
            raise await _left_apart(session, base, target, failure, error) from error
        if failure is not None:
            raise not_made(session, target, failure) from failure
        log.info(
            "backup",
            extra=fields(name=session.name, target=target, bytes=written, pauses=pauses),
        )
        return written, pauses

    async def _set_aside(self, image: str, base: str) -> float:
        session = self._session

        async def change() -> ApiError | None:
            failure = await _set_aside(session, image, base)
            if failure is None and session.shared_fd >= 0:  # an adoption may have gone without
                self._still_fd = os.dup(session.shared_fd)
            return failure

        return await continue_on(session, self._recovery, change)

    def _let_go_of_still(self) -> None:
        if self._still_fd >= 0:
            os.close(self._still_fd)
            self._still_fd = -1

    async def _put_together(self, image: str, base: str) -> float:
        session = self._session
        try:
            await self._share(base)
            return await continue_on(
                session,
                self._recovery,
                lambda: _put_together(session, image, base, self._unless_ending),
            )
        except SESSION_FAULTS as error:
            raise to_api_error(error) from error
        finally:
            session.release_shared()

    async def _share(self, base: str) -> None:
        """Hold the still image against writers, as it has been held since it is still."""
        session, still = self._session, self._still_fd
        if still >= 0 and await look(base, lambda: file_id(base)) == id_of(os.fstat(still)):
            session.release_shared()
            session.shared_fd, self._still_fd = still, -1
        else:
            await session.share_image(base)  # whoever has it open now shares it, too

    async def _unless_ending(self, work: Awaitable[_T], grace: float = 0.0) -> _T:
        """Wait for `work`; cancel it when fvdd is to stop, after `grace` seconds: ApiError."""
        task = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({task}, timeout=grace)
            if not task.done():
                raise _stopping()
            return await task
        finally:
            ending.cancel()
            task.cancel()
            await gather_quietly(task, ending)

    async def _copy(self, source: str, file: NewFile) -> int:
        opening = {"read_only": True}
        work = _in_a_worker(
            self._session, source, opening, "copy_out", file.fd, name=file.path
        )
        try:
            written = int((await self._unless_ending(work))["written"])
            await run_blocking(file.keep)
        except SESSION_FAULTS as error:
            raise to_api_error(error) from error
        return written

    async def _copy_in_use(self, file: NewFile) -> tuple[int, list[float]]:
        """Let the device's own worker copy; the bytes written and the pauses."""
        session = self._session
        pauses: list[float] = []
        worker = session.worker().worker

        async def step(name: str, *fds: int) -> dict[str, Any]:
            return await worker.request("mirror", fds, step=name, name=file.path)

        async def pause(name: str, *fds: int) -> dict[str, Any]:
            async with self._operation:
                self._session.check_attached()
                if session.worker().worker is not worker:
                    raise ApiError("worker_failed", "the worker was replaced during the copy")
                done, seconds = await standing(session, self._recovery, lambda: step(name, *fds))
            pauses.append(seconds)
            return done

        async def make() -> int:
            for _ in range(ENDS_MAX):
                await self._unless_ending(step("copy"))
                answer = await pause("end")
                if answer.get("done", True):  # an older worker always is
                    return int(answer["written"])
            raise ApiError(
                "device_busy",
                f"the disk of {session.name} changes faster than it can be copied to {file.path}",
                hint="try again when less is written to it, or copy to faster storage",
            )

        await pause("begin", file.fd)
        try:
            written = await make()
        except BaseException:
            with contextlib.suppress(*WORKER_FAULTS):  # it may have ended by itself
                await asyncio.shield(step("drop"))
            raise
        await run_blocking(file.keep)
        return written, pauses


def _stopping() -> ApiError:
    return ApiError("daemon_stopping", "fvdd is about to stop")


async def _left_apart(
    session: Session, base: str, target: str, failure: ApiError | None, error: ApiError
) -> ApiError:
    """Both images were not put together because of `error`; the copy was not made because of
    `failure`, or it is complete."""
    if failure is None:
        message = f"{target} is complete, but the end of the backup failed: {error.message}"
    elif failure.message == error.message:
        message = f"{target} was not made: {error.message}"
    else:
        message = f"{target} was not made: {failure.message}; and then: {error.message}"
    image = session.record.request.image
    rest = f"{image} needs {base} until the next backup puts both together"
    with contextlib.suppress(ApiError):  # storage that does not answer
        if (await look(image, lambda: os.path.realpath(image))) + SUFFIX != base:
            rest = await look(image, lambda: remedy_of_leftover(session.name, image, base))
    hints = (error.hint.removesuffix("."), rest)
    return ApiError(error.code, message, hint="; ".join(hint for hint in hints if hint))


def _is_free(image: str, base: str) -> bool:
    """Whether nothing is called `base` that is not of a backup of `image`."""
    if not os.path.lexists(base) or overlay.is_begun(image, base):
        return True
    return overlay.is_over(image, base)


def _is_file(image: str) -> bool:
    """Whether another file can be put in its place."""
    return os.path.isfile(image)


def _resolved(path: str) -> tuple[str, bool]:
    """What an image is called without links, and whether it is a file."""
    image = os.path.realpath(path)
    return image, _is_file(image)


def _check_image(name: str, path: str) -> None:
    image, is_file = _resolved(path)
    if not is_file:
        return
    excess = len(os.fsencode(os.path.basename(image) + SUFFIX + FRESH)) - NAME_MAX
    if excess > 0:
        raise ApiError(
            "invalid_request",
            f"the name of the image {image} leaves no room for {SUFFIX}{FRESH} after it",
            hint=f"make it shorter by {excess} bytes: detach, rename it and attach it again",
        )
    base = image + SUFFIX
    left = overlay.base_aside(image)
    if left is not None and os.path.realpath(left) != base:
        raise ApiError(
            "device_state",
            f"a backup of {name} was broken off, and then {image} was renamed",
            hint=remedy_of_leftover(name, image, left),
        )
    if not _is_free(image, base):
        raise ApiError(
            "invalid_request",
            f"{base} exists and is not what a backup of {image} left",
            hint="move it elsewhere, then try again",
        )


async def _set_aside(session: Session, image: str, base: str) -> ApiError | None:
    """Put an empty image over the device's own. Not possible: why, and nothing has changed."""
    old, owner = session.record, -1

    def own(fresh: str) -> None:
        """Own the new image, and let the record say that it may be the device's."""
        nonlocal owner
        owner = lock_owner(fresh)
        sessions = (*old.sessions, overlay.session_of(fresh)) if old.sessions else ()
        session.update_record(required=True, sessions=sessions)

    try:
        # As a base the image is read by everybody; nobody writes it until that is open.
        session.share_owner()
        quiet = old.request.model_copy(
            update={"copy_on_read": False, "prefetch_delay": PREFETCH_OFF}
        )
        await check_name(old)
        kept = old.kept or old.request  # one that was broken off before has made it quiet
        session.update_record(
            required=True, request=quiet, kept=kept, image_id=None, image_uuid=None
        )
        await run_blocking(
            lambda: overlay.put_over(image, base, session.clone_options(), own)
        )
        session.update_record(
            image_id=id_of(os.fstat(owner)), sessions=session.record.sessions[-1:]
        )
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        if owner >= 0:
            os.close(owner)
        await session.lock_owner()
        return to_api_error(error)
    session.owner_fd = owner
    return None


async def _put_together(
    session: Session, image: str, base: str, patiently: Patience[dict[str, Any]]
) -> ApiError | None:
    """Put what the upper image holds into the lower one, which takes its name again. Not possible:
    why, and the device stays on both."""
    old = session.record
    owner = -1
    try:
        # Nobody else may write either of them until the device is on the lower one.
        owner = await session.own_shared(base)
        opening = functools.partial(os.open, image, os.O_RDONLY | os.O_CLOEXEC)
        fd = await look(image, opening, discard=os.close)
        try:
            await check_name(old, id_of(os.fstat(fd)))
            how = {"copy_on_read": False, "owner_held": True}
            work = _in_a_worker(session, base, how, "fold", fd, name=image)
            await patiently(work, FOLD_GRACE_SECONDS)
        finally:
            os.close(fd)
        await check_name(old)  # another file that has it now would be lost
        request = (old.kept or old.request).model_copy(update={"image": old.request.image})
        made = await run_blocking(lambda: overlay.session_of(base))
        sessions = (*old.sessions, made) if old.sessions else ()
        session.update_record(
            required=True, request=request, kept=None, image_id=None, image_uuid=None,
            sessions=sessions,
        )  # fmt: skip
        await run_blocking(lambda: overlay.put_back(image, base))
        session.update_record(image_id=id_of(os.fstat(owner)), sessions=sessions[-1:])
    except (*SESSION_FAULTS, OSError) as error:
        session.update_record(**dict(old))
        if owner >= 0:
            os.close(owner)
        await session.lock_owner()
        return to_api_error(error)
    session.release_owner()
    session.owner_fd = owner
    return None


async def _in_a_worker(
    session: Session, image: str, opening: Mapping[str, Any], op: str, fd: int, **arguments: Any
) -> dict[str, Any]:
    """Let a process that serves nobody open `image` and do one thing. It has no directory, so that
    nobody takes it for the device's worker, and is killed when fvdd ends."""
    ours: dict[str, Any] = session.open_arguments(takeover=False)
    keys = ("allow_dirs", "allow_uris", "base_timeout", "accept_changed_base")
    worker = await WorkerProcess.spawn(None, ends_with_us=True)
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
