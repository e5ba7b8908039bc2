# SPDX-License-Identifier: Apache-2.0
"""Stand between the kernel and a worker for a moment, so that the worker may die in it.

A kernel that changes the size of a device waits for its requests, and takes no new connections
meanwhile: a worker that dies then would leave it waiting for ever. So a process of its own holds
the kernel's connections for as long as that takes. It passes messages on in both directions, whole
ones only, and remembers every request until its answer has arrived complete. When the worker dies,
its successor gets what is unanswered again, as the kernel itself would send it: the order of
requests that overlap is the kernel's business, and nothing here is answered twice.

The kernel speaks NBD with simple replies. One thread reads requests, one replies, a connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final

from fvdd.log import fields

REQUEST: Final = struct.Struct(">IHHQQI")
REPLY: Final = struct.Struct(">IIQ")
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698
READ: Final = 0
WRITE: Final = 1
DISCONNECT: Final = 2
# More than any kernel sends in one request.
LENGTH_MAX: Final = 64 << 20

_log = logging.getLogger(__name__)


class _Ended(Exception):
    """The other side has closed, or says what makes no sense."""


class _Line:
    """One connection of the kernel, and the one to a worker that stands for it."""

    def __init__(self, kernel: socket.socket, received: bytes) -> None:
        kernel.setblocking(True)
        self._kernel = kernel
        self._received = received
        self._worker: socket.socket | None = None
        self._replier: threading.Thread | None = None
        self._reader = threading.Thread(target=self._pass_requests, name="relay", daemon=True)
        # Guards what follows; messages to a worker are sent under `_sending`, which comes first.
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._unanswered: dict[int, tuple[bytes, int]] = {}
        self._is_replying = False
        self._stopping = False
        self._is_resting = False
        self._is_closing = False
        self._wake, self._waker = socket.socketpair()

    def start(self, worker: socket.socket) -> None:
        """Serve by `worker` from now on; what its predecessor left unanswered goes there first."""
        worker.setblocking(True)
        if self._replier is not None:
            # What the dead one still said counts: it is read to its end before anything is resent.
            self._replier.join()
        with self._sending:
            with self._changed:
                self._worker = worker
                waiting = [message for message, _ in self._unanswered.values()]
            self._replier = threading.Thread(
                target=self._pass_replies, args=(worker,), name="relay", daemon=True
            )
            self._replier.start()
            for message in waiting:
                _send(worker, message)
        if not self._reader.is_alive():
            self._reader.start()

    def stop(self, stopping: bool) -> None:
        """Read no further message, or go on with it."""
        with self._changed:
            self._stopping = stopping
            self._changed.notify_all()
        self._waker.send(b"x")

    def is_settled(self, deadline: float) -> bool:
        """Whether no message is under way any more, within the time."""

        def settled() -> bool:
            return self._is_resting and not self._unanswered and not self._is_replying

        with self._changed:
            return self._changed.wait_for(settled, max(deadline - time.monotonic(), 0.0))

    @property
    def is_served(self) -> bool:
        return self._worker is not None

    def part(self) -> int:
        """Give the kernel's socket away; the worker's is closed."""
        descriptor = os.dup(self._kernel.fileno())
        self._end()
        return descriptor

    def close(self) -> None:
        """Let both sides see the end."""
        with contextlib.suppress(OSError):
            self._kernel.shutdown(socket.SHUT_RDWR)
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            if self._worker is not None:
                _shut(self._worker)
        self._waker.send(b"x")
        for thread in (self._reader, self._replier):
            if thread is not None and thread.is_alive():
                thread.join()
        for sock in (self._kernel, self._wake, self._waker):
            sock.close()

    # The two directions.

    def _pass_requests(self) -> None:
        try:
            while self._wait_for_more():
                self._pass_request()
        except (_Ended, OSError):
            # The kernel has let go: nobody waits for answers any more.
            with self._changed:
                self._unanswered.clear()
                if self._worker is not None:
                    _shut(self._worker)
        with self._changed:
            self._is_resting = True
            self._changed.notify_all()

    def _wait_for_more(self) -> bool:
        """Wait for a message, and between two of them for as long as it is stopped; False: end."""
        while True:
            with self._changed:
                while self._stopping and not self._received and not self._is_closing:
                    self._is_resting = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._is_resting = False
                if self._is_closing:
                    return False
            if self._received:
                return True
            ready, _, _ = select.select([self._kernel, self._wake], [], [])
            if self._wake in ready:
                self._wake.recv(64)
            elif self._kernel in ready:
                return True

    def _pass_request(self) -> None:
        header = self._take(REQUEST.size)
        magic, _, kind, cookie, _, length = REQUEST.unpack(header)
        if magic != REQUEST_MAGIC or (kind in (READ, WRITE) and length > LENGTH_MAX):
            raise _Ended
        message = header + (self._take(length) if kind == WRITE else b"")
        with self._sending:
            with self._changed:
                worker = self._worker
                if kind != DISCONNECT:
                    self._unanswered[cookie] = (message, length if kind == READ else 0)
            if worker is not None:
                _send(worker, message)

    def _pass_replies(self, worker: socket.socket) -> None:
        try:
            while True:
                self._pass_reply(worker)
        except (_Ended, OSError):
            with self._changed:
                if self._worker is worker:
                    self._worker = None
                self._is_replying = False
                self._changed.notify_all()
            worker.close()

    def _pass_reply(self, worker: socket.socket) -> None:
        header = _exactly(worker, REPLY.size)
        magic, error, cookie = REPLY.unpack(header)
        with self._changed:
            asked = self._unanswered.get(cookie)
        if magic != REPLY_MAGIC or asked is None:
            raise _Ended
        data = b"" if error else _exactly(worker, asked[1])
        with self._changed:
            # Before it is sent: the kernel may use the cookie again at once.
            self._unanswered.pop(cookie, None)
            self._is_replying = True
        self._kernel.sendall(header + data)
        with self._changed:
            self._is_replying = False
            self._changed.notify_all()

    def _take(self, length: int) -> bytes:
        head, self._received = self._received[:length], self._received[length:]
        return head + _exactly(self._kernel, length - len(head))


class Relay:
    """All connections of one device."""

    def __init__(self, kernels: Sequence[socket.socket], received: Sequence[bytes]) -> None:
        """Take the kernel's sockets over, with the bytes that were read of their next message."""
        self._lines = [
            _Line(sock, rest) for sock, rest in zip(kernels, received, strict=True)
        ]

    @property
    def count(self) -> int:
        return len(self._lines)

    @property
    def is_served(self) -> bool:
        """Whether a worker is there for every connection."""
        return all(line.is_served for line in self._lines)

    def serve_by(self, workers: Sequence[socket.socket]) -> None:
        """Pass everything to these connections, one for each of the kernel's. Blocks while what a
        dead worker left is read."""
        for line, worker in zip(self._lines, workers, strict=True):
            line.start(worker)

    def part(self, seconds: float) -> list[int] | None:
        """Stop between two messages, all answered, and give the kernel's sockets away as
        descriptors; None when that took longer, and it goes on."""
        deadline = time.monotonic() + seconds
        for line in self._lines:
            line.stop(True)
        if all(line.is_settled(deadline) for line in self._lines):
            lines, self._lines = self._lines, []
            return [line.part() for line in lines]
        for line in self._lines:
            line.stop(False)
        _log.warning("requests are slow to end", extra=fields(seconds=seconds))
        return None

    def close(self) -> None:
        """Give up: the kernel sees its connections end."""
        for line in self._lines:
            line.close()


def _send(worker: socket.socket, message: bytes) -> None:
    # A worker that is gone is noticed by who waits for its replies; the message is kept.
    with contextlib.suppress(OSError):
        worker.sendall(message)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, length: int) -> bytes:
    """Read so many bytes; _Ended when they do not come."""
    pieces = bytearray()
    while len(pieces) < length:
        piece = sock.recv(min(length - len(pieces), 1 << 20))
        if not piece:
            raise _Ended
        pieces += piece
    return bytes(pieces)


def take_memory(descriptor: int, length: int) -> bytes:
    """What a predecessor received, out of its memory file; OSError when it is less."""
    data = os.pread(descriptor, length, 0)
    if len(data) != length:
        raise OSError("less was received than was said")
    return data
