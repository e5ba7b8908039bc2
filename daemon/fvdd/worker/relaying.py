# SPDX-License-Identifier: Apache-2.0
"""The role of a worker without an image: hold the kernel's connections while its size changes.

fvdd gives it the kernel's sockets and connections to the worker that has the image, and takes the
sockets back when the kernel is done (fvdd.worker.relay says what is relayed and why). When fvdd
dies meanwhile, the sockets are brought to the worker in the directory, as fvdd would have done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from fvdd.attach.unix_socket import short_path
from fvdd.worker.arguments import Arguments
from fvdd.worker.channel import Channel, ChannelError, Message
from fvdd.worker.failure import Failure
from fvdd.worker.opened import Parted
from fvdd.worker.relay import Relay, take_memory

CONTROL_SOCKET: Final = "control.sock"
# The name of the process meanwhile, by which a new fvdd knows that it ends by itself.
COMM: Final = "fvd-relay"
PART_SECONDS: Final = 5
HOME_SECONDS: Final = 120.0

_log = logging.getLogger(__name__)

Blocking = Callable[[Callable[[], Any]], Awaitable[Any]]


class RelayRole:
    """The ops relay, relay_to and relay_part of a worker process."""

    def __init__(self, directory: Callable[[], Path | None], blocking: Blocking) -> None:
        """`directory`: where the worker of the device listens."""
        self._directory = directory
        self._blocking = blocking
        self._relay: Relay | None = None
        self._held: list[Parted] = []
        self._is_parted = False

    @property
    def is_taken(self) -> bool:
        """Whether the kernel's connections are here."""
        return self._relay is not None or bool(self._held)

    async def relay(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Begin: pairs of a kernel's socket and the memory with what was received of its next
        message, then a connection to the worker for each."""
        lengths = arguments.numbers("received")
        count = len(lengths)
        if self.is_taken or not count or len(descriptors) != 3 * count:
            raise Failure("bad_request", "relay needs three descriptors for each connection")
        received = [
            take_memory(descriptors[2 * at + 1], length) for at, length in enumerate(lengths)
        ]
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(COMM, encoding="ascii")
        kernels = [socket.socket(fileno=os.dup(descriptors[2 * at])) for at in range(count)]
        self._relay = Relay(kernels, received)
        self._serve_by(descriptors[2 * count :])
        return {}

    async def relay_to(self, arguments: Arguments, descriptors: list[int]) -> Message:
        """Go on with connections to the successor of a worker that died."""
        if self._relay is None or len(descriptors) != self._relay.count:
            raise Failure("bad_request", "relay_to needs one descriptor for each connection")
        relay, given = self._relay, [os.dup(fd) for fd in descriptors]
        await self._blocking(lambda: relay.serve_by([socket.socket(fileno=fd) for fd in given]))
        return {}

    def _serve_by(self, descriptors: list[int]) -> None:
        assert self._relay is not None
        self._relay.serve_by([socket.socket(fileno=os.dup(fd)) for fd in descriptors])

    async def relay_part(self, seconds: float) -> list[Parted]:
        """End: the kernel's sockets, between two messages and with nothing unanswered."""
        relay = self._relay
        if relay is None:
            raise Failure("bad_request", "there is nothing to part from")
        given = await self._blocking(lambda: relay.part(seconds))
        if given is None:
            raise Failure("worker_busy", f"requests did not end within {seconds:g} s")
        self._relay, self._is_parted = None, True
        return [Parted(fd, os.memfd_create("received", os.MFD_CLOEXEC), 0) for fd in given]

    def take_back(self, given: list[Parted]) -> bool:
        """Keep what could not be given away, if it is ours: who asked for it has gone."""
        if not self._is_parted:
            return False
        self._held = given
        return True

    async def come_home(self) -> bool:
        """fvdd has gone: bring the connections to the worker in the directory. False: they are
        lost, and the kernel sees them end."""
        _log.warning("fvdd has gone, the connections go back to the worker")
        deadline = time.monotonic() + HOME_SECONDS
        try:
            while not self._held:
                if self._relay is None or not self._relay.is_served:
                    return False
                try:
                    self._held = await self.relay_part(PART_SECONDS)
                except Failure:
                    if time.monotonic() > deadline:
                        return False
            return await self._bring()
        except (OSError, ChannelError) as error:
            _log.error("the worker cannot be reached: %s", error)
            return False
        finally:
            self._end()

    async def _bring(self) -> bool:
        directory = self._directory()
        assert directory is not None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with short_path(directory / CONTROL_SOCKET) as name:
            sock.connect(name)
        channel = Channel(sock)
        try:
            descriptors = [fd for parted in self._held for fd in (parted.fd, parted.memory)]
            lengths = [parted.length for parted in self._held]
            message = {"id": 1, "op": "resume", "received": lengths}
            await channel.send(message, descriptors)
            async with asyncio.timeout(PART_SECONDS):
                while (packet := await channel.receive()) is not None:
                    if packet[0].get("id") == 1:
                        return packet[0].get("ok") is True
            return False
        finally:
            channel.close()

    def _end(self) -> None:
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        for parted in self._held:
            os.close(parted.fd)
            os.close(parted.memory)
        self._held = []
