# SPDX-License-Identifier: Apache-2.0
"""TLS between a client and the engine: a thread for each connection carries the bytes.

The engine serves plain sockets. When a client asks for TLS, the rest of the conversation, from the
handshake of NBD to the last reply, goes over one end of a socket pair instead; the thread holds
the other end and the client's socket. So neither the negotiation nor the engine knows of TLS, and
what comes from a client passes through GnuTLS before anything of ours looks at it.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Final

from fvdd.attach.export import ExportError
from fvdd.attach.gnutls import Credentials, Session, TlsError, TlsMissing
from fvdd.attach.handshake import TIME_LIMIT_SECONDS
from fvdd.log import fields

PIECE: Final = 256 * 1024
# How long a client may take to read what the engine had answered before it closed.
LINGER_SECONDS: Final = 10.0

_log = logging.getLogger(__name__)
_NOTHING: Final = memoryview(b"")


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Either a directory of certificates or a file of pre-shared keys."""

    certificates: str | None = None
    psk: str | None = None
    verify_peer: bool = False

    def load(self) -> TlsServer:
        """Read keys and certificates; ExportError says what is wrong with them."""
        try:
            if self.psk is not None:
                return TlsServer(Credentials.from_keys(self.psk))
            assert self.certificates is not None
            return TlsServer(
                Credentials.from_certificates(self.certificates, verify_peer=self.verify_peer)
            )
        except TlsMissing as error:
            raise ExportError(
                "tls_missing", f"TLS is not possible here: {error}",
                "install the Debian package libgnutls30",
            ) from error  # fmt: skip
        except TlsError as error:
            raise ExportError(
                "bad_tls_credentials", f"TLS credentials cannot be used: {error}",
                "--tls-certificates names a directory with server-cert.pem, server-key.pem and "
                "ca-cert.pem, --tls-psk a file as psktool makes it",
            ) from error  # fmt: skip


class TlsServer:
    """Makes connections secure; knows those that are."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._threads: set[threading.Thread] = set()

    @property
    def verifies(self) -> bool:
        """Whether clients have to prove who they are."""
        return self._credentials.verifies

    def secure(self, client: socket.socket, peer: str) -> socket.socket:
        """Begin TLS on a non-blocking socket, which stays the caller's and is not to be used any
        more; return the plain end, non-blocking. It ends where TLS does not come about."""
        plain, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.setblocking(False)
        inner.setblocking(False)
        carrier = _Carrier(self._credentials, client.dup(), inner, peer)
        thread = threading.Thread(target=self._run, args=(carrier,), name="tls", daemon=True)
        self._threads.add(thread)
        thread.start()
        return plain

    def _run(self, carrier: _Carrier) -> None:
        try:
            carrier.run()
        finally:
            self._threads.discard(threading.current_thread())

    def close(self, seconds: float = LINGER_SECONDS) -> None:
        """Wait for the last answers to reach their clients, when the engine is closed."""
        deadline = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))


class _Carrier:
    """One connection: the client's socket with TLS, the inner one without."""

    def __init__(
        self, credentials: Credentials, client: socket.socket, inner: socket.socket, peer: str
    ) -> None:
        self._credentials = credentials
        self._client = client
        self._inner = inner
        self._peer = peer
        self._poll = select.poll()
        self._to_engine = _NOTHING
        self._to_client = _NOTHING
        self._client_ended = False
        self._engine_ended_at: float | None = None

    def run(self) -> None:
        """Carry until one side ends."""
        with self._client, self._inner:
            try:
                session = self._credentials.session(self._client.fileno())
            except TlsError as error:
                _log.error("no TLS session", extra=fields(client=self._peer, reason=error))
                return
            with contextlib.closing(session):
                try:
                    self._handshake(session)
                    self._carry(session)
                except (TlsError, OSError) as error:
                    _log.info("TLS ended", extra=fields(client=self._peer, reason=error))

    def _handshake(self, session: Session) -> None:
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        # No event of the inner end is asked for but its end, which comes unasked.
        self._poll.register(self._inner, 0)
        while not session.handshake():
            self._poll.register(
                self._client, select.POLLOUT if session.wants_write else select.POLLIN
            )
            ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                raise TlsError("the TLS handshake took too long")
            if any(fd == self._inner.fileno() for fd, _ in ready):
                raise TlsError("given up")
        _log.info("TLS", extra=fields(client=self._peer, session=session.describe()))

    def _carry(self, session: Session) -> None:
        while True:
            self._wait(session)
            if not self._to_engine and not self._client_ended:
                received = session.receive()
                if received is not None:
                    self._to_engine = received
                    self._client_ended = not received
            self._feed_engine()
            if not self._to_client and self._engine_ended_at is None:
                self._ask_engine()
            if self._to_client:
                self._to_client = self._to_client[session.send(self._to_client) :]
            if self._engine_ended_at is not None and not self._to_client:
                session.say_goodbye()
                return

    def _wait(self, session: Session) -> None:
        """Wait until something can go on. What is not waited for is not registered at all: an end
        that was seen would be told again and again."""
        client = select.POLLOUT if self._to_client else 0
        if not self._to_engine and not self._client_ended:
            client |= select.POLLIN
        inner = select.POLLOUT if self._to_engine else 0
        if not self._to_client and self._engine_ended_at is None:
            inner |= select.POLLIN
        for sock, events in ((self._client, client), (self._inner, inner)):
            if events:
                self._poll.register(sock, events)
            else:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(sock)
        if client & select.POLLIN and session.pending:
            return
        limit = None
        if self._engine_ended_at is not None:
            limit = (self._engine_ended_at + LINGER_SECONDS - time.monotonic()) * 1000
            if limit <= 0:
                raise TlsError("the client does not read")
        self._poll.poll(limit)

    def _feed_engine(self) -> None:
        try:
            if self._to_engine:
                self._to_engine = self._to_engine[self._inner.send(self._to_engine) :]
        except BlockingIOError:
            return
        except OSError:  # the engine has closed; its last answers are still to be carried
            self._to_engine = _NOTHING
            self._client_ended = True
        if self._client_ended and not self._to_engine:
            with contextlib.suppress(OSError):
                self._inner.shutdown(socket.SHUT_WR)

    def _ask_engine(self) -> None:
        try:
            data = self._inner.recv(PIECE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self._to_client = memoryview(data)
        else:
            self._engine_ended_at = time.monotonic()
