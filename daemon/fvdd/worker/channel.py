# SPDX-License-Identifier: Apache-2.0
"""Packets between fvdd and a worker: one JSON object each, with descriptors where an op has some.

The socket is SOCK_SEQPACKET, so a packet arrives whole or not at all, and descriptors arrive
with the packet that speaks of them. Requests carry "id" and "op", answers "id" and "ok", events
"event" and no id. Both sides use this class; it knows nothing of what the messages mean.

Received descriptors belong to whoever called receive, also when the packet makes no sense to him.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

PACKET_LENGTH_MAX: Final = 128 * 1024
DESCRIPTORS_MAX: Final = 64

Message = dict[str, object]

_DESCRIPTOR_SIZE: Final = array.array("i").itemsize


class ChannelError(Exception):
    """The other side does not keep to the protocol; the channel is of no further use."""


def close_all(descriptors: Iterable[int]) -> None:
    """Close received descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


class Channel:
    """One end of a packet socket, for use from one event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._sending = asyncio.Lock()

    async def receive(self) -> tuple[Message, list[int]] | None:
        """Wait for a packet; None when the other side has closed. One task at a time."""
        while True:
            try:
                return self._receive_now()
            except BlockingIOError:
                await self._ready(self._sock.fileno(), writing=False)
            except ConnectionResetError:
                return None

    async def send(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
        """Send a packet; descriptors stay the caller's. Raises OSError when nobody listens."""
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > PACKET_LENGTH_MAX or len(descriptors) > DESCRIPTORS_MAX:
            raise ChannelError("the packet is too long")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        async with self._sending:
            while True:
                try:
                    self._sock.sendmsg([data], rights if descriptors else [])
                    return
                except BlockingIOError:
                    await self._ready(self._sock.fileno(), writing=True)

    def close(self) -> None:
        """Close this end."""
        self._sock.close()

    def _receive_now(self) -> tuple[Message, list[int]] | None:
        data, ancillary, flags, _ = self._sock.recvmsg(
            PACKET_LENGTH_MAX,
            socket.CMSG_SPACE(DESCRIPTORS_MAX * _DESCRIPTOR_SIZE),
            socket.MSG_CMSG_CLOEXEC,
        )
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(payload) // _DESCRIPTOR_SIZE * _DESCRIPTOR_SIZE
                descriptors.frombytes(payload[:whole])
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ChannelError("the packet is too long")
            if not data:
                close_all(descriptors)
                return None
            message = json.loads(data)
            if not isinstance(message, dict):
                raise ChannelError("the packet is not an object")
        except (ValueError, ChannelError) as error:
            close_all(descriptors)
            raise ChannelError(f"a bad packet: {error}") from error
        return message, descriptors.tolist()

    async def _ready(self, descriptor: int, *, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        add, remove = (
            (loop.add_writer, loop.remove_writer)
            if writing
            else (loop.add_reader, loop.remove_reader)
        )

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        add(descriptor, wake)
        try:
            await future
        finally:
            remove(descriptor)
