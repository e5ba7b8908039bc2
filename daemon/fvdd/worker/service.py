# SPDX-License-Identifier: Apache-2.0
"""A worker under fvdd: one image, opened, served and closed as the control channel says.

fvdd holds the other end of the first channel; after a restart it comes back through the socket
in the worker's directory. A worker outlives fvdd: losing the channel changes nothing for the
device, and signals are ignored until fvdd has asked for a stop. Only when nobody can reach the
worker any more (no directory) and no connection is left does it close the image by itself. One that
was started to end with fvdd (a copier) does so at once, as if it were killed.

Requests run side by side, each answered under its id, so that a slow flush holds back no status.
What changes the life of the image (open, stop) is done one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from fvdd.attach.handshake import transmission_flags
from fvdd.attach.unix_socket import short_path
from fvdd.log import about, fields
from fvdd.priority import hurry_no_more
from fvdd.worker.arguments import Arguments
from fvdd.worker.channel import Channel, ChannelError, Message, close_all
from fvdd.worker.command_line import replace_word
from fvdd.worker.confinement import confine_for
from fvdd.worker.copying import copy_out, fold
from fvdd.worker.failure import Failure, as_failure
from fvdd.worker.mirroring import MirrorRole
from fvdd.worker.opened import (
    PREFETCH_POLICIES,
    OpenedImage,
    OpenRequest,
    Parted,
    engine_version,
    preload,
)
from fvdd.worker.relaying import RelayRole
from fvdd.worker.resizing import resize
from fvdd.worker.sampling import CELLS_MAX, list_extents, sample_map
from fvdd.worker.tracing import SECONDS_MAX, begin_trace, run_trace
from fvdd.worker.updating import update
from fvdengine.live import LivePresence, live_presence
from fvdengine.opening import OpenPlan

CONTROL_SOCKET: Final = "control.sock"
REQUESTS_MAX: Final = 64
THREADS_MAX: Final = 16
FAILURES: Final = ("failed", "fault", "failures_lost")
PEERS_BACKLOG: Final = 8
HAND_OVER_SECONDS: Final = 5
SECTOR: Final = 512

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def _before_engine(plan: OpenPlan, can_grow: bool) -> None:
    hurry_no_more()  # what the engine's threads do is work for others, and theirs to weigh
    confine_for(plan, can_grow)


@dataclass(frozen=True, slots=True)
class HandedOver:
    """An answer with connections that belong to whoever asked, once it is sent."""

    message: Message
    connections: list[Parted]


class WorkerService:
    """The state of one worker process and its ops."""

    def __init__(self, directory: Path | None, ends_with_channel: bool = False) -> None:
        self._directory = directory
        self._ends_with_channel = ends_with_channel
        self._image: OpenedImage | None = None
        self._life = asyncio.Lock()
        self._stop_asked = False
        self._close_error: Exception | None = None
        self._has_served = False
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._peers: dict[Channel, set[asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="control")
        self._relaying = RelayRole(lambda: self._directory, self._blocking)
        self._mirroring = MirrorRole(self._blocking)
        self._ops: dict[str, Callable[[Arguments, list[int]], Awaitable[Message | HandedOver]]] = {
            "open": self._open,
            "serve": self._serve,
            "status": self._status,
            "flush": self._flush,
            "prefetch": self._prefetch,
            "stop": self._stop,
            "ping": self._ping,
            "prepare": self._prepare,
            "assign": self._assign,
            "hand_over": self._hand_over,
            "resume": self._resume,
            "map": self._map,
            "extents": self._extents,
            "resize": self._resize,
            "update": self._update,
            "relay": self._relaying.relay,
            "relay_to": self._relaying.relay_to,
            "relay_part": self._relay_part,
            "trace": self._trace,
            "copy_out": self._copy_out,
            "fold": self._fold,
            "mirror": self._mirror,
        }

    async def run(self, control: socket.socket) -> int:
        """Serve until a stop was asked for and done; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        self._begin(self._attend(Channel(control)))
        try:
            return await self._done
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._executor.shutdown(wait=False)

    # Who may talk to us.

    def _listen(self, directory: Path) -> socket.socket:
        """Listen in the directory, in the place of a predecessor: only who has the image may."""
        path = directory / CONTROL_SOCKET
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        umask = os.umask(0o177)
        try:
            with short_path(path) as name:
                sock.bind(name)
        finally:
            os.umask(umask)
        sock.listen(PEERS_BACKLOG)
        sock.setblocking(False)
        return sock

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                pid, uid, _ = struct.unpack(
                    "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                )
                if uid not in (0, os.geteuid()):
                    _log.warning("refused a control connection", extra=fields(pid=pid, uid=uid))
                    sock.close()
                    continue
                _log.info("control connection", extra=fields(pid=pid))
                self._begin(self._attend(Channel(sock)))

    async def _attend(self, channel: Channel) -> None:
        """Read one peer's requests until he leaves."""
        running: set[asyncio.Task[None]] = set()
        self._peers[channel] = running
        try:
            while (packet := await channel.receive()) is not None:
                message, descriptors = packet
                task = self._begin(
                    self._answer(channel, message, descriptors, len(running) >= REQUESTS_MAX)
                )
                running.add(task)
                task.add_done_callback(running.discard)
            if self._ends_with_channel:
                # What it does is of no use to anybody, and a successor waits for its locks.
                _log.warning("fvdd is gone, so this process ends in the middle of its work")
                os._exit(1)
        except ChannelError as error:
            _log.warning("control connection dropped", extra=fields(reason=error))
        finally:
            del self._peers[channel]
            if not self._peers:  # it is of no use to a later fvdd
                await self._mirroring.drop()
            # Requests under way go on: a stop that was asked for is done although nobody waits.
            if running:
                await asyncio.wait(running)
            channel.close()
        _log.info("control connection closed")
        self._close_if_unreachable()

    async def _answer(
        self, channel: Channel, message: Message, descriptors: list[int], is_flooded: bool
    ) -> None:
        answer: Message = {"id": message.get("id"), "ok": True}
        given: list[Parted] = []
        op = str(message.get("op"))
        try:
            handler = self._ops.get(op)
            if handler is None:
                raise Failure("unknown_op", f"the worker knows no op {op!r}")
            if is_flooded:
                raise Failure("too_many_requests", f"more than {REQUESTS_MAX} requests at once")
            result = await handler(Arguments(message), descriptors)
            if isinstance(result, HandedOver):
                given, result = result.connections, result.message
            answer |= result
        except Exception as error:
            failure = as_failure(error)
            if failure.is_unexpected:
                _log.exception("op failed", extra=fields(op=op))
            answer = {"id": message.get("id"), "ok": False, "error": failure.as_message()}
        finally:
            close_all(descriptors)
        passed = [fd for parted in given for fd in (parted.fd, parted.memory)]
        try:
            await channel.send(answer, passed)
        except (OSError, ChannelError):
            # Who asked for the connections has gone: they go on here.
            self._take_back(given)
        else:
            close_all(passed)
        if op == "stop" and self._stop_asked and self._image is None:
            self._finish(0 if answer["ok"] else 1)

    # The ops.

    async def _ping(self, arguments: Arguments, descriptors: list[int]) -> Message:
        answer: Message = {
            "pid": os.getpid(),
            "version": engine_version(),
            "open": self._image is not None,
        }
        if self._image is not None:
            answer |= _description(self._image)
            answer["connections"] = list(self._image.device.connections())
        return answer

    async def _open(self, arguments: Arguments, descriptors: list[int]) -> Message:
        request = OpenRequest.from_arguments(arguments)
        if name := arguments.text("name", ""):
            about(name=name)
        async with self._life:
            if self._image is not None or self._stop_asked:
                raise Failure("already_open", "this worker has its image already")
            image = await self._blocking(lambda: OpenedImage.open(request, _before_engine))
            self._image = image
            asyncio.get_running_loop().add_reader(image.device.event_fd, self._take_events)
            if self._directory is not None:
                self._begin(self._accept_all(self._listen(self._directory)))
        return {"pid": os.getpid(), **_description(image)}

    async def _serve(self, arguments: Arguments, descriptors: list[int]) -> Message:
        image = self._opened()
        if not descriptors:
            raise Failure("bad_request", "serve needs at least one socket")
        connections: list[int] = []
        while descriptors:
            try:
                sock = socket.socket(fileno=descriptors[0])
            except OSError as error:
                raise Failure("bad_request", f"a descriptor is no socket ({error})") from error
            del descriptors[0]
            with sock:
                if sock.type != socket.SOCK_STREAM:
                    raise Failure("bad_request", "only connected stream sockets can be served")
                sock.setblocking(True)
                connections.append(image.serve(sock))
        self._has_served = True
        return {"connections": connections}

    async def _prepare(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Load everything that opening needs, and say whether this version knows the live state."""
        directory = arguments.optional_text("live_dir")
        async with self._life:  # what is asked meanwhile needs all that, too
            await self._blocking(preload)
        if directory is not None and live_presence(directory) is LivePresence.INVALID:
            raise Failure(
                "live_state_unknown",
                f"version {engine_version()} does not know the live state in {directory}",
                "the device works on; detach it and attach it again to change the version",
            )
        return {"pid": os.getpid(), "version": engine_version()}

    async def _assign(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Become the worker of a directory, which the command line then names, so that a later fvdd
        finds this process by it."""
        directory = arguments.text("directory")
        async with self._life:
            if self._image is not None or self._stop_asked:
                raise Failure("already_open", "this worker has its image already")
            if not replace_word(os.fsencode(self._directory or ""), os.fsencode(directory)):
                raise Failure("bad_request", "the worker's command line has no room for that name")
            self._directory = Path(directory)
        return {"pid": os.getpid()}

    async def _hand_over(self, arguments: Arguments, descriptors: list[int]) -> HandedOver:
        image = self._opened()
        seconds = arguments.optional_number("seconds") or HAND_OVER_SECONDS
        # Nobody is kept waiting for what will not end.
        given = None if image.parked else await self._blocking(lambda: image.hand_over(seconds))
        if given is None and image.parked:
            raise Failure(
                "storage_full",
                f"{image.parked} writes wait for space on the storage of {image.plan.path}",
                "make space there, then try again",
            )
        if given is None:
            raise Failure(
                "worker_busy",
                f"requests of the device did not end within {seconds} s, so that it went on",
                "try again when the base or the disk of the image answers faster",
            )
        return HandedOver({"received": [parted.length for parted in given]}, given)

    async def _relay_part(self, arguments: Arguments, descriptors: list[int]) -> HandedOver:
        seconds = arguments.seconds("seconds", HAND_OVER_SECONDS)
        given = await self._relaying.relay_part(seconds)
        return HandedOver({"received": [parted.length for parted in given]}, given)

    def _take_back(self, given: list[Parted]) -> None:
        if self._relaying.take_back(given):
            return
        for parted in given:
            if self._image is not None:
                _log.warning("a connection was not taken over and goes on here")
                self._image.resume(parted)
            else:
                os.close(parted.fd)
            os.close(parted.memory)

    async def _resume(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Go on with connections that a predecessor gave away: sockets, then what they received."""
        image = self._opened()
        lengths = arguments.numbers("received")
        if len(descriptors) != 2 * len(lengths):
            raise Failure("bad_request", "resume needs two descriptors for each connection")
        count = len(lengths)
        connections = []
        for at, length in enumerate(lengths):
            fd = os.dup(descriptors[2 * at])
            connections.append(image.resume(Parted(fd, descriptors[2 * at + 1], length)))
        self._has_served = self._has_served or count > 0
        return {"connections": connections}

    async def _status(self, arguments: Arguments, descriptors: list[int]) -> Message:
        image = self._opened()
        status = await self._blocking(image.device.status)
        mine = {"pid": os.getpid(), "version": engine_version(), "cache": image.plan.options.cache}
        return {**status, **mine}

    async def _map(self, arguments: Arguments, descriptors: list[int]) -> Message:
        cells = arguments.optional_number("cells") or 1
        if not 1 <= cells <= CELLS_MAX:
            raise Failure("bad_request", f"a map has 1 to {CELLS_MAX} cells")
        device = self._opened().device
        return await self._blocking(lambda: sample_map(device, cells))

    async def _extents(self, arguments: Arguments, descriptors: list[int]) -> Message:
        offset, device = arguments.optional_number("offset") or 0, self._opened().device
        if not 0 <= offset <= device.size or offset % SECTOR:
            raise Failure("bad_request", "extents begin at a sector of the disk")
        return await self._blocking(lambda: list_extents(device, offset))

    async def _trace(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Write what the device does from now on into the given pipe, for so many seconds."""
        image = self._opened()
        seconds = arguments.seconds("seconds", 1.0)
        if len(descriptors) != 1 or seconds > SECONDS_MAX:
            raise Failure("bad_request", f"trace needs one pipe and at most {SECONDS_MAX} s")
        pipe = os.dup(descriptors[0])
        try:
            begin_trace(image.device.trace_start)
        except Exception:
            os.close(pipe)
            raise
        about: dict[str, object] = {
            "image": image.plan.path,
            "size": image.device.size,
            "version": engine_version(),
        }
        # A thread of its own: it runs for long, and what is left of it ends with the process.
        words = (image.device, pipe, seconds, about)
        threading.Thread(target=run_trace, args=words, name="trace", daemon=True).start()
        return {}

    async def _copy_out(self, arguments: Arguments, descriptors: list[int]) -> Message:
        device, target = self._opened().device, _only(descriptors)
        name = arguments.text("name", "the copy")
        return {"written": await self._blocking(lambda: copy_out(device, target, name))}

    async def _fold(self, arguments: Arguments, descriptors: list[int]) -> Message:
        device, overlay = self._opened().device, _only(descriptors)
        name = arguments.text("name")
        return {"written": await self._blocking(lambda: fold(device, overlay, name))}

    async def _mirror(self, arguments: Arguments, descriptors: list[int]) -> Message:
        device, step = self._opened().device, arguments.text("step")
        name = arguments.text("name", "the copy")
        return await self._mirroring.step(device, step, name, descriptors)

    async def _flush(self, arguments: Arguments, descriptors: list[int]) -> Message:
        await self._blocking(self._opened().device.flush)
        return {}

    async def _prefetch(self, arguments: Arguments, descriptors: list[int]) -> Message:
        device = self._opened().device
        policy, budget = arguments.optional_text("policy"), arguments.optional_number("budget")
        if policy is not None and policy not in PREFETCH_POLICIES:
            raise Failure("bad_request", f"a policy is one of {', '.join(PREFETCH_POLICIES)}")
        actions: dict[str, Callable[[], None]] = {
            "start": device.prefetch_start,
            "pause": device.prefetch_pause,
            "control": lambda: device.prefetch_control(policy=policy, budget=budget),
        }
        action = actions.get(arguments.text("action"))
        if action is None:
            raise Failure("bad_request", f"prefetch knows the actions {', '.join(actions)}")
        try:
            await self._blocking(action)
        except ValueError as error:  # a read-only device cannot prefetch
            raise Failure("bad_request", str(error)) from None
        return {}

    async def _resize(self, arguments: Arguments, descriptors: list[int]) -> Message:
        image, text = self._opened(), arguments.text("size")
        sector = arguments.optional_number("sector") or SECTOR
        return await self._blocking(lambda: resize(image, text, sector))

    async def _update(self, arguments: Arguments, descriptors: list[int]) -> Message:
        image, assignments = self._opened(), arguments.mapping("fields")
        return await self._blocking(lambda: update(image, assignments))

    async def _stop(self, arguments: Arguments, descriptors: list[int]) -> Message:
        self._stop_asked = True
        await self._mirroring.drop()
        async with self._life:
            image, self._image = self._image, None
            if image is not None:
                asyncio.get_running_loop().remove_reader(image.device.event_fd)
                # When this fails the image is let go all the same, as a dead worker would leave
                # it: the live state stays, and a successor can take over and try again.
                try:
                    await self._on_thread(image.close)
                except Exception as error:
                    self._close_error = error
            # Whoever asks again must not hear that all is well.
            if self._close_error is not None:
                raise self._close_error
        return {}

    # Life.

    def _opened(self) -> OpenedImage:
        if self._image is None:
            raise _not_open()
        return self._image

    def _take_events(self) -> None:
        if self._image is None:
            return
        for event in self._image.take_events():
            # What failed is in one log line: fvdd's, or ours when no fvdd is there to hear of it.
            if event["event"] not in FAILURES:
                level = logging.WARNING if event.get("requests") else logging.INFO
                _log.log(level, "event", extra=fields(**event))
            elif not self._peers:
                _log.error("engine event", extra=fields(**event))
            for channel in self._peers:
                self._begin(_tell(channel, event))
        self._close_if_unreachable()

    def _close_if_unreachable(self) -> None:
        # In its directory a later fvdd finds a worker, but only one that served is worth keeping.
        is_reachable = self._directory is not None and self._has_served
        if self._peers or is_reachable or self._stop_asked:
            return
        if self._relaying.is_taken:
            self._begin(self._bring_home())
        elif self._image is None:
            self._finish(0)
        elif not self._image.device.connections():
            _log.warning("nobody is left to serve or to obey, closing the image")
            self._begin(self._close_alone())

    async def _bring_home(self) -> None:
        self._finish(0 if await self._relaying.come_home() else 1)

    async def _close_alone(self) -> None:
        try:
            await self._stop(Arguments({}), [])
        except Exception as error:
            _log.error("closing failed", extra=fields(reason=error))
            self._finish(1)
        else:
            self._finish(0)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop_asked:
            _log.warning("killed while stopping", extra=fields(signal=number.name))
            os._exit(128 + number)
        _log.warning("signal ignored: fvdd stops its workers", extra=fields(signal=number.name))

    def _finish(self, status: int) -> None:
        if not self._done.done():
            self._done.set_result(status)

    def _begin(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _blocking(self, call: Callable[[], _T]) -> _T:
        """Run a call on a thread. One that the end of the device overtakes finds it closed, which
        the engine tells as a ValueError."""
        try:
            return await self._on_thread(call)
        except ValueError as error:
            if self._stop_asked:
                raise _not_open() from error
            raise

    async def _on_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def _not_open() -> Failure:
    return Failure("not_open", "this worker has no open image")


def _only(descriptors: list[int]) -> int:
    if len(descriptors) != 1:
        raise Failure("bad_request", "this op needs one descriptor")
    return descriptors[0]


def _description(image: OpenedImage) -> Message:
    base = image.plan.layers[1] if len(image.plan.layers) > 1 else None
    return {
        "size": image.device.size,
        "block_size": image.device.block_size,
        "image_uuid": image.device.image_uuid.hex(),
        "session": image.session,
        "flags": int(transmission_flags(image.device.read_only)),
        "warnings": [str(warning) for warning in image.plan.warnings],
        "base": base.path if base is not None else "",
        "base_format": base.format if base is not None else "",
        "data": image.data,
        "data_id": image.data_id,
        "image_id": image.image_id,
        "grows": image.grows,
    }


async def _tell(channel: Channel, event: Message) -> None:
    with contextlib.suppress(OSError, ChannelError):
        await channel.send(event)
