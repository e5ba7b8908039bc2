# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: bytes from people we do not trust, and what may come of them.

A target takes any bytes and returns; whatever it raises is a defect, and so is a crash, a hang or
a process that grows. Seeds are the golden images and conversations as real clients hold them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fvdcore import Device, EngineFault
from fvdd.attach import handshake
from fvdengine.check import check_image
from fvdengine.errors import EngineError
from fvdtest import golden
from fvdtest.images import Opened, make_image, open_image

IMAGE_BYTES_MAX = 1 << 18
DISK_BYTES = 4 << 20
ANSWER_SECONDS = 20.0
HANDSHAKE_SECONDS = 5.0
_REQUEST = struct.Struct(">IHHQQI")
_CHOICE = struct.Struct(">BBIH")
_MAGIC = 0x25609513


@dataclass(frozen=True)
class Target:
    """`seeds` begins the search; `run` does what a stranger can make us do with the bytes."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]


def image_seeds() -> list[bytes]:
    """The golden images that are small, whole or damaged."""
    found = [golden.packed(golden.index()[name]["files"][0]) for name in golden.names()]
    return [image for image in found if len(image) <= IMAGE_BYTES_MAX]


def run_image(data: bytes) -> None:
    """Check an image, open it for reading, then with recovery for writing, and use it."""
    with tempfile.TemporaryDirectory(prefix="fvd-fuzz.") as folder:
        path = Path(folder) / "image.fvd"
        path.write_bytes(data)
        with contextlib.suppress(EngineError):
            check_image(path)
        for read_only in (True, False):
            with contextlib.suppress(EngineError, OSError):
                opened = open_image(path, read_only=read_only, crew_threads=1)
                try:
                    use(opened.device, read_only)
                finally:
                    opened.close()


def use(device: Device, read_only: bool) -> None:
    """Requests at both ends of the disk; errors are answers."""
    size = device.size
    for offset in (0, size // 2 & ~511, max(0, size - 4096) & ~511):
        length = min(4096, size - offset)
        with contextlib.suppress(OSError):
            device.read(offset, length)
        if not read_only:
            with contextlib.suppress(OSError):
                device.write(offset, b"f" * min(512, length))
    if not read_only:
        with contextlib.suppress(OSError):
            device.flush()


def handshake_seeds() -> list[bytes]:
    """As clients of this project's tests, libnbd and qemu begin."""

    def option(number: int, payload: bytes = b"") -> bytes:
        return struct.pack(">QII", handshake.OPTION_MAGIC, number, len(payload)) + payload

    flags = struct.pack(">I", 3)
    context = b"base:allocation"
    meta = struct.pack(">I", 0) + struct.pack(">I", 1) + struct.pack(">I", len(context)) + context
    go = struct.pack(">I", 0) + struct.pack(">HH", 1, 3)
    return [
        flags + option(1),
        flags + option(8) + option(10, meta) + option(7, go),
        flags + option(9, meta) + option(6, go) + option(3) + option(2),
        flags + option(5) + option(7, struct.pack(">I", 3) + b"web" + struct.pack(">H", 0)),
        struct.pack(">I", 1) + option(99, b"x" * 300) + option(1, b"unknown"),
    ]


def run_handshake(data: bytes) -> None:
    """Negotiate with a client that says this and no more."""
    ours, theirs = socket.socketpair()
    exports = (handshake.Export(DISK_BYTES), handshake.Export(DISK_BYTES, name="web"))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reading = loop.create_task(_drain(theirs))
        with contextlib.suppress(handshake.HandshakeError):
            await handshake.negotiate(ours, exports, time_limit=HANDSHAKE_SECONDS)
        ours.close()
        await reading

    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        room = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        theirs.send(data[:room])
        theirs.shutdown(socket.SHUT_WR)
        asyncio.run(main())


