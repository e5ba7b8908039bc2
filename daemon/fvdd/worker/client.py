# SPDX-License-Identifier: Apache-2.0
"""fvdd's side of the control channel: start a worker, or find a running one, and ask it things.

A worker is a child in a session of its own, so that nothing sent to fvdd's group reaches it. It is
watched through a pidfd, which names this process and no later one with its number; that works for
adopted workers as well, only their exit status is not ours to learn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from fvdd.attach.unix_socket import short_path
from fvdd.worker.channel import Channel, ChannelError, Message, close_all

ADOPT_SECONDS: Final = 10.0
EVENT_GONE: Final = "channel_closed"

Packet = tuple[Message, list[int]]


class WorkerError(Exception):
    """The worker answered a request with an error."""

    def __init__(self, code: str, message: str, hint: str, details: Mapping[str, object]) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details)


class WorkerLost(Exception):
    """The channel to the worker is closed; a request that was under way has no answer."""


class WorkerProcess:
    """One worker, spawned or adopted. Used from one event loop.

    `events` receives the worker's events in order, and at last {"event": "channel_closed"}.
    """

    def __init__(
        self, pid: int, sock: socket.socket, child: subprocess.Popen[bytes] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.pid = pid
        self.events: asyncio.Queue[Message] = asyncio.Queue()
        self._channel = Channel(sock)
        self._child = child
        self._pidfd = os.pidfd_open(pid)
        self._exited: asyncio.Future[int | None] = loop.create_future()
        self._waiting: dict[int, asyncio.Future[Packet]] = {}
        self._serial = 0
        self._is_lost = False
        loop.add_reader(self._pidfd, self._reap)
        self._reading = asyncio.create_task(self._read_all())

    @classmethod
    async def spawn(
        cls,
        directory: str | None = None,
        *,
        stderr: int | None = None,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        ends_with_us: bool = False,
    ) -> WorkerProcess:
        """Start a worker; requests may be sent at once and wait until its imports are done.

        `launcher`: a command that prepares its own process and then becomes the worker.
        `ends_with_us`: with this thread, or with the channel, it is killed, whatever it does.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [*launcher, sys.executable, "-P", "-m", "fvdd.worker", "device"]
        arguments += ["--control-fd", str(theirs.fileno())]
        if directory is not None:
            arguments += ["--dir", directory]
        if ends_with_us:
            arguments.append("--ends-with-parent")
        try:
            child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(child.pid, ours, child)

    @classmethod
    async def connect(cls, path: str, limit: float = ADOPT_SECONDS) -> WorkerProcess:
        """Reach a running worker through the socket in its directory; OSError if there is none,
        or if it does not answer within `limit` seconds."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            with short_path(path) as name:
                sock.connect(name)
            packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            worker = cls(int.from_bytes(packed[:4], sys.byteorder), sock, None)
        except OSError:
            sock.close()
            raise
        try:
            # The pidfd was made from a number: only an answer proves that it is the worker's.
            answer = await worker.request("ping", timeout=limit)
            if answer["pid"] != worker.pid:
                raise ConnectionError(f"{path} answers for another process")
        except (WorkerLost, WorkerError, TimeoutError) as error:
            await worker.close()
            raise ConnectionError(f"{path} does not answer") from error
        except OSError:
            await worker.close()
            raise
        return worker

    @property
    def is_running(self) -> bool:
        """Whether the process still exists."""
        return not self._exited.done()

    async def request(
        self,
        op: str,
        fds: Sequence[int] = (),
        *,
        timeout: float | None = None,
        **arguments: object,
    ) -> Message:
        """Ask and wait for the answer; descriptors stay the caller's.

        Raises WorkerError when the worker refuses, WorkerLost when it goes away, TimeoutError.
        """
        answer, descriptors = await self.exchange(op, fds, timeout=timeout, **arguments)
        close_all(descriptors)
        return answer

    async def exchange(
        self,
        op: str,
        fds: Sequence[int] = (),
        *,
        timeout: float | None = None,
        **arguments: object,
    ) -> tuple[Message, list[int]]:
        """Like request, for an op whose answer brings descriptors; they are the caller's."""
        if self._is_lost:
            raise WorkerLost(f"the worker {self.pid} is gone")
        self._serial += 1
        number = self._serial
        future: asyncio.Future[Packet] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout):
                await self._channel.send({"id": number, "op": op, **arguments}, fds)
                answer, descriptors = await _packet(future)
        except ChannelError as error:
            raise WorkerError("bad_request", str(error), "", {}) from error
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise WorkerLost(f"the worker {self.pid} is gone") from error
        finally:
            del self._waiting[number]
        if answer.get("ok") is True:
            return answer, descriptors
        close_all(descriptors)
        raise _error_of(answer)

    async def wait(self) -> int | None:
        """Wait for the end of the process; its exit status (negative: signal) if our child."""
        return await asyncio.shield(self._exited)

    def kill(self) -> None:
        """Kill the process; harmless when it has ended."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def close(self) -> None:
        """Let go of the worker, which goes on alone. A child is still reaped when it ends."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._channel.close()
        if self._child is None and self.is_running:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._exited.cancel()

    async def _read_all(self) -> None:
        try:
            while (packet := await self._channel.receive()) is not None:
                message, descriptors = packet
                number = message.get("id")
                future = self._waiting.get(number) if isinstance(number, int) else None
                if "event" in message:
                    self.events.put_nowait(message)
                elif future is not None and not future.done():
                    future.set_result((message, descriptors))
                    continue
                close_all(descriptors)
        except (OSError, ChannelError):
            pass
        finally:
            self._is_lost = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(WorkerLost(f"the worker {self.pid} is gone"))
            self.events.put_nowait({"event": EVENT_GONE})

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._child.wait() if self._child is not None else None
        if not self._exited.done():
            self._exited.set_result(status)


async def _packet(future: asyncio.Future[Packet]) -> Packet:
    """Wait for an answer; one that comes as the waiting is given up leaves no descriptor open."""
    try:
        return await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled() and future.exception() is None:
            close_all(future.result()[1])
        raise


def _error_of(answer: Message) -> WorkerError:
    error = answer.get("error")
    if not isinstance(error, dict):
        return WorkerError("bad_answer", "the worker gave an answer that makes no sense", "", {})
    details = error.get("details")
    return WorkerError(
        str(error.get("code", "bad_answer")),
        str(error.get("message", "")),
        str(error.get("hint", "")),
        details if isinstance(details, dict) else {},
    )
