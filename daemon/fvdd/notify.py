# SPDX-License-Identifier: Apache-2.0
"""The service manager's side channel: readiness, status, watchdog, passed sockets.

Speaks systemd's datagram protocol directly; without NOTIFY_SOCKET every call does nothing, so the
daemon behaves the same when started by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

_FIRST_PASSED_FD: Final = 3


class Notifier:
    """Sends states to the service manager, if there is one."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address if address is not None else os.environ.get("NOTIFY_SOCKET", "")

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    async def watchdog(self) -> None:
        """Tell the service manager twice an interval that the loop is alive; for ever."""
        interval = watchdog_seconds()
        if interval is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(interval / 2)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A service manager that is gone is no reason to fail.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.connect(address)
            sock.send(message.encode())


def watchdog_seconds() -> float | None:
    """The watchdog's interval if it is meant for this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        interval = int(os.environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
    return interval if interval > 0 else None


def passed_sockets() -> list[socket.socket]:
    """Listening sockets that the service manager opened for us (socket activation)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    found = []
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + count):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found
