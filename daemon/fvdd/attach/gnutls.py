# SPDX-License-Identifier: Apache-2.0
"""The part of GnuTLS that a server needs: credentials, and sessions over a non-blocking socket.

GnuTLS and not Python's ssl, because it has pre-shared keys (which ssl learns with Python 3.13) and
because it is what QEMU, libnbd and nbdkit use: files, names and ciphers are theirs. It is loaded at
run time; who has libnbd or apt has it.

A session belongs to one thread. Nothing here waits: what cannot go on returns None.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final, NoReturn

LIBRARY: Final = "libgnutls.so.30"
RECORD_LENGTH_MAX: Final = 16384

# Nothing below TLS 1.2; keys of a session cannot be had from the long-lived ones later.
PRIORITY: Final = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"
PRIORITY_PSK: Final = PRIORITY + ":+ECDHE-PSK:+DHE-PSK"

_SERVER, _NONBLOCK = 1, 8
_PEM: Final = 1
_CERTIFICATE, _PSK = 1, 4
_REQUIRE: Final = 2
_SHUT_WR: Final = 1
_AGAIN, _INTERRUPTED = -28, -52
_PREMATURE_TERMINATION: Final = -110
_NO_CERTIFICATES: Final = (0, -34)


class TlsError(Exception):
    """A session cannot go on, or credentials cannot be used; the text says why."""


class TlsMissing(TlsError):
    """The library is not installed."""


def load() -> ctypes.CDLL:
    """Load the library; TlsMissing names its package."""
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError:
        raise TlsMissing(f"{LIBRARY} is missing") from None
    library.gnutls_strerror.restype = ctypes.c_char_p
    library.gnutls_session_get_desc.restype = ctypes.c_void_p
    library.gnutls_psk_server_get_username.restype = ctypes.c_char_p
    for name in ("gnutls_record_recv", "gnutls_record_send"):
        getattr(library, name).restype = ctypes.c_ssize_t
        getattr(library, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    library.gnutls_record_check_pending.restype = ctypes.c_size_t
    return library


class Credentials:
    """What a server proves itself by, and what clients must prove. Kept for the whole process."""

    def __init__(self) -> None:
        self.library = load()
        self._handle = ctypes.c_void_p()
        self._kind = 0
        self._verify_peer = False

    @classmethod
    def from_certificates(cls, directory: str, *, verify_peer: bool) -> Credentials:
        """Read server-cert.pem, server-key.pem and, if clients are verified (or it is there),
        ca-cert.pem and ca-crl.pem from a directory. Raises TlsError."""
        made = cls()
        made._kind, made._verify_peer = _CERTIFICATE, verify_peer
        library, handle = made.library, made._handle
        _must(library, library.gnutls_certificate_allocate_credentials(ctypes.byref(handle)))
        names = [
            os.path.join(directory, name)
            for name in ("ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem")
        ]
        for path in (names[2], names[3], *([names[0]] if verify_peer else [])):
            _must_be_readable(path)
        authorities, revoked, certificate, key = map(os.fsencode, names)
        if os.path.exists(names[0]):
            found = library.gnutls_certificate_set_x509_trust_file(handle, authorities, _PEM)
            if found in _NO_CERTIFICATES:
                raise TlsError(f"{names[0]} holds no certificate")
            _must(library, found, names[0])
        if os.path.exists(names[1]):
            found = library.gnutls_certificate_set_x509_crl_file(handle, revoked, _PEM)
            _must(library, found, names[1])
        _must(
            library,
            library.gnutls_certificate_set_x509_key_file(handle, certificate, key, _PEM),
            f"{names[2]} with {names[3]}",
        )
        return made

    @classmethod
    def from_keys(cls, path: str) -> Credentials:
        """Use a file of pre-shared keys, as psktool writes it: a line USER:HEX for each client.
        It is read again with each connection. Raises TlsError."""
        made = cls()
        made._kind = _PSK
        library, handle = made.library, made._handle
        _must_be_readable(path)
        _check_keys(path)
        _must(library, library.gnutls_psk_allocate_server_credentials(ctypes.byref(handle)))
        name = os.fsencode(os.path.abspath(path))
        _must(library, library.gnutls_psk_set_server_credentials_file(handle, name), path)
        return made

    @property
    def verifies(self) -> bool:
        """Whether clients have to prove who they are."""
        return self._kind == _PSK or self._verify_peer

    def session(self, fd: int) -> Session:
        """Begin a session with the client on a non-blocking socket, which stays the caller's."""
        session = Session(self.library)
        library, handle = self.library, session.handle
        priority = PRIORITY_PSK if self._kind == _PSK else PRIORITY
        _must(library, library.gnutls_priority_set_direct(handle, priority.encode(), None))
        _must(library, library.gnutls_credentials_set(handle, self._kind, self._handle))
        if self._verify_peer:
            library.gnutls_certificate_server_set_request(handle, _REQUIRE)
            library.gnutls_session_set_verify_cert(handle, None, 0)
        library.gnutls_transport_set_int2(handle, fd, fd)
        return session