async def _drain(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while await loop.sock_recv(sock, 1 << 16):
            pass


def transmission_seeds() -> list[bytes]:
    """Requests of every kind, alone and one behind the other."""

    def request(kind: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> bytes:
        return _REQUEST.pack(_MAGIC, flags, kind, 7, offset, length) + payload

    each = [
        request(0, 4096, 512),
        request(1, 512, 16, payload=b"w" * 16),
        request(1, 0, 16, 1, b"f" * 16),
        request(3, 0, 0),
        request(4, 65536, 65536),
        request(6, 8192, 4096, 2),
        request(7, 0, DISK_BYTES, 8),
        request(2, 0, 0),
    ]
    raw = [*each, b"".join(each), request(99, 0, 0), request(0, DISK_BYTES - 1, 2)]
    chosen = b"".join(_CHOICE.pack(kind, 0, 8 * kind, 8) for kind in range(9))
    return [*(style + one for style in (b"\2", b"\3") for one in raw), b"\0" + chosen]


@functools.cache
def _served() -> Opened:
    """A disk that is opened once: half a thousand conversations a second are held with it."""
    with tempfile.TemporaryDirectory(prefix="fvd-fuzz.") as folder:
        base = Path(folder) / "base.raw"
        base.write_bytes(os.urandom(1 << 20))
        image = make_image(Path(folder) / "clone.fvd", base=str(base), size=DISK_BYTES)
        return open_image(image, allow_dirs=("/",), crew_threads=2)


def close_served() -> None:
    """Close what run_transmission has opened, if anything."""
    if _served.cache_info().currsize:
        _served().close()
        _served.cache_clear()


def run_transmission(data: bytes) -> None:
    """Serve a connection that says this and no more; then the disk must still serve another."""
    device = _served().device
    style = data[0] if data else 0
    said = data[1:] if style & 2 else requests_of(data[1:])
    converse(device, said, structured=bool(style & 1))
    answer = converse(device, _REQUEST.pack(_MAGIC, 0, 0, 1, 0, 512), structured=False)
    if len(answer) != 16 + 512:
        raise AssertionError(f"the disk answered {len(answer)} bytes to a read of 512")


def requests_of(data: bytes) -> bytes:
    """Requests with the right magic, of which the bytes choose everything else.

    The search sees nothing of native code, so it would never find the magic by itself.
    """
    made: list[bytes] = []
    for kind, flags, offset, length in _CHOICE.iter_unpack(data[: len(data) // 8 * 8]):
        odd = bool(kind & 0x80)  # offsets and lengths as they are, or in sectors
        size = length if odd else length * 512
        place = offset * (1 if odd else 512)
        if kind & 0x40:
            place |= 0xFFFF << 48
        payload = bytes([flags]) * min(size, 1 << 16) if kind % 8 == 1 else b""
        made.append(_REQUEST.pack(_MAGIC, flags, kind % 9, len(made), place, size) + payload)
    return b"".join(made)


def converse(device: Device, data: bytes, structured: bool) -> bytes:
    """All that the server says to a client that sends this and then nothing more."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(ANSWER_SECONDS)
        with theirs:
            _serve(device, theirs, structured)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.sendall(data[: 1 << 16])
            ours.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := ours.recv(1 << 20):
                answer = (answer + part)[: 1 << 16]
        return answer


def _serve(device: Device, sock: socket.socket, structured: bool) -> None:
    """A connection's place is free a moment after the client saw its end; one must come."""
    deadline = time.monotonic() + ANSWER_SECONDS
    status = 1 if structured else None
    while True:
        try:
            # The engine owns what it is given, also when it refuses.
            given = os.dup(sock.fileno())
            device.serve(given, structured=structured, read_only=False, block_status_id=status)
            return
        except EngineFault as error:
            if error.errno != errno.EMFILE or time.monotonic() > deadline:
                raise
            time.sleep(0.001)


TARGETS = {
    "image": Target(image_seeds, run_image),
    "handshake": Target(handshake_seeds, run_handshake),
    "transmission": Target(transmission_seeds, run_transmission),
}
