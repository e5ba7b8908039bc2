# SPDX-License-Identifier: Apache-2.0
"""The one image of a worker, from its files and live state to the running engine and back.

Opening decides between a fresh start and taking over what a dead process left. Two leftovers are
no takeover although live state lies there: the image was closed cleanly and only the removal of
the files is missing; or the predecessor died before it served its first request. In both nothing
was acknowledged that the image itself does not hold.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

from fvdd.attach.handshake import Negotiated
from fvdd.log import fields
from fvdd.metrics.stores import file_id
from fvdd.worker.arguments import Arguments
from fvdd.worker.channel import Message
from fvdd.worker.failure import Failure
from fvdd.worker.growth import Grower, choose_program, is_block_device
from fvdd.worker.others import check_session
from fvdd.worker.recording import Recording
from fvdengine.errors import CloseFailed, LiveStateUnfinished, UnusableProfile
from fvdengine.live import (
    LivePresence,
    LiveState,
    adopt_live,
    create_live,
    create_stats,
    live_presence,
)
from fvdengine.opening import (
    OpenOptions,
    OpenPlan,
    open_device,
    open_plan,
    state_sizes,
    wait_for_data_servers,
)
from fvdengine.overlay import session_in
from fvdengine.profile import Extent, read_beside, read_profile
from fvdengine.uris import is_uri, parse_uri

DRAIN_SECONDS: Final = 60.0
BASE_TIMEOUT_DEFAULT: Final = 60.0
JITTER_SECONDS_MAX: Final = 3600
CACHE_MODES: Final = ("writeback", "writethrough", "none")
ON_FULL: Final = ("error", "wait")
PREFETCH_POLICIES: Final = ("polite", "eager", "fixed")
PREFETCH_STATES: Final = ("disabled", "waiting", "running", "paused", "done", "failed")

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a worker needs of a fvdcore.Device, which fvdengine opens for it."""

    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def image_uuid(self) -> bytes: ...
    @property
    def open_session(self) -> bytes: ...
    @property
    def event_fd(self) -> int: ...
    def start(self) -> None: ...
    def serve(
        self,
        take_fd: int,
        *,
        structured: bool = False,
        block_status_id: int | None = None,
        read_only: bool = False,
        received: bytes = b"",
    ) -> int: ...
    def hand_over(self, timeout: float) -> list[tuple[int, int, bytes]] | None: ...
    def connections(self) -> list[int]: ...
    def take_events(self) -> list[tuple[str, Any]]: ...
    def status(self) -> dict[str, object]: ...
    def block_status(self, offset: int, length: int) -> list[tuple[int, str]]: ...
    def flush(self) -> None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def resize(self, size: int) -> None: ...
    def trace_start(self) -> None: ...
    def trace_take(self) -> tuple[bytes, int]: ...
    def trace_stop(self) -> None: ...
    def update(self, values: Mapping[str, int], *, keep_copy_on_read: bool = False) -> None: ...
    def prefetch_start(self) -> None: ...
    def prefetch_pause(self) -> None: ...
    def prefetch_control(
        self, *, policy: str | None = None, budget: int | None = None
    ) -> None: ...
    def close_base(self) -> None: ...
    def first_reads(self) -> list[tuple[int, int]]: ...
    def storage_grown(self, ok: bool) -> None: ...
    def drain(self, timeout: float) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parted:
    """A connection between two workers: its socket, and a memory file with the `length` bytes that
    were received beyond the last whole message."""

    fd: int
    memory: int
    length: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """How an image is to be opened; None leaves a choice to the image. `image_id` says which file
    has to have the name, where that is known: another one is refused before anything is written."""

    image: str
    image_id: tuple[int, int] | None = None
    # Which session the image has unless somebody else opened it for writing; empty: not known.
    sessions: tuple[str, ...] = ()
    # The session that an opening for writing shall have, in hex; empty: one of the worker's choice.
    session: str = ""
    read_only: bool = False
    live_dir: Path | None = None
    takeover: bool = False
    owner_held: bool = False
    allow_dirs: tuple[str, ...] = ()
    allow_uris: tuple[str, ...] = ()
    base_timeout: float = BASE_TIMEOUT_DEFAULT
    accept_changed_base: bool = False
    discard_live_state: bool = False
    copy_on_read: bool | None = None
    prefetch_delay: int | None = None
    # A start delay becomes longer by a random part of it, up to this share.
    prefetch_jitter: float = 0.0
    prefetch_policy: str = PREFETCH_POLICIES[0]
    prefetch_budget: int = 0
    fetch_size: int | None = None
    # A boot profile that shall be recorded, or be followed. One that is of no use is refused, or
    # only warned of.
    record_profile: str = ""
    replay_profile: str = ""
    is_profile_needed: bool = True
    # What changes do that find no space, and who makes a block device longer.
    cache: str = CACHE_MODES[0]
    on_full: str = "error"
    grow_program: str = ""
    allow_builtin_grow: bool = False
    attachment: uuid.UUID | None = None
    # A statistics page of the caller's, for an image without a live directory.
    stats_fd: int = -1

    @classmethod
    def from_arguments(cls, arguments: Arguments) -> Self:
        """Read the op `open` of the control channel."""
        cache = arguments.text("cache", CACHE_MODES[0])
        if cache not in CACHE_MODES:
            raise Failure("bad_request", f"cache must be one of {', '.join(CACHE_MODES)}")
        on_full = arguments.text("on_full", ON_FULL[0])
        if on_full not in ON_FULL:
            raise Failure("bad_request", f"on_full must be one of {', '.join(ON_FULL)}")
        policy = arguments.text("prefetch_policy", PREFETCH_POLICIES[0])
        if policy not in PREFETCH_POLICIES:
            raise Failure("bad_request", f"prefetch_policy: one of {', '.join(PREFETCH_POLICIES)}")
        live_dir = arguments.optional_text("live_dir")
        attachment = arguments.optional_text("attachment")
        try:
            attachment_uuid = uuid.UUID(attachment) if attachment else None
        except ValueError:
            raise Failure("bad_request", "the argument attachment must be a UUID") from None
        return cls(
            image=arguments.text("image"),
            image_id=arguments.pair("image_id"),
            sessions=arguments.texts("sessions"),
            session=arguments.hex("session", 16),
            read_only=arguments.flag("read_only"),
            live_dir=Path(live_dir) if live_dir is not None else None,
            takeover=arguments.flag("takeover"),
            owner_held=arguments.flag("owner_held"),
            allow_dirs=arguments.texts("allow_dirs"),
            allow_uris=arguments.texts("allow_uris"),
            base_timeout=arguments.seconds("base_timeout", BASE_TIMEOUT_DEFAULT),
            accept_changed_base=arguments.flag("accept_changed_base"),
            discard_live_state=arguments.flag("discard_live_state"),
            copy_on_read=arguments.optional_flag("copy_on_read"),
            prefetch_delay=arguments.optional_number("prefetch_delay"),
            prefetch_jitter=arguments.seconds("prefetch_jitter", 0.0),
            prefetch_policy=policy,
            prefetch_budget=arguments.optional_number("prefetch_budget") or 0,
            fetch_size=arguments.optional_number("fetch_size"),
            record_profile=arguments.text("record_profile", ""),
            replay_profile=arguments.text("replay_profile", ""),
            is_profile_needed=not arguments.flag("profile_is_hint"),
            cache=cache,
            on_full=on_full,
            grow_program=arguments.text("grow_program", ""),
            allow_builtin_grow=arguments.flag("allow_builtin_grow"),
            attachment=attachment_uuid,
        )


