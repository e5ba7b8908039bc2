# SPDX-License-Identifier: Apache-2.0
"""An fvdd that is killed at its n-th step, over a stand-in for the kernel that outlives it.

The kernel's devices stay in the test (`Kernel`, around fvdtest.standin); fvdd is a process, forked
from one that has imported everything, and speaks to them over a socket. A step is what anybody else
can see of fvdd: a file that it makes, renames or removes, a lock, a process that it starts, a word
to the kernel or to a worker, before and after it is said. So a test that kills it at step 1, 2, 3
and so on until nothing is left to kill has killed it everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import DeviceStatus
from fvdd.attach.attachment import AttachError, AttachSpec, Leak, WaitFor
from fvdd.attach.threads import run_blocking
from fvdtest.daemon import Done, fvdctl
from fvdtest.standin import Disk, StandInAttachment, StandInTransport
from fvdtest.tools import wait_until

LIBRARY = Path(__file__).resolve().parents[1]
CALL_BYTES = 1 << 16
END_SECONDS = 30.0
GONE_SECONDS = 1.0
POLL_SECONDS = 0.005
HANG_SECONDS = 10.0
RESTARTS = 50
PR_SET_CHILD_SUBREAPER = 36
# What Python says of itself that somebody else could see.
SEEN = (
    "fcntl.fcntl", "fcntl.flock", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.symlink", "os.truncate", "socket.bind", "subprocess.Popen",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# The kernel, in the test.


class Kernel:
    """A host's devices, for any number of fvdds one after the other."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "kernel.sock"
        self.transport = StandInTransport()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, name="kernel", daemon=True)
        self._accepting.start()

    @property
    def disks(self) -> dict[int, Disk]:
        return self.transport.disks

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(END_SECONDS)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            message, descriptors, _, _ = socket.recv_fds(connection, CALL_BYTES, 16)
            sockets = [socket.socket(fileno=fd) for fd in descriptors]
            try:
                word, arguments = json.loads(message)
                answer = {"value": asyncio.run(self._do(word, arguments, sockets))}
            except AttachError as error:
                answer = {"error": [error.code, error.message, error.hint]}
            except OSError as error:
                answer = {"errno": error.errno}
            finally:
                for sock in sockets:
                    sock.close()
            with contextlib.suppress(OSError):  # who asked may be dead
                connection.sendall(json.dumps(answer).encode())

    async def _do(self, word: str, arguments: list[Any], sockets: list[socket.socket]) -> Any:
        transport = self.transport
        if word == "connect":
            return (await transport.connect(AttachSpec(**arguments[0]), sockets)).index
        if word == "adopt":
            found = await transport.adopt(AttachSpec(**arguments[0]), None)
            return found.index if found is not None else None
        if word == "leaks":
            return [asdict(leak) for leak in await transport.leaks(arguments[0])]
        if word == "reclaim":
            return await transport.reclaim(Leak(**arguments[0]))
        if word == "backends":
            return [disk.spec.backend for disk in self.disks.values()]
        index, backend, *rest = arguments
        disk = self.disks.get(index)
        if disk is None or disk.spec.backend != backend:
            if word == "exists":
                return False
            raise AttachError("device_failed", f"/dev/nbd{index} was disconnected")
        attachment = StandInAttachment(transport, disk)
        if word == "reconnect":
            return await attachment.reconnect(sockets)
        if word == "wait_dead":  # who asked before may be dead, so what is dead now counts
            count, limit = rest
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    while disk.dead_connections < count:
                        await asyncio.sleep(POLL_SECONDS)
            return None
        answer = getattr(attachment, word)(*rest)
        return await answer if asyncio.iscoroutine(answer) else answer


# The kernel, as fvdd sees it from its process.


class FarTransport:
    """fvdd's side of a Kernel."""

    name = "nbd"

    def __init__(self, path: str) -> None:
        self.path = path

    def ask(self, word: str, *arguments: object, sockets: Sequence[socket.socket] = ()) -> Any:
        with _stepping(f"kernel {word}"), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            message = json.dumps([word, arguments]).encode()
            socket.send_fds(connection, [message], [sock.fileno() for sock in sockets])
            answer = json.loads(connection.makefile("rb").read())
        if "error" in answer:
            raise AttachError(*answer["error"])
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answer["value"]

    async def say(self, word: str, *arguments: object, **given: Any) -> Any:
        return await run_blocking(lambda: self.ask(word, *arguments, **given))

    async def require(self) -> None:
        return None

    async def connect(self, spec: AttachSpec, sockets: Sequence[socket.socket]) -> FarAttachment:
        index = await self.say("connect", asdict(spec), sockets=sockets)
        return FarAttachment(self, index, spec.backend)

    async def adopt(self, spec: AttachSpec, index: int | None) -> FarAttachment | None:
        found = await self.say("adopt", asdict(spec))
        return FarAttachment(self, found, spec.backend) if found is not None else None

    async def leaks(self, known: Collection[str]) -> Sequence[Leak]:
        return [Leak(**leak) for leak in await self.say("leaks", [*known])]

    async def reclaim(self, leak: Leak) -> None:
        await self.say("reclaim", asdict(leak))

    def sees_every_process(self) -> bool:
        return True

    def backends(self) -> Sequence[str]:
        return [*self.ask("backends")]

    async def watch(self, on_dead: Callable[[int], None]) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        return None


