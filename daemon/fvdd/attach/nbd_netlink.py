# SPDX-License-Identifier: Apache-2.0
"""The kernel's nbd driver over generic netlink: connect, reconfigure, disconnect, status, events.

Only messages: no policy, no waiting for nodes, no sysfs. The kernel executes a generic netlink
request inside the sender's system call, and a disconnect may wait there for a worker; so every
request runs on a thread of its own with a socket of its own, never on the daemon's loop. Events
only arrive, so they are read on the loop.

Rules of the driver that callers must know:
- RECONFIGURE fills dead connections only; without one it reports success and drops the socket.
- RECONFIGURE must carry the backend identifier that CONNECT gave.
- RECONFIGURE with another size waits, on newer kernels, for every request of the device, and holds
  up every other configuration of it: no connection can be replaced before it is done.
- TIMEOUT that is left out keeps what the previous user of the index had; so it is always sent.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from pyroute2.netlink import (  # type: ignore[import-untyped]
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    genlmsg,
    nla,
)
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket  # type: ignore[import-untyped]

from fvdd.attach.threads import run_blocking

FAMILY: Final = "nbd"
GROUP: Final = "nbd_mc_group"
VERSION: Final = 1

# Longer than anything the driver does with a living worker; a call that exceeds it goes on in its
# thread, but nobody waits for it any more.
CALL_LIMIT_SECONDS: Final = 60.0


class Command(IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class NbdMessage(genlmsg):  # type: ignore[misc]
    """Layout of every message of the family; numbers and types are the kernel's ABI."""

    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "device_list"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]  # noqa: N801 (the name is looked up by pyroute2)
        prefix = "NBD_SOCK_"
        nla_flags = NLA_F_NESTED
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: N801
            prefix = "NBD_SOCK_"
            nla_flags = NLA_F_NESTED
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class device_list(nla):  # type: ignore[misc]  # noqa: N801
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]  # noqa: N801
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


@dataclass(frozen=True, slots=True)
class Settings:
    """What CONNECT and RECONFIGURE tell the driver; None leaves an attribute out."""

    backend: str
    size_bytes: int | None = None
    block_size: int | None = None
    flags: int | None = None
    # Seconds, whole: the driver's unit.
    kernel_timeout: int | None = None
    dead_timeout: int | None = None


class NetlinkRefused(Exception):
    """The kernel answered with an errno."""

    def __init__(self, command: Command, code: int) -> None:
        super().__init__(f"{command.name} failed: {os.strerror(code)}")
        self.command = command
        self.errno = code


class FamilyMissing(Exception):
    """There is no generic netlink family called nbd in this network namespace."""


def attributes(
    settings: Settings | None, index: int | None, fds: Sequence[int] = ()
) -> list[tuple[str, object]]:
    """The attribute list of a message, in the order of the numbers."""
    attrs: list[tuple[str, object]] = []
    if index is not None:
        attrs.append(("NBD_ATTR_INDEX", index))
    if settings is not None:
        values = (
            ("NBD_ATTR_SIZE_BYTES", settings.size_bytes),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", settings.block_size),
            ("NBD_ATTR_TIMEOUT", settings.kernel_timeout),
            ("NBD_ATTR_SERVER_FLAGS", settings.flags),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", settings.dead_timeout),
        )
        attrs.extend((name, value) for name, value in values if value is not None)
    if fds:
        items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]}) for fd in fds]
        attrs.append(("NBD_ATTR_SOCKETS", {"attrs": items}))
    if settings is not None:
        attrs.append(("NBD_ATTR_BACKEND_IDENTIFIER", settings.backend))
    return attrs


def message(command: Command, attrs: Sequence[tuple[str, object]]) -> NbdMessage:
    """A message of the family, not yet encoded."""
    made = NbdMessage()
    made["cmd"] = int(command)
    made["version"] = VERSION
    made["attrs"] = list(attrs)
    return made


