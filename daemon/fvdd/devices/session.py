# SPDX-License-Identifier: Apache-2.0
"""What exists while a device is alive, and the single steps that change it.

A session holds the parts of one device (record, directory, worker, kernel attachment, owner lock)
and knows the steps that attach, detach, recovery, adoption and upgrade are made of. It does not
know their order: that is theirs, and it is what keeps data safe.

The record on disk is the registry's memory: it says what is wanted of the device and what kernel
and worker were told. A record that cannot be written stops an attach, but never a recovery: the
device matters more than the note about it, and an older note still leads to worker and device.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, Timeouts
from fvdd.attach.attachment import AttachError, Attachment, AttachSpec, Transport
from fvdd.config import Config
from fvdd.devices import supervise
from fvdd.devices.record import DeviceRecord, remove_directory, store_record
from fvdd.devices.remounted import Kept, is_elsewhere, not_kept, state_of
from fvdd.devices.states import Life
from fvdd.devices.supervise import WORKER_FAULTS, Opened, RestartBudget, Spawn, as_api_error
from fvdd.devices.whereabouts import check_name, file_id, hold, id_of, let_go, look, name_of
from fvdd.log import fields
from fvdd.worker.client import WorkerError, WorkerLost
from fvdd.worker.failure import OPENED_SINCE
from fvdengine.errors import EngineError
from fvdengine.live import LivePresence, live_presence, state_error
from fvdengine.opening import lock_owner, lock_reader, relock_owner
from fvdengine.options import CreateOptions

# A start delay grows by a random part of it up to this share, so that clones that are attached
# together do not start together.
PREFETCH_JITTER: Final = 0.25
log = logging.getLogger("fvdd.devices")

# How long to wait for the kernel to notice that its connections are dead; it takes milliseconds.
DEATH_NOTICE_SECONDS: Final = 1.0
# A predecessor that was just killed may hold the lock until the kernel has taken it down.
OWNER_WAIT_SECONDS: Final = 5.0
STATUS_LIMIT_SECONDS: Final = 2.0
# Openings that failed since one succeeded, whose sessions the record keeps.
SESSIONS_MAX: Final = 60

BASE_FORMAT: Final = "fvd"
# Errors of requests that were wrong themselves.
WRONG_REQUEST: Final = ("EINVAL", "EPERM", "EROFS")
SESSION_FAULTS: Final = (ApiError, AttachError, EngineError, *WORKER_FAULTS)


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
    upgrades: int = 0
    writeback_errors: int = 0
    last_pause_seconds: float = 0.0


class Session:
    """The parts of one device. Its users see to it that only one of them changes it at a time."""

    def __init__(
        self, services: Services, record: DeviceRecord, directory: Path, life: Life
    ) -> None:
        self.services = services
        self.record = record
        self.directory = directory
        self.life = life
        self.counters = Counters()
        self.restarts = RestartBudget(services.config.restarts)
        self.replacements = RestartBudget(services.config.restarts)
        self.opened: Opened | None = None
        self.attachment: Attachment | None = None
        self.connections: set[int] = set()
        self.owner_fd = -1
        self.shared_fd = -1  # see share_owner
        self.file_fd = -1  # see hold_file: it leads to the file
        self._held: tuple[int, int] | None = None
        # The directory is this attachment's (and not that of a namesake before).
        self.has_directory = False
        # From the first request to open the image until it is closed clean (or was never opened).
        self.image_is_open = False
        self.last_status: dict[str, Any] = {}
        # Since when the worker has not answered the question whether it is there.
        self.asked_at: float | None = None
        # What failed last: of "request" and "base", the event that told it.
        self.failures: dict[str, dict[str, object]] = {}

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def config(self) -> Config:
        return self.services.config

    @property
    def worker_limit(self) -> float:
        return self.config.limits.worker_timeout

    def worker(self) -> Opened:
        """The worker, or ApiError where there is none."""
        if self.opened is None:
            raise ApiError(
                "device_failed",
                f"device {self.name} has no worker at this moment",
                hint=f"fvdctl status {self.name} says why; then try again",
            )
        return self.opened

    async def refresh_status(self) -> None:
        """Ask the worker how it is; where it does not answer, what it said last stays."""
        if self.opened is not None and self.life.state is not DeviceState.OPENING:
            with contextlib.suppress(*WORKER_FAULTS):
                self.last_status = await self.opened.worker.request(
                    "status", timeout=STATUS_LIMIT_SECONDS
                )

    def kernel(self) -> Attachment:
        """The kernel's device, or ApiError where there is none."""
        if self.attachment is None:
            raise ApiError("device_failed", f"device {self.name} has no kernel device")
        return self.attachment

    def check_attached(self) -> None:
        """ApiError unless the device is served."""
        state = self.life.state
        if state is DeviceState.FAILED:
            raise ApiError(
                "device_state",
                f"device {self.name} has failed: {self.life.reason}",
                hint=f"remove the cause, then: fvdctl recover {self.name}",
            )
        if state is not DeviceState.ATTACHED:
            raise ApiError(
                "device_state",
                f"device {self.name} is {state.value} now",
                hint="try again when fvdctl list shows it as attached",
            )

    def note_failure(self, event: Mapping[str, object]) -> None:
        """Keep what a worker says about a request, or a read of the base, that failed."""
        if event.get("error") in WRONG_REQUEST:
            return
        if event.get("operation") != "prefetch":
            self.failures["request"] = dict(event)
        if event.get("of_base"):
            self.failures["base"] = dict(event)

    # The directory and the record

    def make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700)
        except FileExistsError as error:
            raise ApiError(
                "device_exists",
                f"the directory {self.directory} of a device of that name exists",
                hint="fvdctl status shows what was left behind; choose another --name",
            ) from error
        except OSError as error:
            raise state_error(error, str(self.directory), "make") from error
        self.has_directory = True
        self.update_record(required=True)

    def check_directory(self) -> None:
        """ApiError where nothing can be changed in the directory: a worker that ended then could
        not be succeeded, and nothing could be taken down."""
        if self.directory.exists() and not os.access(self.directory, os.W_OK):
            is_read_only = os.statvfs(self.directory).f_flag & os.ST_RDONLY
            error = OSError(errno.EROFS if is_read_only else errno.EACCES, "")
            raise to_api_error(state_error(error, str(self.directory)))

    def forget_directory(self) -> None:
        """Remove the directory of an attachment whose image is closed clean."""
        self.let_go_of_file()
        if self.has_directory:
            remove_directory(self.directory)
            self.has_directory = False

    def update_record(self, *, required: bool = False, **changes: object) -> None:
        """Note changes; EngineError names the directory, only where the note is `required`."""
        self.record = self.record.model_copy(update=changes)
        try:
            store_record(self.directory, self.record)
        except (OSError, ValueError) as error:  # what no file can hold, too, ends no recovery
            if required and isinstance(error, OSError):
                raise state_error(error, str(self.directory)) from error
            if required:
                raise
            log.warning(
                "the device's record is out of date: %s", error, extra=fields(name=self.name)
            )

    # The image

    async def lock_owner(self, limit: float | None = None) -> None:
        """Hold the image against other owners, a reader's against writers, for as long as the
        device exists. `limit`: seconds for storage that does not answer."""
        if self.owner_fd >= 0:
            return
        await self.follow_image()
        path, is_read = self.record.request.image, self.record.request.read_only
        wait = OWNER_WAIT_SECONDS if self.has_directory else 0.0
        shared = id_of(os.fstat(self.shared_fd)) if self.shared_fd >= 0 else None
        if shared is not None and shared == self.record.image_id and not is_read:
            self.owner_fd = await self.own_shared(path)
            return
        limit = wait + (self.worker_limit if limit is None else limit)
        call = functools.partial(lock_reader if is_read else lock_owner, path, wait)
        fd = await look(path, call, limit=limit, discard=os.close)
        try:
            await self._check_file(path, fd, limit)
        except BaseException:
            os.close(fd)
            raise
        self.owner_fd = fd

    async def _check_file(self, path: str, fd: int, limit: float) -> None:
        """ApiError unless `path`, open as `fd`, is the image that the device was on."""
        found, wanted = id_of(os.fstat(fd)), self.record.image_id
        if wanted in (None, found):
            return
        if not is_elsewhere(wanted, found):
            await check_name(self.record, found)
            return
        known = (self.record.image_uuid, self.record.sessions)
        state = await look(path, lambda: state_of(fd, path, *known), limit=limit)
        if state is not Kept.WHOLE:
            raise not_kept(self.name, path, state)
        log.warning(
            "its file system was mounted anew, under another device number",
            extra=fields(name=self.name, image=path, previous=wanted, found=found),
        )
        self.update_record(image_id=found)

    async def hold_file(self) -> None:
        """Keep a way to the file of the image that does not need its name, whoever owns it now."""
        wanted, path = self.record.image_id, self.record.request.image
        if wanted is None or self._held == wanted:
            return
        with contextlib.suppress(ApiError):  # storage that does not answer
            fd = await look(path, lambda: hold(path, wanted), discard=let_go)
            if fd >= 0:
                self.let_go_of_file()
                self.file_fd, self._held = fd, wanted

    def let_go_of_file(self) -> None:
        let_go(self.file_fd)
        self.file_fd, self._held = -1, None

    async def own_shared(self, path: str) -> int:
        """The descriptor of what is shared, once it is held against everybody; ImageInUse."""
        fd = self.shared_fd
        limit = OWNER_WAIT_SECONDS + self.worker_limit
        await look(path, lambda: relock_owner(fd, path, OWNER_WAIT_SECONDS), limit=limit)
        self.shared_fd = -1
        return fd

    async def share_image(self, path: str) -> None:
        """Hold an image that is only read against writers, as share_owner does."""
        fd = await look(
            path,
            lambda: lock_owner(path, OWNER_WAIT_SECONDS, exclusive=False),
            limit=OWNER_WAIT_SECONDS + self.worker_limit,
            discard=os.close,
        )
        self.release_shared()
        self.shared_fd = fd

    def share_owner(self) -> None:
        """Let others read the image that we own, and nobody write it, until release_shared. Then
        another image, or the same, can be owned."""
        if self.owner_fd >= 0:
            self.release_shared()
            relock_owner(self.owner_fd, self.record.request.image, exclusive=False)
            self.owner_fd, self.shared_fd = -1, self.owner_fd

    def release_shared(self) -> None:
        if self.shared_fd >= 0:
            os.close(self.shared_fd)
            self.shared_fd = -1

    def release_owner(self) -> None:
        if self.owner_fd >= 0:
            os.close(self.owner_fd)
            self.owner_fd = -1

    async def follow_image(self, pids: Sequence[int] = ()) -> None:
        """Note the image's new name if it was renamed while it is attached.

        Our descriptor leads to it, or one of the processes `pids`. Where the storage does not
        answer, the name stays as it is: whoever opens that looks again which file it is.
        """
        wanted, path = self.record.image_id, self.record.request.image
        if wanted is None:
            return
        ours = [fd for fd in (self.owner_fd, self.file_fd) if fd >= 0]
        try:
            found = await look(path, lambda: name_of(wanted, path, ours, pids))
        except ApiError as error:
            log.warning("%s", error, extra=fields(name=self.name))
            return
        if found is None:
            return
        if found != path:
            log.warning(
                "the image was renamed",
                extra=fields(name=self.name, previous=path, image=found),
            )
            self.update_record(request=self.record.request.model_copy(update={"image": found}))
        await self.hold_file()

    async def open(self, *, takeover: bool, discard: bool = False) -> None:
        """Start a worker and let it open the image, or take it over from a dead one, or discard
        what that one had not flushed."""
        await self.follow_image()
        try:
            await self.lock_owner()  # an adoption may have gone without
        except EngineError as error:
            raise to_api_error(error) from error
        was_open, self.image_is_open = self.image_is_open, True
        try:
            self.opened = await supervise.open_worker(
                self.services.spawn,
                str(self.directory),
                {**self.opening(takeover=takeover), "discard_live_state": discard},
                self.worker_limit,
            )
        except WorkerError:
            # Refused: nothing was written.
            self.image_is_open = was_open
            raise
        except WORKER_FAULTS:
            # It died, or took too long and is gone: it may have begun a session, which it does
            # only when its live state is there.
            self.image_is_open = was_open or self.has_live_state()
            raise
        await self.note_opened()
        if takeover:
            await self.restore_prefetch()

    def has_live_state(self) -> bool:
        return live_presence(self.directory) is not LivePresence.ABSENT

    def opening(self, *, takeover: bool) -> dict[str, object]:
        """The arguments of an opening that is about to be: the record knows its session before
        the image has it, so that whoever dies in between leaves no stranger's session there."""
        known, session = self.record.sessions, ""
        if known and not self.record.request.read_only:
            session = os.urandom(16).hex()
            recent = known[1:][-SESSIONS_MAX:]
            self.update_record(sessions=(known[0], *recent, session))
        return {**self.open_arguments(takeover=takeover), "session": session}

    def open_arguments(self, *, takeover: bool) -> dict[str, object]:
        """What a worker is told to open."""
        request, storage = self.record.request, self.config.storage
        return {
            "image": request.image,
            # The name may be another file's by then: never that one's blocks.
            "image_id": list(self.record.image_id or ()),
            # It may have been open elsewhere meanwhile: then it is not what the device was.
            "sessions": list(self.record.sessions),
            "read_only": request.read_only,
            "live_dir": str(self.directory),
            # A reader leaves nothing behind that could be taken over.
            "takeover": takeover and not request.read_only,
            "owner_held": not request.read_only,
            "allow_dirs": [*self.config.daemon.allow_dirs, *request.allow_dirs],
            "allow_uris": [*self.config.daemon.allow_uris, *request.allow_uris],
            "base_timeout": self.config.timeouts.base_timeout,
            "accept_changed_base": request.accept_changed_base,
            "copy_on_read": request.copy_on_read,
            "prefetch_delay": request.prefetch_delay,
            "prefetch_jitter": PREFETCH_JITTER,
            "prefetch_policy": request.prefetch_policy or self.config.prefetch.policy,
            "prefetch_budget": self.config.prefetch.budget,
            "fetch_size": request.fetch_size,
            "record_profile": request.record_profile or "",
            "replay_profile": request.replay_profile or "",
            # Whoever attaches hears of a wrong one; nobody loses his device over it later.
            "profile_is_hint": self.life.state is not DeviceState.OPENING,
            "on_full": request.on_full or storage.on_full,
            "grow_program": "" if storage.grow_program == "off" else storage.grow_program,
            "allow_builtin_grow": storage.allow_builtin_grow,
            "cache": request.cache or storage.cache,
            "name": self.name,
            "attachment": self.record.attachment,
        }

    def clone_options(self) -> CreateOptions:
        """How an image over the present one is made: what the chain may be holds for both. Looks
        at the image's storage."""
        request, config = self.record.request, self.config.daemon
        beside = os.path.dirname(os.path.realpath(request.image))
        return CreateOptions(
            base=request.image,
            base_format=BASE_FORMAT,
            allow_dirs=(*config.allow_dirs, *request.allow_dirs, beside),
            allow_uris=(*config.allow_uris, *request.allow_uris),
            accept_changed_base=request.accept_changed_base,
        )

    async def note_opened(self) -> None:
        """Write down whose worker it is now and what it has open."""
        self.last_status = {}
        opened, path = self.worker(), self.record.request.image
        image_id = self.record.image_id or opened.image_id
        if image_id is None:  # an older worker does not say
            with contextlib.suppress(ApiError):
                image_id = await look(path, lambda: file_id(path))
        self.update_record(
            worker_pid=opened.worker.pid, image_uuid=opened.image_uuid, image_id=image_id,
            sessions=(opened.session,) if opened.session else (),
        )
        await self.hold_file()

    async def restore_prefetch(self) -> None:
        """Let a successor's background copy do what it was last told to."""
        action = self.record.prefetch
        if action is not None and self.record.kept is None:  # a backup has it off
            try:
                await self.worker().worker.request(
                    "prefetch", action=action, timeout=self.worker_limit
                )
            except WORKER_FAULTS as error:
                log.warning("prefetch: %s", error, extra=fields(name=self.name))

    async def close_image(self) -> None:
        """Stop the worker cleanly; if it dies over it, a successor does what is left."""
        while self.image_is_open:
            if self.opened is None:
                self.counters.restarts += 1
                try:
                    await self.open(takeover=True)
                except WorkerError as error:
                    if error.code != OPENED_SINCE:
                        raise
                    # It was closed clean, and what somebody else did then is not ours to close.
                    log.warning("%s", error.message, extra=fields(name=self.name))
                    self.image_is_open = False
                    return
            try:
                await supervise.stop_worker(self.worker().worker, self.worker_limit)
                self.image_is_open = False
            except WorkerLost:
                await supervise.make_gone(self.worker().worker)
                if not self.restarts.take():
                    raise
            self.opened = None

    async def drop_worker(self) -> None:
        """Be sure that the worker is gone; its image stays as a dead process leaves it."""
        if self.opened is not None:
            await supervise.make_gone(self.opened.worker)
            self.opened = None
        self.connections = set()

    # The kernel

    def spec(self, opened: Opened | None = None) -> AttachSpec:
        """What the kernel is told: by the worker's answer, or by the record after a restart."""
        record, request, times = self.record, self.record.request, self.record.timeouts
        number = request.device.removeprefix("/dev/nbd") if request.device is not None else None
        return AttachSpec(
            backend=record.backend,
            size_bytes=opened.size_bytes if opened is not None else record.size_bytes,
            sector_size=request.sector_size,
            flags=opened.flags if opened is not None else record.flags,
            connections=request.connections,
            index=int(number) if number is not None else None,
            resend_timeout=times.resend_timeout,
            kernel_timeout=times.kernel_timeout,
            dead_timeout=times.dead_timeout,
        )

    async def connect(self) -> None:
        """Serve fresh connections and make the kernel device from their other ends."""
        opened = self.worker()
        count = self.record.request.connections
        numbers, ends = await supervise.serve_sockets(opened.worker, count, self.worker_limit)
        try:
            self.attachment = await self.services.transport.connect(self.spec(opened), ends)
        finally:
            supervise.close_sockets(ends)
        self.connections = set(numbers)
        self.note_attachment(required=True)

    def note_attachment(self, *, required: bool = False) -> None:
        """Write down which device the kernel has for us."""
        attachment, opened = self.kernel(), self.opened
        changes: dict[str, object] = {"index": attachment.index, "device": attachment.device}
        if opened is not None:
            changes["flags"] = opened.flags
        if opened is not None and required:
            # Just made. A device that is found may still have to follow its image.
            changes["size_bytes"] = opened.size_bytes
        self.update_record(required=required, **changes)

    @contextlib.asynccontextmanager
    async def unused(self) -> AsyncIterator[Attachment]:
        """The kernel's device, held so that nobody can mount it; ApiError names who uses it."""
        attachment = self.kernel()
        try:
            await attachment.lock()
        except AttachError as error:
            hint = "unmount it and end the processes that use it, then try again"
            raise ApiError(error.code, error.message, hint=hint) from error
        try:
            yield attachment
        finally:
            await attachment.unlock()

    async def reconnect(self, count: int, notice: float = DEATH_NOTICE_SECONDS) -> None:
        """Serve fresh connections and give them to the kernel in place of dead ones."""
        worker = self.worker().worker
        numbers, ends = await supervise.serve_sockets(worker, count, self.worker_limit)
        try:
            # Before it has noticed, the kernel would take the sockets for surplus and drop them.
            await self.kernel().wait_dead(count, notice)
            await self.kernel().reconnect(ends)
        finally:
            supervise.close_sockets(ends)
        self.connections.update(numbers)

    async def leave(self) -> None:
        """Let go of everything without touching it: fvdd ends, the worker goes on."""
        if self.opened is not None:
            await self.opened.worker.close()
        if self.attachment is not None:
            await self.attachment.abandon()
        self.release_owner()
        self.release_shared()
        self.let_go_of_file()


def timeouts_for(config: Config, connections: int) -> Timeouts:
    """The times of a device with that many connections."""
    times = config.timeouts.for_connections(connections)
    return Timeouts(
        resend_timeout=times.resend_timeout,
        base_timeout=times.base_timeout,
        kernel_timeout=times.kernel_timeout,
        dead_timeout=times.dead_timeout,
    )


def to_api_error(error: BaseException) -> ApiError:
    """What anything that may go wrong in a session looks like to the API."""
    if isinstance(error, AttachError):
        return ApiError(error.code, error.message, hint=error.hint)
    if isinstance(error, EngineError):
        details = {key: str(value) for key, value in error.details.items()}
        return ApiError(error.code, error.message, hint=error.hint, details=details)
    return as_api_error(error)


async def gather_quietly(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their ends, whatever these are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
