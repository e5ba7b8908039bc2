# SPDX-License-Identifier: Apache-2.0
"""A file on a web server as an export, run by nbdkit's plugin for Python on the system's
interpreter; web.py asks by the same code what the file is.

nbdkit's own curl plugin is not used: where a server answers a request for a part with all of the
file, it takes the first bytes for the part; and it does not see that the file was replaced. Here an
answer counts only if it has status 206, is exactly the part that was asked for, of a file with the
length and the tag (ETag, else Last-Modified) that are known, and is complete in time. Redirections
are not followed. Connections are kept; one that the server has closed meanwhile is made anew once.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import io
import os
import queue
import re
import select
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

API_VERSION = 2
CONNECTIONS = 16
# All of a request ends in SECONDS, and another one for each SLOWEST bytes that it asks for.
SECONDS = 20.0
SLOWEST = 64 << 10
TAG_MAX = 1000
LOG_BYTES = 1 << 20
LATE = "no complete answer in time"

_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]*"')
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class Unfit(Exception):
    """An answer that is none to what was asked."""


# -- one connection ------------------------------------------------------------------------------


class Wire:
    """A connection, all uses of which end at the deadline of its request."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client reads an answer from."""
        return io.BufferedReader(_Reader(self))

    def arm(self) -> socket.socket:
        self.sock.settimeout(_left(self.deadline))
        return self.sock

    def is_quiet(self) -> bool:
        """Whether it can take another request: the server has neither closed it nor said more."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self.wire.arm().recv_into(buffer)
        except TimeoutError:
            raise TimeoutError(LATE) from None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(LATE)
    return left


def _addresses(host: str, port: int, deadline: float) -> list[Any]:
    """What the name stands for; asking for that has no limit of its own."""
    with contextlib.suppress(OSError):
        return socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            told.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            told.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        found = told.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError(f"nothing tells the address of {host} in time") from None
    if isinstance(found, Exception):
        raise found
    return list(found)


def _dial(host: str, port: int, deadline: float) -> socket.socket:
    addresses = _addresses(host, port, deadline)
    problem: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
    for i, (family, kind, protocol, _, place) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(addresses) - i))
            sock.connect(place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            problem = error
        else:
            return sock
    raise problem


# -- the server ----------------------------------------------------------------------------------


class Site:
    """The server of a URI, and the connections to it that wait for their next request."""

    def __init__(self, uri: str, cainfo: str = "", password_file: str = "") -> None:
        parts = urlsplit(uri)
        self.host, self.netloc = parts.hostname or "", parts.netloc
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.password_file = password_file
        self.context = None
        if parts.scheme == "https":
            self.context = ssl.create_default_context(cafile=cainfo or None)
        self.idle: list[Wire] = []
        self.lock = threading.Lock()
        self.turns = threading.Semaphore(CONNECTIONS)

    def close(self) -> None:
        with self.lock:
            while self.idle:
                self.idle.pop().close()

    def get(self, buffer: memoryview, offset: int, tag: str, seconds: float) -> tuple[int, str]:
        """Fill the buffer; the length and the tag of the file. `tag` is the one it had, if known.

        Raises OSError, HTTPException, Unfit; then the buffer holds nothing of use.
        """
        with self.turns:
            deadline = time.monotonic() + seconds
            wire, reply = self._begin(self._request(offset, len(buffer), tag), deadline)
            try:
                told = judge(reply, offset, len(buffer), tag)
                _fill(reply, buffer)
            except BaseException:
                wire.close()
                raise
            if reply.will_close:
                wire.close()
            else:
                with self.lock:
                    self.idle.append(wire)
            return told

    def _request(self, offset: int, length: int, tag: str) -> bytes:
        place = f"bytes={offset}-{offset + length - 1}"
        lines = [
            f"GET {self.target} HTTP/1.1", f"Host: {self.netloc}", "User-Agent: fvd",
            "Accept: */*", "Accept-Encoding: identity", f"Range: {place}",
        ]  # fmt: skip
        if _STRONG_TAG.fullmatch(tag):
            lines.append(f"If-Match: {tag}")
        user = os.environ.get("FVD_HTTP_USER")
        if user and self.password_file:
            secret = Path(self.password_file).read_text(encoding="utf-8").partition("\n")[0]
            word = base64.b64encode(f"{user}:{secret}".encode()).decode()
            lines.append(f"Authorization: Basic {word}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _begin(self, request: bytes, deadline: float) -> tuple[Wire, http.client.HTTPResponse]:
        """Send it and take the head of the answer."""
        with self.lock:
            wire = self.idle.pop() if self.idle else None
        if wire is not None:
            if wire.is_quiet():
                try:
                    return wire, _exchange(wire, request, deadline)
                except (ConnectionError, ssl.SSLError):
                    pass  # closed just now, as servers do with those that are idle
            wire.close()
        wire = self._connect(deadline)
        return wire, _exchange(wire, request, deadline)

    def _connect(self, deadline: float) -> Wire:
        sock = _dial(self.host, self.port, deadline)
        try:
            if self.context is not None:
                sock.settimeout(_left(deadline))
                sock = self.context.wrap_socket(sock, server_hostname=self.host)
            return Wire(sock)
        except BaseException:
            sock.close()
            raise


def _exchange(wire: Wire, request: bytes, deadline: float) -> http.client.HTTPResponse:
    try:
        wire.deadline = deadline
        wire.arm().sendall(request)
        reply = http.client.HTTPResponse(wire, method="GET")  # type: ignore[arg-type]
        reply.begin()
        return reply
    except BaseException:
        wire.close()
        raise


def judge(
    reply: http.client.HTTPResponse, offset: int, length: int, tag: str
) -> tuple[int, str]:
    """The length and the tag of the file; raise Unfit where it is not the part that was asked
    for, or of another file than the one with `tag`, unless that is ""."""
    if reply.status == 200:
        raise Unfit("the server does not serve parts of a file: it answers 200 with all of it")
    if reply.status == 412:
        raise Unfit("the file was replaced: the server says 412")
    if 300 <= reply.status < 400:
        raise Unfit(f"the server redirects ({reply.status}); name the final address")
    if reply.status != 206:
        raise Unfit(f"the server says {reply.status} {_plain(reply.reason)}")
    encoding = _header(reply, "Content-Encoding")
    if encoding.lower() not in ("", "identity"):
        raise Unfit(f"the server encodes the file: {_plain(encoding)}")
    place = _header(reply, "Content-Range")
    found = _RANGE.fullmatch(place)
    if found is None or (int(found[1]), int(found[2])) != (offset, offset + length - 1):
        raise Unfit(
            f"the server does not serve parts of a file as they are asked for: it answers 206 with "
            f"{_plain(place) or 'an unknown part'} to bytes {offset}-{offset + length - 1}"
        )
    if reply.length not in (None, length):
        raise Unfit(f"the server sends {reply.length} bytes of {length}")
    told = (_header(reply, "ETag") or _header(reply, "Last-Modified"))[:TAG_MAX]
    if tag not in ("", told):
        raise Unfit(f"the file was replaced: its tag is {_plain(told) or 'gone'}, it was {tag}")
    return int(found[3]), told


def _header(reply: http.client.HTTPResponse, name: str) -> str:
    return ", ".join(reply.headers.get_all(name, [])).strip()


def _plain(text: str) -> str:
    """What comes from afar, as messages may show it."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:200])


