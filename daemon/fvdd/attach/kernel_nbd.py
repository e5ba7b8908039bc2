# SPDX-License-Identifier: Apache-2.0
"""A /dev/nbdN from the first request to ready partitions, and back.

Attaching: CONNECT with everything explicit (nothing is inherited from the index's previous user),
the resend timer through sysfs, then node and partitions. Detaching: an exclusive open keeps a
racing mount out, holders are looked for and named, then sync, partition nodes removed, DISCONNECT,
our descriptors closed, and the kernel watched until it has let go.

The node is opened and synced on threads of their own: both wait for a worker, and the daemon's
loop must stay free to replace that worker. The order DISCONNECT before close matters: closed first,
a mount could slip in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fvdd.attach import (
    exclusive,
    holders,
    leaks,
    node_flags,
    node_links,
    nodes,
    partition_nodes,
    sysfs,
)
from fvdd.attach.attachment import AttachError, AttachSpec, Holder, Leak, WaitFor, stuck
from fvdd.attach.sizes import grow, scan_again
from fvdd.attach.support import load_netlink, require_nbd
from fvdd.attach.threads import run_blocking

if TYPE_CHECKING:
    from fvdd.attach.nbd_netlink import NbdNetlink, NetlinkRefused, Settings

log = logging.getLogger("fvdd.attach")

SECTOR: Final = 512
POLL_SECONDS: Final = 0.01
POLL_MAX_SECONDS: Final = 0.2
# udev opens every new node for a moment; a detach right after an attach must not fail over it.
PROBE_PATIENCE_SECONDS: Final = 3.0
UDEV_SETTLE_SECONDS: Final = 15
EVENT_RETRY_SECONDS: Final = 5.0
CLIENT_FLAGS_NONE: Final = 0
WRITEBACK_LIMIT_SECONDS: Final = 30.0
# A node that nobody ever opened is read by the kernel first, which waits for a worker.
HOLD_LIMIT_SECONDS: Final = 5.0
UNKNOWN: Final = -1

_PROBERS: Final = ("systemd-udevd", "(udev-worker)", "udevd", "blkid", "udisksd")


class NbdTransport:
    """Makes devices through the kernel's nbd driver."""

    name: Final = "nbd"

    def __init__(self) -> None:
        self._netlink: NbdNetlink | None = None
        self._deaths: dict[int, int] = {}
        self._died = asyncio.Event()

    @property
    def netlink(self) -> NbdNetlink:
        if self._netlink is None:
            self._netlink = load_netlink()
        return self._netlink

    async def require(self) -> None:
        await require_nbd(self.netlink)

    async def connect(self, spec: AttachSpec, sockets: Sequence[socket.socket]) -> NbdAttachment:
        from fvdd.attach.nbd_netlink import NetlinkRefused

        fds = [sock.fileno() for sock in sockets]
        if spec.index is not None:
            await self._require_free(spec.index)
        try:
            index = await self.netlink.connect(_settings(spec), fds, spec.index)
        except NetlinkRefused as error:
            raise _refused(spec, error) from error
        made = NbdAttachment(self, spec, index)
        try:
            made.write_resend_timeout()
        except OSError as error:
            await self.netlink.disconnect(index)
            raise AttachError(
                "kernel_refused",
                f"cannot set the resend timer of /dev/nbd{index} ({error.strerror})",
                "fvdd needs write access to /sys/block",
            ) from error
        return made

    async def _require_free(self, index: int) -> None:
        """A number that was asked for is taken only when nothing hangs on its last use. (Of free
        ones the kernel itself chooses none that anybody has open.)"""
        reason = await run_blocking(lambda: leaks.is_free(f"nbd{index}"))
        if reason:
            raise AttachError(
                "device_busy",
                f"/dev/nbd{index} is in use: {reason}",
                "leave --device out to get a free one",
            )

    async def adopt(self, spec: AttachSpec, index: int | None) -> NbdAttachment | None:
        found = sysfs.find_backend(spec.backend, index)
        if found is None or not (await self.netlink.status(found)).get(found):
            return None
        # A resize may have been broken off: what the kernel says is what the node has.
        sectors = sysfs.read_int(f"/sys/block/nbd{found}/size") or spec.size_bytes // SECTOR
        made = NbdAttachment(self, replace(spec, size_bytes=sectors * SECTOR), found)
        made.write_resend_timeout()
        await made.ready("none", 0.0)
        return made

    async def leaks(self, known: Collection[str]) -> Sequence[Leak]:
        return await run_blocking(lambda: leaks.find_leaks(known))

    def sees_every_process(self) -> bool:
        return leaks.sees_every_process()

    def backends(self) -> Sequence[str]:
        return [*leaks.find_backends().values()]

    async def reclaim(self, leak: Leak) -> None:
        from fvdd.attach.nbd_netlink import NetlinkRefused

        try:
            fd = await run_blocking(
                lambda: leaks.hold(leak), timeout=HOLD_LIMIT_SECONDS, discard=os.close
            )
            try:
                await self.netlink.disconnect(leak.index)
            finally:
                os.close(fd)
        except (NetlinkRefused, OSError) as error:  # TimeoutError is one
            why = str(error) or "in time"
            raise AttachError(
                "kernel_refused", f"the kernel did not disconnect {leak.device} ({why})"
            ) from error
        node_links.remove(node_links.name_of(leak.backend), f"nbd{leak.index}")

    async def watch(self, on_dead: Callable[[int], None]) -> None:
        from fvdd.attach.nbd_netlink import FamilyMissing

        while True:
            try:
                async for index in self.netlink.link_dead_events(lambda: None):
                    self._deaths[index] = self._deaths.get(index, 0) + 1
                    self._died.set()
                    on_dead(index)
            except FamilyMissing:
                pass  # Nothing is attached then; the driver may be loaded later.
            except (OSError, AttachError) as error:
                log.warning("link events are not available: %s", error)
            await asyncio.sleep(EVENT_RETRY_SECONDS)

    async def close(self) -> None:
        return None

    def deaths(self, index: int) -> int:
        """How many connections of the device the kernel has declared dead so far."""
        return self._deaths.get(index, 0)

    async def next_death(self) -> None:
        self._died.clear()
        await self._died.wait()


