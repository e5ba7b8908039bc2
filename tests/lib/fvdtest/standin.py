# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the kernel's nbd driver: a transport that keeps the devices in this process.

It behaves as the driver does where it matters: requests go out over the sockets that it was given;
a connection that ends is dead and reported; requests that were in flight or come meanwhile wait
until a fresh socket is there and are sent again; a socket that nobody needs is dropped. Tests
read and write through `Disk`, from any thread.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from fvdd.attach.attachment import AttachError, AttachSpec, Leak, WaitFor
from fvdtest.nbd_client import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_FUA,
    Answer,
    Closed,
    NbdClient,
    NbdError,
)

RESEND_LIMIT_SECONDS = 60.0
NBD_FLAG_READ_ONLY = 2


class Disk:
    """One device: what a file system would see of it."""

    def __init__(self, spec: AttachSpec, index: int, on_dead: Callable[[int], None]) -> None:
        self.spec = spec
        self.index = index
        self.holders: list[str] = []
        self.resent = 0
        self.deaths = 0
        self.is_gone = False
        self.is_read_only = False
        self._on_dead = on_dead
        self._changed = threading.Condition()
        self._clients: list[NbdClient | None] = []
        # Slots in which a request is under way, and its connection (which may be dead by now).
        self._busy: dict[int, NbdClient] = {}
        self._waiting = 0
        self._is_frozen = False
        # Called when requests are waited for and nothing can be reconnected.
        self.on_freeze: Callable[[], None] = lambda: None
        # Called when they have ended, before others can begin.
        self.on_thaw: Callable[[], None] = lambda: None
        self._configuration = threading.Lock()

    # What the driver does.

    def connect(self, sockets: Sequence[socket.socket]) -> None:
        with self._changed:
            self._clients = [_client(sock) for sock in sockets]
        for slot, client in enumerate(self._clients):
            assert client is not None
            self._watch(slot, client)

    def reconnect(self, sockets: Sequence[socket.socket]) -> None:
        """Fill dead slots; what is left over is dropped, as the driver does."""
        filled = []
        with self._configuration, self._changed:
            for sock in sockets:
                client = _client(sock)
                if None in self._clients:
                    slot = self._clients.index(None)
                    self._clients[slot] = client
                    filled.append((slot, client))
                else:
                    client.close()
            self._changed.notify_all()
        for slot, client in filled:
            self._watch(slot, client)

    def disconnect(self) -> None:
        with self._changed:
            self.is_gone = True
            clients, self._clients = self._clients, []
            self._changed.notify_all()
        for client in clients:
            if client is not None:
                with suppress(Closed, OSError):
                    client.send_request(CMD_DISC)
                _shut(client)

    @property
    def dead_connections(self) -> int:
        """How many fresh sockets the device has room for."""
        with self._changed:
            return self._clients.count(None)

    def cut(self, slot: int = 0) -> None:
        """Let one connection die while the worker lives, as a kernel timeout does."""
        client = self._clients[slot]
        if client is not None:
            self._dead(slot, client)

    def resize(self, size: int) -> None:
        """Freeze the queue as the driver does: wait for every request, let none begin, and keep
        the configuration locked meanwhile, so that no connection can be replaced."""
        with self._configuration, self._changed:
            self._is_frozen = True
            self.on_freeze()
            self._changed.wait_for(lambda: not self._busy and not self._waiting)
            self.spec = replace(self.spec, size_bytes=size)
            self.on_thaw()
            self._is_frozen = False
            self._changed.notify_all()

    # What a user of the device does.

    def read(self, offset: int, length: int) -> bytes:
        return self._call(CMD_READ, offset, length).data

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._call(CMD_WRITE, offset, len(data), data, FLAG_FUA if fua else 0)

    def flush(self) -> None:
        self._call(CMD_FLUSH)

    def trim(self, offset: int, length: int) -> None:
        self._call(CMD_TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._call(CMD_WRITE_ZEROES, offset, length)

    def _call(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> Answer:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_frozen)
            self._waiting += 1
        try:
            return self._sent(command, offset, length, data, flags)
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def _sent(self, command: int, offset: int, length: int, data: bytes, flags: int) -> Answer:
        while True:
            slot, client = self._take()
            try:
                return client.call(command, offset, length, data, flags)
            except NbdError as error:
                raise OSError(error.errno, "the device answered with an error") from error
            except (Closed, OSError):
                self._dead(slot, client)
                self.resent += 1
            finally:
                with self._changed:
                    del self._busy[slot]
                    self._changed.notify_all()

    def _take(self) -> tuple[int, NbdClient]:
        with self._changed:
            found: list[tuple[int, NbdClient]] = []

            def is_free() -> bool:
                found[:] = [
                    (slot, client)
                    for slot, client in enumerate(self._clients)
                    if client is not None and slot not in self._busy
                ]
                return bool(found) or self.is_gone

            if not self._changed.wait_for(is_free, RESEND_LIMIT_SECONDS) or self.is_gone:
                raise OSError(5, "the device has no connection")
            slot, client = found[0]
            self._busy[slot] = client
            return slot, client

    def _dead(self, slot: int, client: NbdClient) -> None:
        with self._changed:
            if slot >= len(self._clients) or self._clients[slot] is not client:
                return
            self._clients[slot] = None
            self.deaths += 1
            self._changed.notify_all()
        _shut(client)
        self._on_dead(self.index)

    def _watch(self, slot: int, client: NbdClient) -> None:
        """Notice the end of an idle connection, as the driver's receive work does; close it when
        nobody waits on it any more, or he would go on waiting on whatever gets its number next."""

        def body() -> None:
            with suppress(OSError):
                # A peek waits for the first byte of an answer too, and then looks again later.
                while client.sock.recv(1, socket.MSG_PEEK):
                    with self._changed:
                        if self._changed.wait_for(lambda: slot not in self._busy, 60):
                            continue
            self._dead(slot, client)
            with self._changed:
                self._changed.wait_for(lambda: client not in self._busy.values())
            client.close()

        threading.Thread(target=body, name=f"standin-{self.index}-{slot}", daemon=True).start()


class StandInAttachment:
    """The attachment's side of a Disk."""

    def __init__(self, transport: StandInTransport, disk: Disk) -> None:
        self._transport, self.disk = transport, disk
        self._settled = 0

    @property
    def index(self) -> int:
        return self.disk.index

    @property
    def device(self) -> str:
        return f"/dev/nbd{self.disk.index}"

    def exists(self) -> bool:
        return not self.disk.is_gone

    async def ready(self, wait: WaitFor, timeout: float) -> None:
        if wait == "partitions":
            await asyncio.to_thread(self.disk.read, 0, self.disk.spec.sector_size)

    async def reconnect(self, sockets: Sequence[socket.socket]) -> None:
        self._settled = self.disk.deaths
        self.disk.reconnect(sockets)

    async def wait_dead(self, count: int, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.disk.deaths < self._settled + count:
                    await asyncio.sleep(0.005)

    def size(self) -> int:
        return self.disk.spec.size_bytes

    async def resize(self, size: int) -> None:
        await asyncio.to_thread(self.disk.resize, size)

    async def scan(self) -> None:
        return None

    async def lock(self) -> None:
        if self.disk.holders:
            names = ", ".join(self.disk.holders)
            raise AttachError("device_held", f"{self.device} is in use: {names}", "unmount it")

    async def unlock(self) -> None:
        return None

    def is_read_only(self) -> bool:
        return self.disk.is_read_only or bool(self.disk.spec.flags & NBD_FLAG_READ_ONLY)

    async def set_read_only(self, wanted: bool) -> None:
        if not wanted and self.disk.spec.flags & NBD_FLAG_READ_ONLY:
            raise AttachError("kernel_refused", "it was attached read-only", "attach it anew")
        self.disk.is_read_only = wanted

    async def sync(self) -> None:
        await asyncio.to_thread(self.disk.flush)

    async def writeback_error(self) -> str | None:
        return None

    async def disconnect(self, timeout: float) -> None:
        self.disk.disconnect()
        self._transport.disks.pop(self.index, None)

    async def abandon(self) -> None:
        return None


class StandInTransport:
    """A host with as many devices as one likes."""

    name = "nbd"

    def __init__(self) -> None:
        self.disks: dict[int, Disk] = {}
        self.is_in_a_namespace = False

    async def require(self) -> None:
        return None

    async def connect(
        self, spec: AttachSpec, sockets: Sequence[socket.socket]
    ) -> StandInAttachment:
        index = spec.index
        if index is None:
            index = next(number for number in range(1000) if number not in self.disks)
        elif index in self.disks:
            raise AttachError("device_busy", f"/dev/nbd{index} is in use", "leave --device out")
        disk = Disk(spec, index, lambda number: None)
        disk.connect(sockets)
        self.disks[index] = disk
        return StandInAttachment(self, disk)

    async def adopt(self, spec: AttachSpec, index: int | None) -> StandInAttachment | None:
        for disk in self.disks.values():
            if disk.spec.backend == spec.backend:
                found = StandInAttachment(self, disk)
                found._settled = disk.deaths  # what died before has been noticed
                return found
        return None

    async def leaks(self, known: Collection[str]) -> Sequence[Leak]:
        return [
            Leak(f"/dev/nbd{index}", index, disk.spec.backend, ", ".join(disk.holders))
            for index, disk in self.disks.items()
            if disk.spec.backend not in known
        ]

    def sees_every_process(self) -> bool:
        return not self.is_in_a_namespace

    def backends(self) -> Sequence[str]:
        return [disk.spec.backend for disk in self.disks.values()]

    async def reclaim(self, leak: Leak) -> None:
        self.disks.pop(leak.index).disconnect()

    async def watch(self, on_dead: Callable[[int], None]) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        # fvdd goes; the kernel's devices stay.
        return None


def _client(sock: socket.socket) -> NbdClient:
    own = sock.dup()
    own.settimeout(RESEND_LIMIT_SECONDS)
    return NbdClient(own)


def _shut(client: NbdClient) -> None:
    """End the connection and wake whoever waits on it; its watcher closes it."""
    with suppress(OSError):
        client.sock.shutdown(socket.SHUT_RDWR)