class FarAttachment:
    """One device of a Kernel."""

    def __init__(self, transport: FarTransport, index: int, backend: str) -> None:
        self._transport, self._index, self._backend = transport, index, backend

    @property
    def index(self) -> int:
        return self._index

    @property
    def device(self) -> str:
        return f"/dev/nbd{self._index}"

    def _ask(self, word: str, *arguments: object) -> Any:
        return self._transport.ask(word, self._index, self._backend, *arguments)

    async def _say(self, word: str, *arguments: object, **given: Any) -> Any:
        return await self._transport.say(word, self._index, self._backend, *arguments, **given)

    def exists(self) -> bool:
        return bool(self._ask("exists"))

    def size(self) -> int | None:
        return int(self._ask("size"))

    def is_read_only(self) -> bool:
        return bool(self._ask("is_read_only"))

    async def ready(self, wait: WaitFor, timeout: float) -> None:
        await self._say("ready", wait, timeout)

    async def reconnect(self, sockets: Sequence[socket.socket]) -> None:
        await self._say("reconnect", sockets=sockets)

    async def wait_dead(self, count: int, timeout: float) -> None:
        await self._say("wait_dead", count, timeout)

    async def resize(self, size: int) -> None:
        await self._say("resize", size)

    async def scan(self) -> None:
        await self._say("scan")

    async def lock(self) -> None:
        await self._say("lock")

    async def unlock(self) -> None:
        await self._say("unlock")

    async def set_read_only(self, wanted: bool) -> None:
        await self._say("set_read_only", wanted)

    async def sync(self) -> None:
        await self._say("sync")

    async def writeback_error(self) -> str | None:
        return None

    async def disconnect(self, timeout: float) -> None:
        await self._say("disconnect", timeout)

    async def abandon(self) -> None:
        return None


# The steps of a process.


