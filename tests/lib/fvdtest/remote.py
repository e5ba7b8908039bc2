# SPDX-License-Identifier: Apache-2.0
"""NBD servers for tests of remote bases: nbdkit with its filters, and one that can lie."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 20.0
NBDMAGIC, IHAVEOPT = 0x4E42444D41474943, 0x49484156454F5054
REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_MAGIC = 0x3E889045565A9, 0x25609513, 0x67446698
OPT_EXPORT_NAME, OPT_ABORT, OPT_GO = 1, 2, 7
OPT_STRUCTURED, OPT_SET_META_CONTEXT = 8, 10
CHUNK_MAGIC, CHUNK_DONE = 0x668E33EF, 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 2, 5, 0x8001
HAS_FLAGS, READ_ONLY, CAN_FLUSH, MULTI_CONN = 1, 2, 4, 256


class Nbdkit:
    """An nbdkit that serves on a Unix socket; it can be killed and started again."""

    def __init__(self, folder: Path, *arguments: str | Path, start: bool = True) -> None:
        self.socket = folder / "nbd.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    def start(self, *arguments: str | Path) -> None:
        """Start, with other arguments where given, and wait for the socket."""
        self.arguments = arguments or self.arguments
        self.socket.unlink(missing_ok=True)
        argv = ["nbdkit", "-f", "--exit-with-parent", "-U", str(self.socket)]
        self.process = subprocess.Popen([*argv, *map(str, self.arguments)])
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.socket):
            assert self.process.poll() is None, f"nbdkit {self.arguments} ended"
            assert time.monotonic() < deadline, "nbdkit does not start"
            time.sleep(0.005)  # the interval of polling, never the whole wait

    def kill(self) -> None:
        """End it as a crash would: connections are reset, what was in flight is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Nbdkit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def _answers(path: Path) -> bool:
    """Whether somebody listens; the socket is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


class Liar:
    """A server in Python that negotiates as told and answers requests with `answer`.

    `answer(connection, type, cookie, offset, length)` sends what it likes; returning False closes
    the connection. `export` is (length, transmission flags); `blocks` adds block sizes. With
    `structured` it offers structured replies and block status, which `answer` then has to send.
    """

    def __init__(
        self,
        folder: Path,
        answer: Callable[[socket.socket, int, int, int, int], bool],
        *,
        export: tuple[int, int] = (1 << 20, HAS_FLAGS | READ_ONLY | MULTI_CONN),
        blocks: Sequence[int] | None = None,
        greet: bool = True,
        structured: bool = False,
    ) -> None:
        self.uri = f"nbd+unix:///?socket={folder / 'liar.sock'}"
        self.answer, self.export, self.blocks, self.greet = answer, export, blocks, greet
        self.structured = structured
        self.requests: list[tuple[int, int, int]] = []
        self.connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "liar.sock"))
        self._listener.listen(64)
        self._start(self._accept)

    def _start(self, call: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self.greet and self._negotiate(connection):
                self._transmit(connection)
        except (OSError, struct.error):
            return
        if not self.greet:
            return  # silent, and open
        connection.close()

    def _negotiate(self, connection: socket.socket) -> bool:
        connection.sendall(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3))
        receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", receive(connection, 16))
            receive(connection, length)
            if option == OPT_GO:
                info = struct.pack(">HQH", 0, *self.export)
                self._reply(connection, option, 3, info)
                if self.blocks is not None:
                    self._reply(connection, option, 3, struct.pack(">HIII", 3, *self.blocks))
                self._reply(connection, option, 1, b"")
                return True
            if option == OPT_ABORT:
                return False
            if self.structured and option in (OPT_STRUCTURED, OPT_SET_META_CONTEXT):
                if option == OPT_SET_META_CONTEXT:
                    context = struct.pack(">I", 1) + b"base:allocation"
                    self._reply(connection, option, 4, context)
                self._reply(connection, option, 1, b"")
                continue
            self._reply(connection, option, 0x80000001, b"")

    @staticmethod
    def _reply(connection: socket.socket, option: int, kind: int, data: bytes) -> None:
        connection.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)

    def _transmit(self, connection: socket.socket) -> None:
        while True:
            magic, _, kind, cookie, offset, length = struct.unpack(
                ">IHHQQI", receive(connection, 28)
            )
            assert magic == REQUEST_MAGIC
            if kind == 2:
                return
            if kind == 1:
                receive(connection, length)
            self.requests.append((kind, offset, length))
            if not self.answer(connection, kind, cookie, offset, length):
                return

    def close(self) -> None:
        """End it; all its threads end, too."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(START_SECONDS)
        for connection in self.connections:
            connection.close()


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly so many bytes, or OSError."""
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return bytes(data)


def simple_reply(connection: socket.socket, cookie: int, data: bytes = b"", error: int = 0) -> None:
    """Answer a request as an honest server does."""
    connection.sendall(struct.pack(">IIQ", SIMPLE_MAGIC, error, cookie) + data)


def chunk(
    connection: socket.socket, cookie: int, kind: int, data: bytes = b"", flags: int = CHUNK_DONE
) -> None:
    """Send one chunk of a structured reply, the last one unless told."""
    connection.sendall(struct.pack(">IHHQI", CHUNK_MAGIC, flags, kind, cookie, len(data)) + data)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