@contextlib.contextmanager
def _planned(request: OpenRequest) -> Iterator[OpenPlan]:
    with open_plan(request.image, _options(request)) as plan:
        found = file_id(os.fstat(plan.layers[0].fd))
        if request.image_id not in (None, found):
            raise Failure(
                "image_replaced",
                f"{request.image} is another file by now than the image of the device",
                "try again; where the device has failed, give the image its name back first, then: "
                "fvdctl recover NAME",
            )
        if not (request.takeover or request.discard_live_state):
            check_session(request.image, request.sessions, request.live_dir, plan.header)
        yield plan


BeforeEngine = Callable[[OpenPlan, bool], None]
"""Told the plan, and whether a program will make the storage longer."""
BeforeState = Callable[[], None]


def _nothing(*_: object) -> None:
    """Do nothing before the engine starts."""


class OpenedImage:
    """An open image with its engine running."""

    def __init__(
        self, plan: OpenPlan, device: Engine, state: LiveState | None, grower: Grower | None = None
    ) -> None:
        self.plan = plan
        self.device = device
        self._state = state
        self._grower = grower
        # The header's fields as `update` left them; sizes are those of the opening.
        self.header = plan.header
        self.updating = threading.Lock()
        fd = plan.layers[0].storage[0]
        self.data_id = file_id(os.fstat(fd)) if fd >= 0 else None
        self.image_id = file_id(os.fstat(plan.layers[0].fd))
        # Decided by whoever opened the image, whatever the header says.
        self.is_copy_on_read_fixed = False
        self.recording = Recording()

    @classmethod
    def open(
        cls,
        request: OpenRequest,
        before_engine: BeforeEngine = _nothing,
        before_state: BeforeState = _nothing,
    ) -> Self:
        """Lock, validate, adopt or make the live state, start the engine. Blocks.

        `before_state` is called when all that can be waited for is there and nothing was written;
        `before_engine` when every file is open and no thread of the engine runs yet.
        """
        if not request.takeover:
            return cls._open(request, before_engine, before_state)
        if request.live_dir is None or request.read_only:
            raise Failure("bad_request", "a takeover is for writing and needs the live state")
        afresh = replace(request, takeover=False)
        if live_presence(request.live_dir) is not LivePresence.ABSENT:
            with _planned(request) as plan:
                if not plan.header.is_clean:
                    with contextlib.suppress(LiveStateUnfinished):
                        return cls._start(request, plan, before_engine, before_state)
        # Never by discarding: if another directory holds live state of this image, that is refused.
        _log.info("nothing to take over, starting afresh", extra=fields(image=request.image))
        return cls._open(afresh, before_engine, before_state)

    @classmethod
    def _open(
        cls, request: OpenRequest, before_engine: BeforeEngine, before_state: BeforeState
    ) -> Self:
        with _planned(request) as plan:
            return cls._start(request, plan, before_engine, before_state)

    @classmethod
    def _start(
        cls,
        request: OpenRequest,
        plan: OpenPlan,
        before_engine: BeforeEngine,
        before_state: BeforeState,
    ) -> Self:
        if not request.takeover:  # a successor has to serve at once
            for waiting in wait_for_data_servers(plan):
                _log.warning("waiting", extra=fields(reason=waiting))
        # The engine maps the page, so the descriptor of a reader's is needed no longer than this.
        with contextlib.ExitStack() as closing, contextlib.ExitStack() as undo:
            state = None
            if request.live_dir is not None and request.takeover:
                state = adopt_live(request.live_dir, plan)
                undo.callback(state.close)
            before_state()
            if state is None and request.live_dir is not None and not request.read_only:
                attachment = request.attachment or uuid.uuid4()
                session = bytes.fromhex(request.session) or None
                state = create_live(request.live_dir, plan, attachment.bytes, session=session)
                undo.callback(state.close)
            stats_fd = state.stats_fd if state is not None else request.stats_fd
            if request.live_dir is not None and request.read_only:
                stats_fd = create_stats(request.live_dir)
                closing.callback(os.close, stats_fd)
            program = _grow_program(request, plan)
            recording = _recording(request, plan)
            undo.callback(recording.close)
            order = _order(request, plan)
            before_engine(plan, bool(program))
            device: Engine = open_device(
                plan,
                live_fd=state.live_fd if state is not None else -1,
                stats_fd=stats_fd,
                open_session=state.header.open_session if state is not None else None,
                copy_on_read=request.copy_on_read,
                prefetch_delay=_start_delay(request, plan),
                on_full=request.on_full,
                can_grow=bool(program),
                fetch_size=request.fetch_size,
                prefetch_policy=request.prefetch_policy,
                record_reads=recording.fd >= 0,
                fetch_first=order,
            )
            undo.callback(device.close)
            if request.prefetch_budget:
                device.prefetch_control(budget=request.prefetch_budget)
            device.start()
            recording.start(device.first_reads)
            undo.pop_all()
        for warning in plan.warnings:
            _log.warning("opened with a warning", extra=fields(warning=warning))
        path = os.path.abspath(plan.layers[0].storage[1])
        image = cls(plan, device, state, Grower(device, program, path) if program else None)
        image.is_copy_on_read_fixed = request.copy_on_read is not None
        image.recording = recording
        return image

    def serve(self, sock: socket.socket, agreed: Negotiated | None = None) -> int:
        """Give a connected socket to the engine for good; returns the connection's id.

        Without a handshake (the kernel's client has none) replies are simple. When the engine
        does not take it the socket is closed, and OSError says why.
        """
        return self._serve(sock.detach(), agreed, b"")

    def _serve(self, take_fd: int, agreed: Negotiated | None, received: bytes) -> int:
        try:
            connection = self.device.serve(
                take_fd,
                structured=agreed is not None and agreed.structured,
                block_status_id=agreed.block_status_id if agreed is not None else None,
                read_only=self.device.read_only,
                received=received,
            )
        except ValueError as error:
            # The device is closing; only then the descriptor is still ours.
            os.close(take_fd)
            raise OSError(errno.ESHUTDOWN, str(error)) from error
        except Exception as error:
            raise OSError(getattr(error, "errno", 0), str(error)) from error
        return connection

    def hand_over(self, seconds: float) -> list[Parted] | None:
        """Stop all connections between two messages and give them away; None: they go on."""
        given = self.device.hand_over(seconds)
        return None if given is None else [_parted(fd, rest) for _, fd, rest in given]

    def resume(self, parted: Parted) -> int:
        """Go on with a connection where another worker stopped; returns its id. Takes the socket,
        leaves the memory file."""
        try:
            received = os.pread(parted.memory, parted.length, 0)
            if len(received) != parted.length:
                raise OSError(errno.EPROTO, "less was received than was said")
        except OSError:
            os.close(parted.fd)
            raise
        return self._serve(parted.fd, None, received)

    @property
    def session(self) -> str:
        """The session of the last opening for writing, which is this one unless it is a reader."""
        if self.device.read_only:
            return session_in(self.plan.header)
        return self.device.open_session.hex()

    @property
    def parked(self) -> int:
        """Requests that wait for space."""
        parked = self.device.status()["parked"]
        return parked if isinstance(parked, int) else 0

    @property
    def data(self) -> str:
        """The path of the file or block device with the data; "" where a server has them."""
        fd, path = self.plan.layers[0].storage
        return os.path.abspath(path) if fd >= 0 else ""

    @property
    def grows(self) -> bool:
        """Whether a program makes the storage longer when it is full."""
        return self._grower is not None

    def take_events(self) -> list[Message]:
        """Fetch what the engine has to tell, as events of the control channel. What it asks for
        is begun; so this belongs into the event loop."""
        events = [self._event(kind, value) for kind, value in self.device.take_events()]
        if {"event": "prefetch", "state": "done"} in events:
            # A read may still wait there for a disk that hangs.
            threading.Thread(target=self._close_base, name="base", daemon=True).start()
        if self._grower is not None:
            for event in events:
                self._grower.take_event(event)
        return events

    def _close_base(self) -> None:
        with contextlib.suppress(ValueError):  # the device is closing
            self.device.close_base()

    def _event(self, kind: str, value: Any) -> Message:
        match kind:
            case "connection_closed":
                return {"event": kind, "connection": value}
            case "prefetch":
                return {"event": kind, "state": PREFETCH_STATES[value]}
            case "fault":
                return {"event": kind, **_named(value), "image": self.plan.path}
            case "failed":
                number, base = value.pop("errno"), value.pop("of_base")
                layers = self.plan.layers
                file = layers[1].path if base and len(layers) > 1 else self.plan.path
                named = _named(number)
                if base and (said := _said_of_base(self.plan)):
                    named["meaning"] = f"{named['meaning']} ({said})"
                return {"event": kind, **value, **named, "file": file, "of_base": base}
            case "parked":
                return {"event": kind, "requests": value}
            case "grow":
                return {"event": kind, "bytes": value}
        return {"event": kind, "value": value}

    def close(self) -> None:
        """Finish what is in flight, write everything, mark the image clean. Blocks.

        When this raises, the image is as a dead process would leave it, live state included.
        """
        if not self.device.drain(DRAIN_SECONDS):
            _log.warning("requests were still in flight", extra=fields(seconds=DRAIN_SECONDS))
        self.recording.finish(self.device.first_reads())
        try:
            self.device.close()
        except Exception as error:
            raise self._close_failure(error) from error
        if self._state is not None:
            self._state.remove()

    def _close_failure(self, error: Exception) -> Exception:
        """Say what a close that failed means, where the engine says why."""
        number = getattr(error, "errno", 0)
        if not number:
            return error
        reason = os.strerror(number)
        remedy = "Look for errors of the disk in the kernel log"
        fd, path = self.plan.layers[0].storage
        if fd < 0:
            reason += f", with its data on the server {parse_uri(path).shown}"
            remedy = "See that this server runs"
        elif number in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Make room for it"
        has_state = self._state is not None
        again = "start it again with the same state directory" if has_state else "open it again"
        return CloseFailed(path=self.plan.path, reason=reason, remedy=remedy, again=again)