def _fill(reply: http.client.HTTPResponse, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        got = reply.readinto(buffer[done:])
        if not got:
            raise Unfit(f"the answer ends after {done} bytes of {len(buffer)}")
        done += got
    if reply.read(1):  # also takes the end of an answer in chunks
        raise Unfit(f"the answer goes on after {len(buffer)} bytes")


def ask(uri: str, seconds: float, cainfo: str, password_file: str) -> tuple[int, str]:
    """The length and the tag of the file, by asking for its first byte; raises as Site.get."""
    site = Site(uri, cainfo, password_file)
    try:
        return site.get(memoryview(bytearray(1)), 0, "", seconds)
    finally:
        site.close()


# -- the file ------------------------------------------------------------------------------------


def identity(tag: str, length: int) -> str:
    """What an image records of it: remote.Remote.identity, in hexadecimal."""
    return hashlib.sha256(tag.encode() + struct.pack("<xQ", length)).hexdigest()


class File:
    """The file, and what all answers must tell of it: `length` and `known`, its identity, as they
    were given, else as the first answer has them."""

    def __init__(self, site: Site, length: int = 0, known: str = "") -> None:
        self.site, self.length, self.tag = site, 0, ""
        byte = memoryview(bytearray(1))
        told, tag = site.get(byte, 0, "", SECONDS)
        if length not in (0, told):
            raise Unfit(f"the file was replaced: it has {told} bytes, it had {length}")
        if known not in ("", identity(tag, told)):
            raise Unfit(f"the file was replaced: its tag is {_plain(tag) or 'gone'}")
        self.length, self.tag = told, tag

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer; raises as Site.get."""
        seconds = SECONDS + len(buffer) / SLOWEST
        told, _ = self.site.get(buffer, offset, self.tag, seconds)
        if told != self.length:
            raise Unfit(f"the file was replaced: it has {told} bytes, it had {self.length}")


# -- what nbdkit calls ---------------------------------------------------------------------------

given = {"uri": "", "length": "0", "identity": "", "cainfo": "", "password-file": ""}
opened: dict[str, File] = {}
opening = threading.Lock()


def thread_model() -> int:
    import nbdkit

    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key not in given:
        raise RuntimeError(f"unknown parameter {key}")
    given[key] = value


def open(readonly: bool) -> File:  # noqa: A001 (nbdkit's name)
    with opening:
        if "file" not in opened:
            try:
                site = Site(given["uri"], given["cainfo"], given["password-file"])
                opened["file"] = File(site, int(given["length"]), given["identity"])
            except Exception as error:
                raise _told(error) from None
        return opened["file"]


def get_size(handle: File) -> int:
    return handle.length


def can_multi_conn(handle: File) -> bool:
    return True


def pread(handle: File, buffer: Any, offset: int, flags: int) -> None:
    import nbdkit

    try:
        handle.read(memoryview(buffer), offset)
    except Exception as error:
        nbdkit.set_error(errno.EIO)
        raise _told(error) from None


def _told(error: Exception) -> Exception:
    """The error, for nbdkit to write into our log, which is kept small."""
    with contextlib.suppress(OSError):
        if os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
    return Unfit(str(error) or type(error).__name__)
