# SPDX-License-Identifier: Apache-2.0
"""Listen on a Unix or TCP socket for NBD clients and bring each through the handshake.

Every handshake is a task of its own under its own time limit, so a client that is stuck, slow or
hostile blocks nobody. Two bounds: handshakes under way (when they are too many the oldest is
dropped, so that a flood of silent clients cannot lock others out) and connections in the
transmission phase (one more is told so in the protocol's words).

The data of the transmission phase never pass through here: a negotiated socket is delivered to
the engine. TCP without TLS is for this host alone, so only loopback addresses are accepted; with
TLS (fvdd.attach.tls) no client is served before it has begun it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol
from urllib.parse import quote

from fvdd.attach.handshake import (
    TIME_LIMIT_SECONDS,
    Export,
    HandshakeError,
    Negotiated,
    negotiate,
)
from fvdd.attach.unix_socket import listen_at
from fvdd.log import fields

HANDSHAKES_MAX: Final = 64
CONNECTIONS_DEFAULT: Final = 16
BACKLOG: Final = 128
ACCEPT_PAUSE_SECONDS: Final = 0.1
NBD_PORT: Final = 10809

_log = logging.getLogger(__name__)


class ExportError(Exception):
    """An address cannot be listened on."""

    exit_status = 1

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class Address(Protocol):
    """Where to listen."""

    def listen(self) -> socket.socket:
        """Bind and listen, or raise ExportError."""

    def uri(self, sock: socket.socket) -> str:
        """Name the listening socket as NBD clients want it."""

    def release(self) -> None:
        """Remove what listen left in the file system; the socket itself is the caller's."""


class UnixAddress:
    """A path. A socket there that nobody listens on is replaced, anything else is left alone."""

    def __init__(self, path: str, *, tls: bool = False) -> None:
        self._path = os.path.abspath(path)
        self._scheme = "nbds" if tls else "nbd"
        self._identity: tuple[int, int] | None = None

    def listen(self) -> socket.socket:
        try:
            sock = listen_at(self._path, BACKLOG)
            status = os.stat(self._path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ExportError(
                    "address_in_use",
                    f"another server is listening on {self._path}",
                    "choose another --socket path or stop that server",
                ) from error
            raise _cannot_listen(self._path, str(error.strerror or error), error.errno) from error
        self._identity = (status.st_dev, status.st_ino)
        return sock

    def uri(self, sock: socket.socket) -> str:
        return f"{self._scheme}+unix:///?socket=" + quote(self._path, safe="/")

    def release(self) -> None:
        """Remove the socket file if it is still ours and not that of a successor."""
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self._path)


class TcpAddress:
    """A host and a port; without TLS the host must be this one, seen from inside."""

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        self._host = host
        self._port = port
        self._tls = tls

    @classmethod
    def parse(cls, text: str, *, tls: bool = False) -> TcpAddress:
        """Read HOST:PORT, [IPV6]:PORT, :PORT or HOST; what is left out is 127.0.0.1 and 10809."""
        host, port_text = text, ""
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            port_text = rest.removeprefix(":")
        elif text.count(":") == 1:
            host, _, port_text = text.partition(":")
        try:
            port = int(port_text) if port_text else NBD_PORT
        except ValueError:
            port = -1
        if not 0 <= port <= 65535:
            raise ExportError(
                "bad_address", f"{text!r} is not HOST:PORT", "for example --tcp 127.0.0.1:10809"
            )
        return cls(host or "127.0.0.1", port, tls=tls)

    def listen(self) -> socket.socket:
        where = f"{self._host}:{self._port}"
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _cannot_listen(where, f"the host name does not resolve: {error}") from error
        for _, _, _, _, address in found:
            if self._tls:
                break
            if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
                raise ExportError(
                    "tls_required",
                    f"refusing to listen on {where}: without TLS only loopback addresses are safe",
                    "give --tls-certificates or --tls-psk, or listen on 127.0.0.1 or a Unix socket",
                )
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise _cannot_listen(where, str(error.strerror or error), error.errno) from error
        return sock

    def uri(self, sock: socket.socket) -> str:
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"{'nbds' if self._tls else 'nbd'}://{shown}:{port}/"

    def release(self) -> None:
        """Nothing is left of a TCP socket that is closed."""


_LISTEN_HINTS: Final = {
    errno.ENOENT: "make the directory of the socket first",
    errno.ENOTDIR: "name a socket in a directory",
    errno.ENAMETOOLONG: "choose a shorter path: the kernel takes 107 bytes",
    errno.EEXIST: "name a file that does not exist",
    errno.EACCES: "choose a directory that you may write in, or a port above 1023",
    errno.EADDRINUSE: "end the program that listens there, or choose another port",
    errno.EADDRNOTAVAIL: "give an address of this host, such as 127.0.0.1",
}