def _options(request: OpenRequest) -> OpenOptions:
    return OpenOptions(
        read_only=request.read_only,
        allow_dirs=request.allow_dirs,
        allow_uris=request.allow_uris,
        base_timeout=request.base_timeout,
        accept_changed_base=request.accept_changed_base,
        discard_live_state=request.discard_live_state,
        takeover=request.takeover,
        owner_held=request.owner_held,
        cache=request.cache,
    )


def _start_delay(request: OpenRequest, plan: OpenPlan) -> int | None:
    """When prefetch starts; later by chance, so that many clones do not start together."""
    delay = request.prefetch_delay
    if delay is None:
        delay = plan.header.prefetch_start_delay
    spread = int(min(delay, JITTER_SECONDS_MAX) * request.prefetch_jitter) if delay > 0 else 0
    return delay + random.randint(0, spread)  # noqa: S311 (a spread, not a secret)


def _recording(request: OpenRequest, plan: OpenPlan) -> Recording:
    """The profile that is recorded."""
    try:
        return Recording.open(request.record_profile, goes_on=request.takeover)
    except (UnusableProfile, OSError) as error:  # OSError: no space to mend what a crash left
        if request.is_profile_needed:
            raise
        plan.warnings.append(f"{error}; nothing is recorded any more")
        return Recording()