class _Socket(AsyncGenericNetlinkSocket):  # type: ignore[misc]
    # A missing driver is an ordinary finding here; the caller words it.
    module_err_level = "debug"

    async def setup_endpoint(self) -> None:
        if getattr(self.local, "transport", None) is not None:
            return
        await super().setup_endpoint()
        await self.bind(FAMILY, NbdMessage)

    async def exchange(self, request: NbdMessage, flags: int) -> list[Any]:
        # The family's number must be known before the request is built.
        await self.setup_endpoint()
        answers = await self.nlm_request(request, msg_type=self.prid, msg_flags=flags)
        return [answer async for answer in answers]


class NbdNetlink:
    """The commands of the family, awaitable from the daemon's loop."""

    async def connect(
        self, settings: Settings, fds: Sequence[int], index: int | None = None
    ) -> int:
        """Make a device over the sockets `fds`; return its number.

        The kernel takes references of its own: the caller closes `fds` afterwards.
        """
        answers = await self._call(Command.CONNECT, attributes(settings, index, fds))
        for answer in answers:
            found = answer.get_attr("NBD_ATTR_INDEX")
            if found is not None:
                return int(found)
        raise NetlinkRefused(Command.CONNECT, errno.EPROTO)

    async def reconfigure(self, index: int, settings: Settings, fds: Sequence[int] = ()) -> None:
        """Replace dead connections by `fds` and set whatever `settings` holds."""
        await self._call(Command.RECONFIGURE, attributes(settings, index, fds))

    async def resize(self, index: int, backend: str, size: int, limit: float) -> None:
        """Set the size in bytes; TimeoutError after `limit` seconds, and the kernel goes on."""
        settings = Settings(backend, size_bytes=size)
        await self._call(Command.RECONFIGURE, attributes(settings, index), limit=limit)

    async def disconnect(self, index: int) -> None:
        """Drop the device's configuration; it is gone when the last opener closes."""
        await self._call(Command.DISCONNECT, attributes(None, index))

    async def status(self, index: int | None = None) -> dict[int, bool]:
        """Number -> "has a configuration" (which does not mean that somebody serves it)."""
        answers = await self._call(Command.STATUS, attributes(None, index), flags=NLM_F_REQUEST)
        found: dict[int, bool] = {}
        for answer in answers:
            devices = answer.get_attr("NBD_ATTR_DEVICE_LIST")
            for item in devices.get_attrs("NBD_DEVICE_ITEM") if devices is not None else ():
                number = item.get_attr("NBD_DEVICE_INDEX")
                found[int(number)] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
        return found

    async def probe(self) -> None:
        """Raise FamilyMissing when the driver cannot be spoken to."""
        await self.status()

    async def link_dead_events(self, ready: Callable[[], None]) -> AsyncIterator[int]:
        """Yield the number of a device each time one of its connections dies.

        `ready` is called once nothing can be missed any more.
        """
        sock = _Socket()
        try:
            await _named_missing(sock.setup_endpoint)
            sock.add_membership(GROUP)
            ready()
            while True:
                async for event in sock.get():
                    if event["cmd"] == Command.LINK_DEAD:
                        yield int(event.get_attr("NBD_ATTR_INDEX"))
        finally:
            sock.close()

    async def _call(
        self,
        command: Command,
        attrs: Sequence[tuple[str, object]],
        flags: int = NLM_F_REQUEST | NLM_F_ACK,
        limit: float = CALL_LIMIT_SECONDS,
    ) -> list[Any]:
        request = message(command, attrs)

        async def exchange() -> list[Any]:
            sock = _Socket()
            try:
                await _named_missing(sock.setup_endpoint)
                return await sock.exchange(request, flags)
            except NetlinkError as error:
                raise NetlinkRefused(command, int(error.code)) from error
            finally:
                sock.close()

        return await run_blocking(lambda: asyncio.run(exchange()), timeout=limit)


async def _named_missing(setup: Callable[[], Any]) -> None:
    try:
        await setup()
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            raise FamilyMissing from error
        raise