class Session:
    """One TLS connection, server side."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.handle = ctypes.c_void_p()
        self._buffer = ctypes.create_string_buffer(RECORD_LENGTH_MAX)
        _must(library, library.gnutls_init(ctypes.byref(self.handle), _SERVER | _NONBLOCK))

    def handshake(self) -> bool:
        """Go on with the handshake as far as possible; whether it is complete."""
        result = self._library.gnutls_handshake(self.handle)
        while result < 0 and not self._library.gnutls_error_is_fatal(result):
            if result == _AGAIN:
                return False
            result = self._library.gnutls_handshake(self.handle)
        if result < 0:
            # The client hears why, if it still listens.
            self._library.gnutls_alert_send_appropriate(self.handle, result)
            _fail(self._library, result)
        return True

    @property
    def wants_write(self) -> bool:
        """What a call that could not go on waits for: that the socket takes more, or has more."""
        return bool(self._library.gnutls_record_get_direction(self.handle))

    @property
    def pending(self) -> bool:
        """Whether bytes are here already that no poll of the socket will tell of."""
        return bool(self._library.gnutls_record_check_pending(self.handle))

    def receive(self) -> memoryview | None:
        """Some bytes, valid until the next call; none at the end; None when there are none yet."""
        count = self._library.gnutls_record_recv(self.handle, self._buffer, RECORD_LENGTH_MAX)
        if count >= 0:
            return memoryview(self._buffer)[:count]
        self._go_on(count)
        return None

    def send(self, data: memoryview) -> int:
        """How many bytes were taken; 0: none yet, and the same have to be offered again."""
        piece = bytes(data[:RECORD_LENGTH_MAX])
        count = int(self._library.gnutls_record_send(self.handle, piece, len(piece)))
        if count >= 0:
            return count
        self._go_on(count)
        return 0

    def _go_on(self, result: int) -> None:
        if result in (_AGAIN, _INTERRUPTED):
            return
        if self._library.gnutls_error_is_fatal(result):
            _fail(self._library, result)

    def say_goodbye(self) -> None:
        """Tell the client that nothing more comes, if its socket takes that."""
        self._library.gnutls_bye(self.handle, _SHUT_WR)

    def describe(self) -> str:
        """Version and ciphers, and the name of a client with a pre-shared key."""
        text = self._library.gnutls_session_get_desc(self.handle)
        described = ctypes.string_at(text).decode() if text else ""
        # Allocated for us; the library's own function frees it.
        release = ctypes.c_void_p.in_dll(self._library, "gnutls_free").value
        if text and release:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(release)(text)
        user = self._library.gnutls_psk_server_get_username(self.handle)
        return f"{described} user {user.decode(errors='replace')}" if user else described

    def close(self) -> None:
        """Free it; nothing may be called afterwards."""
        self._library.gnutls_deinit(self.handle)
        self.handle = ctypes.c_void_p()


def _must_be_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise TlsError(f"{path} cannot be read ({error.strerror})") from error


def _check_keys(path: str) -> None:
    """GnuTLS looks at the file only when a client comes: mistakes shall show at the start."""
    with open(path, encoding="ascii", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    for line in lines:
        user, _, key = line.rpartition(":")
        try:
            length = len(bytes.fromhex(key))
        except ValueError:
            length = 0
        if not user or length < 16:
            raise TlsError(f"{path} is no list of keys (USER:KEY, at least 16 bytes in hex)")
    if not lines:
        raise TlsError(f"{path} holds no key")


def _must(library: ctypes.CDLL, result: int, what: str = "") -> None:
    if result < 0:
        _fail(library, result, what)


def _fail(library: ctypes.CDLL, result: int, what: str = "") -> NoReturn:
    if result == _PREMATURE_TERMINATION:
        raise TlsError("the client went away without a goodbye")
    reason = library.gnutls_strerror(result).decode()
    raise TlsError(f"{what}: {reason}" if what else reason)