def _order(request: OpenRequest, plan: OpenPlan) -> list[Extent]:
    """What prefetch fetches first: as the profile says that was named, or that lies beside the
    base, which may be worth a warning and is no reason not to open."""
    if request.replay_profile:
        try:
            return read_profile(request.replay_profile)
        except UnusableProfile as error:
            if request.is_profile_needed:
                raise
            plan.warnings.append(f"{error.message}; prefetch goes without it")
            return []
    if len(plan.layers) < 2 or is_uri(plan.layers[1].path):
        return []
    base = plan.layers[1].remote
    if base is not None and base.is_late:  # what lies beside it does not answer either
        return []
    try:
        return read_beside(plan.layers[1].path)
    except UnusableProfile as error:
        plan.warnings.append(f"{error.message}; prefetch goes without it")
        return []


def _grow_program(request: OpenRequest, plan: OpenPlan) -> str:
    """Who makes the storage longer; nobody where it is a file, or the layout needs no more."""
    if request.read_only or not plan.header.table_size:
        return ""
    if not is_block_device(plan.layers[0].storage[0]):
        return ""
    return choose_program(
        request.grow_program, plan.header.add_storage_cmd, allow_builtin=request.allow_builtin_grow
    )


def preload() -> None:
    """Load the engine, so that the next open is quick."""
    state_sizes(0)


def _parted(fd: int, rest: bytes) -> Parted:
    memory = os.memfd_create("received", os.MFD_CLOEXEC)
    os.pwrite(memory, rest, 0)
    return Parted(fd, memory, len(rest))


def _said_of_base(plan: OpenPlan) -> str:
    """Why the base could not be read, where a child reads it that says so."""
    remote = plan.layers[-1].remote
    if remote is None:
        return ""
    # Imported here: a worker over a local base must start quickly.
    from fvdengine.children import said_lately

    return said_lately(remote.uri)


def _named(number: int) -> Message:
    """An errno with its name and what it means."""
    name = errno.errorcode.get(number, str(number))
    return {"errno": number, "error": name, "meaning": os.strerror(number)}


@functools.cache
def engine_version() -> str:
    """The version of the installed package, or a dash in a checkout that is not installed."""
    # Imported here: it is slow, and nobody asks before the device is served.
    from importlib import metadata

    try:
        return metadata.version("fvd")
    except metadata.PackageNotFoundError:
        return "-"
