# SPDX-License-Identifier: Apache-2.0
"""Workers from the outside: start one, give it sockets, stop it, be sure that it is gone.

The rules that keep data safe across a death live here: a successor starts only when the old
process is gone (its pidfd says so, and the image's writer lock besides), and the kernel gets
sockets only after the successor serves them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from fvdapi.errors import ApiError
from fvdd.config import Restarts
from fvdd.worker.client import WorkerError, WorkerLost, WorkerProcess

# The kernel needs a moment to take a killed process down; longer means a process stuck in I/O.
GONE_LIMIT_SECONDS: Final = 30.0
SOCKET_BUFFER_BYTES: Final = 4 << 20
SCOPE_LIMIT_SECONDS: Final = 20.0

log = logging.getLogger("fvdd.devices")

# What may go wrong while talking to a worker.
WORKER_FAULTS: Final = (WorkerError, WorkerLost, TimeoutError, OSError)


class Worker(Protocol):
    """The part of fvdd.worker.client.WorkerProcess that devices use."""

    pid: int
    events: asyncio.Queue[dict[str, object]]

    @property
    def is_running(self) -> bool: ...

    async def request(
        self,
        op: str,
        fds: Sequence[int] = (),
        *,
        timeout: float | None = None,
        **arguments: object,
    ) -> dict[str, Any]: ...

    async def exchange(
        self,
        op: str,
        fds: Sequence[int] = (),
        *,
        timeout: float | None = None,
        **arguments: object,
    ) -> tuple[dict[str, Any], list[int]]: ...

    async def wait(self) -> int | None: ...

    def kill(self) -> None: ...

    async def close(self) -> None: ...


Spawn = Callable[[str], Awaitable[Worker]]


@dataclass(frozen=True, slots=True)
class Opened:
    """A worker that has its image open, and what it said about it."""

    worker: Worker
    size_bytes: int
    block_size: int
    image_uuid: str
    flags: int
    warnings: tuple[str, ...]
    base: str = ""
    base_format: str = ""
    # The file or block device with the data, "" where that is not known; which file that is; and
    # whether somebody makes it longer.
    data: str = ""
    data_id: tuple[int, int] | None = None
    grows: bool = False
    image_id: tuple[int, int] | None = None
    # Of the last opening for writing; "" where an older worker does not say it.
    session: str = ""


@dataclass(slots=True)
class RestartBudget:
    """Allows `count_max` restarts within `window` seconds."""

    limits: Restarts
    clock: Callable[[], float] = time.monotonic
    _times: deque[float] = field(default_factory=deque)

    def take(self) -> bool:
        """Whether one more restart is allowed now; counts it when it is."""
        now = self.clock()
        while self._times and now - self._times[0] >= self.limits.window:
            self._times.popleft()
        if len(self._times) >= self.limits.count_max:
            return False
        self._times.append(now)
        return True

    def reset(self, left: int | None = None) -> None:
        """Begin anew; with `left`, so many restarts are left."""
        self._times.clear()
        for _ in range(self.limits.count_max - left if left is not None else 0):
            self.take()


async def spawn_worker(directory: str) -> Worker:
    """Start a worker process for the device whose live state is in `directory`."""
    launcher = scope_launcher(os.path.basename(directory).strip("_"))
    if not launcher:
        return await WorkerProcess.spawn(directory)
    worker = await WorkerProcess.spawn(directory, launcher=launcher)
    try:
        await worker.request("ping", timeout=SCOPE_LIMIT_SECONDS)
    except WORKER_FAULTS:
        log.warning("no scope for the worker, it runs in the daemon's unit")
        await make_gone(worker)
        return await WorkerProcess.spawn(directory)
    return worker


def scope_launcher(name: str) -> list[str]:
    """Under systemd a worker gets a scope of its own: what stops or limits fvdd's unit leaves it
    alone, and at shutdown nobody ends it before the file systems on its device are unmounted."""
    program = shutil.which("systemd-run", path="/usr/bin:/bin")
    under_systemd = "INVOCATION_ID" in os.environ and os.path.isdir("/run/systemd/system")
    if program is None or not under_systemd or os.geteuid() != 0:
        return []
    escaped = "".join(c if c.isalnum() or c in "_." else f"\\x{ord(c):02x}" for c in name)
    return [
        program, "--scope", "--quiet", "--collect", "--slice=fvd.slice",
        f"--unit=fvd-worker-{escaped}-{time.monotonic_ns()}", f"--description=fvd worker of {name}",
        "--property=DefaultDependencies=no", "--",
    ]  # fmt: skip


async def open_worker(
    spawn: Spawn, directory: str, arguments: Mapping[str, Any], limit: float
) -> Opened:
    """Start a worker and let it open the image; on failure no process is left."""
    return await open_in(await start_worker(spawn, directory), arguments, limit)


async def start_worker(spawn: Spawn, directory: str) -> Worker:
    """Start a worker; WorkerError when that is not possible."""
    try:
        return await spawn(directory)
    except OSError as error:
        raise WorkerError(
            "worker_failed", f"a worker process cannot be started ({error.strerror})", "", {}
        ) from error


async def open_in(worker: Worker, arguments: Mapping[str, Any], limit: float) -> Opened:
    """Let a worker open the image; on failure the process is gone."""
    try:
        answer = await worker.request("open", timeout=limit, **arguments)
        opened = opened_from(worker, answer)
        if opened is None:
            raise WorkerError("bad_answer", "the worker does not say what it opened", "", {})
        return opened
    except BaseException:
        await asyncio.shield(make_gone(worker))
        raise


def opened_from(worker: Worker, answer: Mapping[str, Any]) -> Opened | None:
    """What a worker says about its open image, in the answer to "open" or "ping"."""
    if not isinstance(answer.get("size"), int):
        return None
    return Opened(
        worker,
        size_bytes=int(answer["size"]),
        block_size=int(answer["block_size"]),
        image_uuid=str(answer["image_uuid"]),
        flags=int(answer["flags"]),
        warnings=tuple(str(warning) for warning in answer.get("warnings", ())),
        base=str(answer.get("base", "")),
        base_format=str(answer.get("base_format", "")),
        data=str(answer.get("data", "")),
        data_id=_pair(answer.get("data_id")),
        grows=bool(answer.get("grows")),
        image_id=_pair(answer.get("image_id")),
        session=str(answer.get("session", "")),
    )


def _pair(value: object) -> tuple[int, int] | None:
    """Two numbers, as JSON has them."""
    match value:
        case [int(first), int(second)]:
            return (first, second)
    return None


async def serve_sockets(
    worker: Worker, count: int, limit: float
) -> tuple[list[int], list[socket.socket]]:
    """Let the worker serve `count` fresh connections; its ids and the kernel's ends of them.

    The ends belong to the caller. The worker's ends exist only in the worker afterwards, so that
    the kernel sees its death at once.
    """
    kernel_ends: list[socket.socket] = []
    worker_ends: list[socket.socket] = []
    try:
        for _ in range(count):
            kernel_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            kernel_ends.append(kernel_end)
            worker_ends.append(worker_end)
            _enlarge_buffers(kernel_end, worker_end)
        fds = [sock.fileno() for sock in worker_ends]
        answer = await worker.request("serve", fds, timeout=limit)
        return [int(number) for number in answer["connections"]], kernel_ends
    except BaseException:
        close_sockets(kernel_ends)
        raise
    finally:
        close_sockets(worker_ends)


def close_sockets(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


async def stop_worker(worker: Worker, limit: float) -> None:
    """Let the worker close the image clean and end; raises when the image is not closed."""
    await worker.request("stop", timeout=limit)
    try:
        async with asyncio.timeout(GONE_LIMIT_SECONDS):
            await worker.wait()
    except TimeoutError:
        # The image is closed and durable: what is left of the process can go.
        worker.kill()
    await worker.close()


async def make_gone(worker: Worker) -> None:
    """Kill the worker and return when it is gone; ApiError when it will not go."""
    worker.kill()
    try:
        async with asyncio.timeout(GONE_LIMIT_SECONDS):
            await worker.wait()
    except TimeoutError as error:
        raise ApiError(
            "worker_failed",
            f"the worker process {worker.pid} was killed but does not end",
            hint="it hangs in the kernel, most likely in I/O on the image or the base (dmesg)",
        ) from error
    finally:
        await worker.close()


def as_api_error(error: BaseException) -> ApiError:
    """What a worker's fault looks like to the API."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, WorkerError) and error.code == "unknown_op":
        return ApiError(
            "worker_outdated",
            "the device's worker is older than fvdd and cannot do this",
            hint="replace it, while the device is in use: fvdctl upgrade --all",
        )
    if isinstance(error, WorkerError):
        return ApiError(error.code, error.message, hint=error.hint, details=error.details)
    if isinstance(error, TimeoutError):
        return ApiError("worker_failed", "the worker did not answer in time")
    if isinstance(error, WorkerLost):
        return ApiError("worker_failed", "the worker died", hint="fvdd's log has its last words")
    return ApiError("worker_failed", f"the worker cannot be reached ({error})")


def _enlarge_buffers(*ends: socket.socket) -> None:
    """Room for whole large requests; beyond the system's limit only with privilege."""
    for end in ends:
        for option, force in ((socket.SO_SNDBUF, 32), (socket.SO_RCVBUF, 33)):
            try:
                end.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER_BYTES)
            except OSError:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