def _cannot_listen(where: str, why: str, number: int | None = None) -> ExportError:
    hint = _LISTEN_HINTS.get(number or 0, "check the address")
    return ExportError("cannot_listen", f"cannot listen on {where}: {why}", hint)


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """How much one listener takes on at a time."""

    connections: int = CONNECTIONS_DEFAULT
    handshakes: int = HANDSHAKES_MAX
    handshake_seconds: float = TIME_LIMIT_SECONDS


Deliver = Callable[[socket.socket, Negotiated], int]
"""Takes a negotiated, blocking socket over for good and returns the connection's id, or raises
OSError when the engine does not take it."""


Secure = Callable[[socket.socket, str], socket.socket]
"""Begins TLS with the client of that name, and returns the plain socket to go on with."""


class Listener:
    """Accepts clients of one export on a listening socket, which stays the caller's, and
    delivers those that finish the handshake."""

    def __init__(
        self,
        sock: socket.socket,
        export: Export,
        deliver: Deliver,
        limits: ListenerLimits,
        secure: Secure | None = None,
    ) -> None:
        sock.setblocking(False)
        self._secure = secure
        self._sock = sock
        self._export = export
        self._deliver = deliver
        self._limits = limits
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: dict[asyncio.Task[None], str] = {}
        self._connections: set[int] = set()
        self._admitted = 0

    def start(self) -> None:
        """Begin to accept; who connected since the socket listens has waited."""
        self._accepting = asyncio.create_task(self._accept_all())

    async def stop(self) -> None:
        """Stop accepting and drop the handshakes under way; delivered connections stay."""
        tasks = [*self._handshakes]
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_size(self, size: int) -> None:
        """Tell clients that come from now on another size of the disk."""
        self._export = replace(self._export, size=size)

    def connection_closed(self, connection: int) -> None:
        """Give the place of an ended connection to whoever comes next."""
        self._connections.discard(connection)

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        serial = 0
        while True:
            try:
                client, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                # Out of descriptors or memory, or the client left early: neither is a reason to
                # stop listening, and both pass.
                _log.warning("accept failed", extra=fields(reason=error))
                await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            serial += 1
            self._begin_handshake(client, _peer_name(client, serial))
            # A full backlog is accepted without waiting once; the handshakes need their turn.
            await asyncio.sleep(0)

    def _begin_handshake(self, client: socket.socket, peer: str) -> None:
        if len(self._handshakes) >= self._limits.handshakes:
            oldest, oldest_peer = next(iter(self._handshakes.items()))
            _log.warning("too many handshakes, dropped one", extra=fields(client=oldest_peer))
            self._handshakes.pop(oldest)
            oldest.cancel()
        task = asyncio.create_task(self._welcome(client, peer))
        self._handshakes[task] = peer

        def over(done: asyncio.Task[None]) -> None:
            self._handshakes.pop(done, None)
            # Here and not in the task, which may be dropped before it has run at all.
            client.close()

        task.add_done_callback(over)

    async def _welcome(self, client: socket.socket, peer: str) -> None:
        """Take one client from its first byte to delivery, or give up on it."""
        admitted = False

        def admit(export: Export) -> str | None:
            nonlocal admitted
            if admitted:
                return None
            if len(self._connections) + self._admitted >= self._limits.connections:
                return f"all {self._limits.connections} connections of this export are in use"
            self._admitted += 1
            admitted = True
            return None

        sockets = [client]

        def secure() -> socket.socket:
            assert self._secure is not None
            sockets.append(self._secure(client, peer))
            return sockets[-1]

        try:
            client.setblocking(False)
            if client.family != socket.AF_UNIX:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            agreed = await negotiate(
                client,
                [self._export],
                admit=admit,
                time_limit=self._limits.handshake_seconds,
                secure=secure if self._secure is not None else None,
            )
            if agreed is not None:
                sockets[-1].setblocking(True)
                connection = self._deliver(sockets[-1], agreed)
                self._connections.add(connection)
                _log.info("connection open", extra=fields(connection=connection, client=peer))
        except (HandshakeError, OSError) as error:
            _log.info("handshake failed", extra=fields(client=peer, reason=error))
        finally:
            if admitted:
                self._admitted -= 1
            for plain in sockets[1:]:
                plain.close()


def _peer_name(client: socket.socket, serial: int) -> str:
    """Name a client in the log: its address, or on a Unix socket its process."""
    with contextlib.suppress(OSError):
        if client.family == socket.AF_UNIX:
            packed = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return f"pid:{int.from_bytes(packed[:4], 'little')}"
        host, port = client.getpeername()[:2]
        return f"{host}:{port}"
    return f"client:{serial}"