class Steps:
    """Counts the steps from the moment on when it is told to, and dies before the last one."""

    def __init__(self, last: int, trace: int) -> None:
        self._last, self._trace = last, trace
        self._count = 0
        self._is_armed = False

    def arm(self, *_: object) -> None:
        self._is_armed = True

    def disarm(self, *_: object) -> None:
        self._is_armed = False

    def take(self, what: str) -> None:
        if not self._is_armed:
            return
        self._count += 1
        os.write(self._trace, f"{self._count}: {what}\n".encode())
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        if event in SEEN:
            self.take(f"{event} {_shown(arguments)}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.take(f"open {_shown(arguments[:1])}")


_steps: Steps | None = None


@contextlib.contextmanager
def _stepping(what: str) -> Iterator[None]:
    """A step before something, and one after it."""
    if _steps is not None:
        _steps.take(what)
    yield
    if _steps is not None:
        _steps.take(f"after {what}")


def _shown(arguments: tuple[Any, ...]) -> str:
    return " ".join(str(one) for one in arguments if isinstance(one, str | bytes | os.PathLike))


def become_fvdd(request: dict[str, Any], trace: int) -> None:
    """In the forked process: an fvdd, until it dies."""
    global _steps
    from fvdd import log
    from fvdd.app import App, Parts
    from fvdd.config import Config, Daemon, Limits, Restarts
    from fvdd.devices.supervise import spawn_worker
    from fvdd.worker.channel import Channel

    _steps = Steps(request["last"], trace)
    if request["from_the_start"]:
        _steps.arm()
    signal.signal(signal.SIGUSR1, _steps.arm)
    signal.signal(signal.SIGUSR2, _steps.disarm)
    sys.addaudithook(_steps.look)
    send = Channel.send

    async def stepping_send(
        channel: Channel, message: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        with _stepping(f"say {message.get('op')}"):
            await send(channel, message, descriptors)

    Channel.send = stepping_send  # type: ignore[assignment,method-assign]
    log.setup("info")
    section = Daemon(socket=request["socket"], state_dir=request["state"], metrics="off")
    config = Config(
        daemon=section,
        limits=Limits(ready_timeout=20.0, worker_timeout=30.0, hang_timeout=HANG_SECONDS),
        restarts=Restarts(count_max=RESTARTS),
    )
    asyncio.run(App(config, Parts(FarTransport(request["kernel"]), spawn_worker)).run())


class Mortal:
    """One fvdd after the other, each of which may be told at which step it dies."""

    def __init__(self, folder: Path, kernel: Kernel, server: socket.socket) -> None:
        self.folder, self.kernel, self._server = folder, kernel, server
        self.socket, self.state = folder / "fvdd.sock", folder / "state"
        self.log_path, self.trace_path = folder / "fvdd.log", folder / "steps"
        self._pidfd, self._pid = -1, 0

    def start(self, last: int = 0, *, from_the_start: bool = False) -> None:
        """Let there be an fvdd that dies at step `last` (0: never) after `arm`."""
        request = {
            "last": last, "from_the_start": from_the_start, "kernel": str(self.kernel.path),
            "socket": str(self.socket), "state": str(self.state), "folder": str(self.folder),
        }  # fmt: skip
        with self.log_path.open("ab") as log, self.trace_path.open("wb") as trace:
            descriptors = [log.fileno(), trace.fileno()]
            socket.send_fds(self._server, [json.dumps(request).encode()], descriptors)
        answer, (self._pidfd,), _, _ = socket.recv_fds(self._server, 64, 1)
        self._pid = int(answer)
        wait_until(lambda: self.is_dead or self._answers(), "fvdd to answer")

    def next(self) -> None:
        """A healthy fvdd after a dead one, once it has looked at everything."""
        self.start()
        wait_until(self.settled, "the adoption to end")

    def arm(self) -> None:
        """Count steps from now on."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGUSR1)

    def disarm(self) -> None:
        """Let it live from now on."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGUSR2)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.reap()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        self.reap()

    def reap(self) -> None:
        """Wait for its end."""
        assert select.select([self._pidfd], [], [], END_SECONDS)[0], "fvdd does not end"
        os.close(self._pidfd)
        self._pidfd = -1

    @property
    def is_dead(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    @property
    def steps(self) -> list[str]:
        """What it did since it was armed; it died before the last one."""
        return self.trace_path.read_text().splitlines()

    def survives_its_start(self) -> bool:
        """Whether it got through what it does at the start; if not, it is dead."""

        def is_over() -> bool:
            try:
                return self.is_dead or self.settled()
            except ApiError:  # it dies at this moment
                return False

        wait_until(is_over, "the end of the adoption")
        with contextlib.suppress(ApiError), self.client() as client:
            self.disarm()
            client.health()
            return True
        self.reap()
        return False

    def survives(self, operation: Callable[[Client], object]) -> bool:
        """Whether it carried the operation out; if not, it is dead."""
        self.arm()
        try:
            with self.client() as client:
                operation(client)
                self.disarm()
                client.health()  # it has heard that now, or is dead
        except ApiError:
            if not select.select([self._pidfd], [], [], GONE_SECONDS)[0]:
                raise
        if not self.is_dead:
            return True
        self.reap()
        return False

    def client(self) -> Client:
        return Client(str(self.socket))

    def ctl(self, *words: object, check: bool = True) -> Done:
        return fvdctl(*words, socket=self.socket, check=check)

    def devices(self) -> list[DeviceStatus]:
        with self.client() as client:
            return [*client.devices()]

    def settled(self) -> bool:
        """Whether nothing is under way."""
        return all(one.state.value in ("attached", "failed") for one in self.devices())

    def workers(self, name: str | None = None) -> list[int]:
        """Processes of fvd's in this state directory, or of one device."""
        place = os.fsencode(self.state / "devices" / (name or ""))
        return [
            pid
            for pid, words in processes()
            if b"fvdd.worker" in words
            and any(word == place if name else word.startswith(place) for word in words)
        ]

    def kill_workers(self, name: str) -> None:
        """Kill those that there are now; an fvdd that lives has their successor at once."""
        killed = set(self.workers(name))
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: killed.isdisjoint(self.workers(name)), "the workers to end")

    def end(self) -> None:
        """Leave no process behind, whatever a test did."""
        if self._pidfd >= 0:
            self.kill()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return client.health().status == "ok"
        except ApiError:
            return False


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """All that run, with the words of their command lines."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry), Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")


@contextlib.contextmanager
def mortal_daemon(folder: Path) -> Iterator[Mortal]:
    """A kernel, and fvdds to be started; nothing is left of them at the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel = Kernel(folder)
    with ours:
        with theirs:
            forking = subprocess.Popen(
                [sys.executable, "-P", "-m", "fvdtest.mortal", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": str(LIBRARY)},
            )
        mortal = Mortal(folder, kernel, ours)
        try:
            yield mortal
        finally:
            mortal.end()
            kernel.close()
    forking.wait(END_SECONDS)


def serve(requests: socket.socket) -> None:
    """Fork an fvdd for every request until the other side is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them, and orphaned workers
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), zero, zero, zero)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, CALL_BYTES, 2)
        if not message:
            return
        pid = os.fork()
        if not pid:
            requests.close()
            _live(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(requests, [b"%d" % pid], [pidfd])
        os.close(pidfd)


def _live(request: dict[str, Any], log: int, trace: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    try:
        become_fvdd(request, trace)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    import_module("fvdd.app")
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
    os._exit(0)
