# SPDX-License-Identifier: Apache-2.0
"""What a kernel attachment is to the rest of fvdd: the interface that every transport fulfils.

A *transport* turns connected stream sockets, whose other ends a worker serves, into a block
device; an *attachment* is one such device. The kernel's nbd driver is one transport. Nothing here
knows of workers, images or HTTP.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

WaitFor = Literal["node", "partitions", "none"]


class AttachError(Exception):
    """An attachment could not be made, kept or removed; carries code, sentence and remedy."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def stuck(message: str) -> AttachError:
    """The driver takes one request at a time, whatever devices they are for."""
    return AttachError(
        "timed_out",
        f"{message} in time",
        "a request for this or another nbd device hangs in the kernel (dmesg): end what uses the "
        "devices and start the host anew if it does not end by itself",
    )


@dataclass(frozen=True, slots=True)
class AttachSpec:
    """Everything the kernel is told about a device; the same again after a restart."""

    backend: str
    size_bytes: int
    sector_size: int
    flags: int
    connections: int
    index: int | None
    resend_timeout: float
    kernel_timeout: float
    dead_timeout: float


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who uses the device, in words that a user can act upon."""

    what: str
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Leak:
    """A kernel device of ours that belongs to no device; `obstacle`: why it is not given back."""

    device: str
    index: int
    backend: str
    obstacle: str


class Attachment(Protocol):
    """One attached block device."""

    @property
    def index(self) -> int:
        """N of the kernel's device number N."""

    @property
    def device(self) -> str:
        """The path of the node."""

    def exists(self) -> bool:
        """Whether the kernel still has the device, and has it from us."""

    async def ready(self, wait: WaitFor, timeout: float) -> None:
        """Wait for the node (and partitions), and keep the node open from then on."""

    async def reconnect(self, sockets: Sequence[socket.socket]) -> None:
        """Give the kernel fresh sockets in place of dead ones; the far ends must be served."""

    async def wait_dead(self, count: int, timeout: float) -> None:
        """Wait until the kernel has noticed `count` dead connections, or the time is up."""

    def size(self) -> int | None:
        """Bytes that the kernel's device has; None when that cannot be told."""

    async def resize(self, size: int) -> None:
        """Tell the kernel that the device has grown to `size` bytes. On some kernels this waits
        for every request of the device, and no connection can be replaced meanwhile."""

    async def scan(self) -> None:
        """Let the kernel look for partitions again, unless one of them is in use."""

    async def lock(self) -> None:
        """Take the node exclusively so that nobody can mount it; AttachError names holders."""

    async def unlock(self) -> None:
        """Give the exclusive hold back: the detach did not happen."""

    def is_read_only(self) -> bool:
        """Whether the kernel refuses writes to the node."""

    async def set_read_only(self, wanted: bool) -> None:
        """Let the kernel refuse all writes to the node and its partitions, or allow them."""

    async def sync(self) -> None:
        """Write everything that the kernel caches for the node to the worker."""

    async def writeback_error(self) -> str | None:
        """What the kernel has to tell about write-back of the node since it was asked last."""

    async def disconnect(self, timeout: float) -> None:
        """Let the kernel drop the device and wait until it has; needs no living worker."""

    async def abandon(self) -> None:
        """Close what this process holds open, and leave the kernel's device as it is."""


class Transport(Protocol):
    """A way of making block devices from sockets."""

    @property
    def name(self) -> str:
        """The transport's name in requests and metrics."""

    async def require(self) -> None:
        """Raise AttachError with cause and remedy if this host cannot attach."""

    async def connect(self, spec: AttachSpec, sockets: Sequence[socket.socket]) -> Attachment:
        """Make a device; on failure nothing is left behind."""

    async def adopt(self, spec: AttachSpec, index: int | None) -> Attachment | None:
        """The device that the kernel has under the backend identifier, wherever; None: it has none.

        `index` is where it was last. Times are written anew, and the node is kept open.
        """

    async def leaks(self, known: Collection[str]) -> Sequence[Leak]:
        """Devices that have an identifier of ours which is not among `known`."""

    def sees_every_process(self) -> bool:
        """Whether nobody who uses a device can be hidden from this process."""

    def backends(self) -> Sequence[str]:
        """The identifiers of ours (fvd:NAME:ATTACHMENT) that the kernel has devices of."""

    async def reclaim(self, leak: Leak) -> None:
        """Give a leaked device back, which nothing must hold; AttachError."""

    async def watch(self, on_dead: Callable[[int], None]) -> None:
        """Call back with the index of every device that lost a connection; for ever."""

    async def close(self) -> None:
        """Release what the transport itself holds."""
