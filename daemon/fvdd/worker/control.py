# SPDX-License-Identifier: Apache-2.0
"""What a server in the foreground can be told while it runs, by its user or by root.

It listens where fvdengine.rendezvous says. Each connection brings packets as a worker's control
channel does; one op at a time, since each changes the image.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Final

from fvdd.log import fields
from fvdd.worker.arguments import Arguments
from fvdd.worker.channel import Channel, ChannelError, Message, close_all
from fvdd.worker.failure import Failure, as_failure
from fvdengine.rendezvous import may_command, peer_user, server_address

BACKLOG: Final = 8
PEERS_MAX: Final = 8

_log = logging.getLogger(__name__)

Op = Callable[[Arguments], Message]


class ServerControl:
    """The listening socket of one server, for use as an asynchronous context manager."""

    def __init__(self, path: str, ops: Mapping[str, Op]) -> None:
        """`ops` may block; they run on a thread."""
        self._path = path
        self._ops = ops
        self._busy = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ServerControl:
        if not self._ops:
            return self
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind(server_address(self._path))
            sock.listen(BACKLOG)
        except OSError as error:
            # Serving goes on without: somebody has taken the address.
            _log.warning("the server cannot be told anything", extra=fields(reason=error))
            sock.close()
            return self
        sock.setblocking(False)
        self._begin(self._accept_all(sock))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                user = peer_user(sock)
                if not may_command(user) or len(self._tasks) > PEERS_MAX:
                    _log.warning("refused a control connection", extra=fields(uid=user))
                    sock.close()
                    continue
                self._begin(self._attend(Channel(sock)))

    async def _attend(self, channel: Channel) -> None:
        try:
            with contextlib.suppress(OSError, ChannelError):
                while (packet := await channel.receive()) is not None:
                    message, descriptors = packet
                    close_all(descriptors)
                    await channel.send(await self._answer(message))
        finally:
            channel.close()

    async def _answer(self, message: Message) -> Message:
        op = str(message.get("op"))
        answer: Message = {"id": message.get("id"), "ok": True}
        try:
            handler = self._ops.get(op)
            if handler is None:
                raise Failure("unknown_op", f"this server knows no op {op!r}")
            async with self._busy:
                _log.info("request", extra=fields(action=op))
                # To its end, also when the server is stopped meanwhile.
                work = asyncio.ensure_future(asyncio.to_thread(handler, Arguments(message)))
                try:
                    return answer | await asyncio.shield(work)
                except asyncio.CancelledError:
                    await asyncio.wait({work})
                    raise
        except Exception as error:
            failure = as_failure(error)
            if failure.is_unexpected:
                _log.exception("op failed", extra=fields(op=op))
            return {"id": message.get("id"), "ok": False, "error": failure.as_message()}

    def _begin(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