class NbdAttachment:
    """One device of the driver, as this process sees and holds it."""

    def __init__(self, transport: NbdTransport, spec: AttachSpec, index: int) -> None:
        self._transport = transport
        self._spec = spec
        self._index = index
        self._kept_fd = -1
        self._exclusive_fd = -1
        self._opening: asyncio.Task[None] | None = None
        # Somebody else disconnected the device. The kernel keeps its name and size for as long as
        # anybody, ourselves included, has it open, so sysfs does not tell.
        self._is_taken_away = False
        self._deaths_settled = transport.deaths(index)

    @property
    def index(self) -> int:
        return self._index

    @property
    def kernel_name(self) -> str:
        return f"nbd{self._index}"

    @property
    def device(self) -> str:
        return f"/dev/{self.kernel_name}"

    def exists(self) -> bool:
        if self._is_taken_away:
            return False
        try:
            backend = sysfs.read_text(f"/sys/block/{self.kernel_name}/backend")
        except OSError as error:
            raise AttachError(
                "kernel_refused",
                f"whether the kernel still has {self.device} cannot be told ({error.strerror})",
                "remove the cause, then try again",
            ) from error
        return backend == self._spec.backend

    async def ready(self, wait: WaitFor, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        if wait == "none":
            self._opening = loop.create_task(self._open_quietly())
            return
        await self._wait_node(deadline)
        if wait == "node":
            self._opening = loop.create_task(self._open_quietly())
            return
        try:
            await self._open(max(deadline - loop.time(), 1.0))
        except TimeoutError as error:
            raise AttachError(
                "timed_out",
                f"the partition table of {self.device} could not be read within {timeout:g} s",
                "the base is slow or gone: attach with --wait node to go on without partitions",
            ) from error
        await self._wait_partition_nodes(deadline)

    async def reconnect(self, sockets: Sequence[socket.socket]) -> None:
        from fvdd.attach.nbd_netlink import NetlinkRefused

        self._require_ours()
        fds = [sock.fileno() for sock in sockets]
        settings = _settings(self._spec, again=True)
        self._deaths_settled = self._transport.deaths(self._index)
        try:
            await self._transport.netlink.reconfigure(self._index, settings, fds)
        except NetlinkRefused as error:
            if error.errno == errno.EINVAL:
                # Nothing in the request is wrong: there is no configuration left to change.
                self._is_taken_away = True
                self._require_ours()
            raise AttachError(
                "kernel_refused",
                f"the kernel did not take new connections for {self.device} ({error})",
                "the kernel's log says why (dmesg)",
            ) from error
        except TimeoutError as error:
            raise stuck(f"the kernel took no new connections for {self.device}") from error
        # TIMEOUT in the request has just reset the timer.
        self.write_resend_timeout()

    async def wait_dead(self, count: int, timeout: float) -> None:
        wanted = self._deaths_settled + count
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._transport.deaths(self._index) < wanted:
                    await self._transport.next_death()

    def size(self) -> int | None:
        sectors = _sectors(self.kernel_name)
        return sectors * SECTOR if sectors is not None and sectors != UNKNOWN else None

    async def resize(self, size: int) -> None:
        self._require_ours()
        await grow(self._transport.netlink, self._index, self._spec.backend, size)
        self._spec = replace(self._spec, size_bytes=size)

    async def scan(self) -> None:
        await scan_again(self.device)
        self._link()

    async def lock(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PROBE_PATIENCE_SECONDS
        await self._finish_opening()
        if self._exclusive_fd >= 0:
            return
        while True:
            found = await self._try_lock()
            if not found:
                return
            if loop.time() >= deadline or not all(_is_prober(holder) for holder in found):
                raise AttachError(
                    "device_held",
                    f"{self.device} is in use: {holders.describe(found)}",
                    "unmount it and end the processes that use it, then detach again",
                )
            await asyncio.sleep(POLL_MAX_SECONDS)

    async def unlock(self) -> None:
        _close(self._exclusive_fd)
        self._exclusive_fd = -1

    def is_read_only(self) -> bool:
        try:
            return sysfs.read_int(f"/sys/block/{self.kernel_name}/ro") == 1
        except OSError as error:
            raise AttachError(
                "kernel_refused",
                f"whether {self.device} is read-only cannot be told ({error.strerror})",
                "remove the cause, then try again",
            ) from error

    async def set_read_only(self, wanted: bool) -> None:
        try:
            await run_blocking(lambda: node_flags.set_read_only(self.kernel_name, wanted))
        except OSError as error:
            raise AttachError(
                "kernel_refused",
                f"the mode of {self.device} stays as it is ({error.strerror})",
                "detach it, and attach it in the other mode",
            ) from error

    async def sync(self) -> None:
        fd = self._exclusive_fd if self._exclusive_fd >= 0 else self._kept_fd
        if fd < 0:
            return
        try:
            await run_blocking(lambda: os.fsync(fd))
        except OSError as error:
            raise AttachError(
                "kernel_refused",
                f"{self.device} could not be flushed ({error.strerror})",
                "fvdctl status shows the fault; the device stays attached",
            ) from error

    async def writeback_error(self) -> str | None:
        fd = self._kept_fd
        if fd < 0:
            return None
        try:
            # The kernel tells each open descriptor once what went wrong since its last question.
            await run_blocking(lambda: os.fsync(fd), timeout=WRITEBACK_LIMIT_SECONDS)
        except TimeoutError:
            return None  # still being written; asked again later
        except OSError as error:
            return str(error.strerror)
        return None

    async def disconnect(self, timeout: float) -> None:
        from fvdd.attach.nbd_netlink import NetlinkRefused

        await self._finish_opening()
        try:
            is_ours = self.exists()
        except AttachError:
            await self.unlock()
            raise
        if not is_ours:
            log.warning("%s is not ours any more, it is left alone", self.device)
            await self.abandon()
            return
        try:
            try:
                if self._exclusive_fd >= 0:
                    partition_nodes.remove(self.kernel_name, self._exclusive_fd)
                await self._transport.netlink.disconnect(self._index)
            except BaseException:
                # It goes on being a device: nobody is kept out, and its partitions are back.
                await self.unlock()
                await partition_nodes.bring_back(self.kernel_name)
                self._link()
                raise
        except NetlinkRefused as error:
            raise AttachError(
                "kernel_refused", f"the kernel did not disconnect {self.device} ({error})"
            ) from error
        except TimeoutError as error:
            raise stuck(f"the kernel did not disconnect {self.device}") from error
        except OSError as error:
            raise AttachError(
                "kernel_refused",
                f"the kernel could not be told to disconnect {self.device} ({error.strerror})",
                "remove the cause, then try again",
            ) from error
        await self.abandon()
        node_links.remove(node_links.name_of(self._spec.backend), self.kernel_name)
        await self._wait_released(timeout)

    async def abandon(self) -> None:
        _close(self._exclusive_fd)
        _close(self._kept_fd)
        self._exclusive_fd = self._kept_fd = -1

    def write_resend_timeout(self) -> None:
        """Set the kernel's resend timer of the device, in sysfs, in milliseconds."""
        path = f"/sys/block/{self.kernel_name}/queue/io_timeout"
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{int(self._spec.resend_timeout * 1000)}\n")

    async def _wait_node(self, deadline: float) -> None:
        """The disk has its size, and the node in /dev is this disk's."""
        want = self._spec.size_bytes // SECTOR
        pause = POLL_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            if _sectors(self.kernel_name) == want and self._node_is_right():
                return
            if loop.time() >= deadline:
                raise AttachError(
                    "node_missing",
                    f"{self.device} did not appear, although the kernel has the device",
                    "/dev must be a devtmpfs or be kept by udev; in a container, pass it through",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, POLL_MAX_SECONDS)

    def _node_is_right(self) -> bool:
        own = holders.read_disk(self.kernel_name).numbers.get(self.kernel_name)
        return own is not None and nodes.number_of(self.device) == own

    async def _open(self, timeout: float | None) -> None:
        """Keep the node open. The first open after CONNECT makes the kernel scan partitions."""

        def scan() -> int:
            fd = os.open(self.device, os.O_RDONLY | os.O_CLOEXEC)
            if not holders.partitions(self.kernel_name):
                # Drivers loaded without partition minors scan only when asked. Refusals mean that
                # somebody else holds the disk or that there is nothing to scan.
                with contextlib.suppress(OSError):
                    fcntl.ioctl(fd, partition_nodes.BLKRRPART)
            return fd

        try:
            self._kept_fd = await run_blocking(scan, timeout=timeout, discard=os.close)
            self._link()
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise AttachError(
                "node_missing", f"{self.device} cannot be opened ({error.strerror})"
            ) from error

    def _link(self) -> None:
        name = node_links.name_of(self._spec.backend)
        with contextlib.suppress(OSError):  # as what makes them
            node_links.make(name, self.kernel_name, holders.partitions(self.kernel_name))

    async def _open_quietly(self) -> None:
        try:
            await self._wait_node(asyncio.get_running_loop().time() + UDEV_SETTLE_SECONDS)
            await self._open(None)
        except (AttachError, OSError) as error:
            log.warning("%s is not kept open: %s", self.device, error)

    async def _finish_opening(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._opening
            self._opening = None

    async def _wait_partition_nodes(self, deadline: float) -> None:
        """Every partition that the kernel found has its node, and udev has seen them all."""
        loop = asyncio.get_running_loop()
        if os.path.exists("/run/udev/control") and shutil.which("udevadm") is not None:
            process = await asyncio.create_subprocess_exec(
                "udevadm",
                "settle",
                f"--timeout={UDEV_SETTLE_SECONDS}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            await process.wait()
        while True:
            numbers = holders.read_disk(self.kernel_name).numbers
            late = [name for name, own in numbers.items() if nodes.number_of(f"/dev/{name}") != own]
            if not late:
                return
            if loop.time() >= deadline:
                raise AttachError(
                    "node_missing",
                    f"the kernel found {', '.join(late)}, but the nodes did not appear in /dev",
                    "/dev must be a devtmpfs or be kept by udev",
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _try_lock(self) -> list[Holder]:
        """Open the node exclusively; on failure the list of those who prevent it."""

        name = self.kernel_name
        fd, found = await run_blocking(
            lambda: exclusive.hold(name), discard=lambda made: _close(made[0])
        )
        self._exclusive_fd = fd
        return found

    async def _wait_released(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pause = POLL_SECONDS
        while True:
            connected = await self._is_connected()
            size = _sectors(self.kernel_name)
            if not connected and size in (0, None):
                return
            if loop.time() >= deadline:
                who = await run_blocking(lambda: _users_of(self.kernel_name))
                raise AttachError(
                    "device_not_released",
                    f"the kernel has not let go of {self.device} after {timeout:g} s{who}",
                    "end whoever has it open; the image is closed clean",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, POLL_MAX_SECONDS)

    async def _is_connected(self) -> bool:
        """Also where that cannot be told."""
        from fvdd.attach.nbd_netlink import NetlinkRefused

        try:
            return (await self._transport.netlink.status(self._index)).get(self._index, False)
        except (NetlinkRefused, OSError):
            return True

    def _require_ours(self) -> None:
        if not self.exists():
            raise AttachError(
                "device_failed",
                f"{self.device} was disconnected by somebody else",
                "nbd-client -d or another program did it; detach the device and attach it again",
            )


def _settings(spec: AttachSpec, *, again: bool = False) -> Settings:
    """What the driver is told; size, block size and flags are fixed at CONNECT."""
    from fvdd.attach.nbd_netlink import Settings

    return Settings(
        backend=spec.backend,
        size_bytes=None if again else spec.size_bytes,
        block_size=None if again else spec.sector_size,
        flags=None if again else spec.flags,
        kernel_timeout=int(spec.kernel_timeout),
        dead_timeout=int(spec.dead_timeout),
    )


def _refused(spec: AttachSpec, error: NetlinkRefused) -> AttachError:
    if error.errno == errno.EBUSY and spec.index is not None:
        owner = sysfs.owner_of(spec.index)
        return AttachError(
            "device_busy",
            f"/dev/nbd{spec.index} is in use{owner}",
            "leave --device out to get a free one",
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return AttachError(
            "nbd_no_permission",
            "the kernel did not allow to attach a device",
            "run fvdd as root in the host's user namespace",
        )
    return AttachError(
        "kernel_refused",
        f"the kernel refused to attach the device ({error})",
        "the kernel's log says why (dmesg)",
    )


def _is_prober(holder: Holder) -> bool:
    return any(f"({name})" in holder.what for name in _PROBERS)


def _sectors(name: str) -> int | None:
    """The size in sysfs; None: it has none, UNKNOWN: it cannot be told now."""
    try:
        return sysfs.read_int(f"/sys/block/{name}/size")
    except OSError:
        return UNKNOWN


def _users_of(name: str) -> str:
    """Who has a disk, for the end of a sentence."""
    try:
        found = holders.find_holders(holders.read_disk(name))
    except OSError:
        return ""
    return f": {holders.describe(found)}" if found else ""


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
