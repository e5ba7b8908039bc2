# SPDX-License-Identifier: Apache-2.0
"""The attachment without a kernel: what is told, how refusals are worded, who is left alone.

The device itself is tested where there is a driver: tests/kernel.
"""

import asyncio
import errno
import os
import socket

import pytest

from fvdd.attach import holders, leaks, partition_nodes
from fvdd.attach import sysfs as sysfs_module
from fvdd.attach.attachment import AttachError, AttachSpec
from fvdd.attach.kernel_nbd import NbdAttachment, NbdTransport
from fvdd.attach.nbd_netlink import Command, NetlinkRefused

SPEC = AttachSpec(
    backend="fvd:web:1",
    size_bytes=1 << 20,
    sector_size=512,
    flags=0x16D,
    connections=2,
    index=None,
    resend_timeout=90.0,
    kernel_timeout=90.0,
    dead_timeout=43200.0,
)


class _Netlink:
    """Takes notes instead of sending."""

    def __init__(self, failure=None):
        self.calls = []
        self.failure = failure

    async def connect(self, settings, fds, index=None):
        self.calls.append(("connect", settings, len(fds), index))
        if self.failure is not None:
            raise self.failure
        return 5

    async def reconfigure(self, index, settings, fds=()):
        self.calls.append(("reconfigure", settings, len(fds), index))
        if self.failure is not None:
            raise self.failure

    async def disconnect(self, index):
        self.calls.append(("disconnect", index))
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def transport(monkeypatch):
    made = NbdTransport()
    made._netlink = _Netlink()
    return made


@pytest.fixture
def sysfs(monkeypatch):
    """What reading sysfs gives, by path."""
    files = {}
    monkeypatch.setattr(sysfs_module, "read_text", lambda path: files.get(path, ""))
    return files


def _connect(transport, spec=SPEC):
    a, b = socket.socketpair()
    with a, b:
        return asyncio.run(transport.connect(spec, [a, b]))


def test_connect_tells_everything_and_sets_the_timer(transport, monkeypatch):
    timers = []
    monkeypatch.setattr(
        NbdAttachment, "write_resend_timeout", lambda self: timers.append(self.index)
    )
    attachment = _connect(transport)
    ((_, settings, count, index),) = transport.netlink.calls
    assert (count, index) == (2, None)
    assert (settings.size_bytes, settings.block_size, settings.flags) == (1 << 20, 512, 0x16D)
    assert (settings.kernel_timeout, settings.dead_timeout) == (90, 43200)
    assert (attachment.device, timers) == ("/dev/nbd5", [5])


def test_device_without_a_timer_is_given_back(transport):
    # There is no /sys/block/nbd5 here: the attach must not leave a device with a foreign timer.
    with pytest.raises(AttachError, match="resend timer"):
        _connect(transport)
    assert transport.netlink.calls[-1] == ("disconnect", 5)


def test_reconnect_sends_what_may_change_and_sets_the_timer_again(transport, sysfs, monkeypatch):
    timers = []
    monkeypatch.setattr(
        NbdAttachment, "write_resend_timeout", lambda self: timers.append(self.index)
    )
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    a, b = socket.socketpair()
    with a, b:
        asyncio.run(attachment.reconnect([a]))
    _, settings, count, index = transport.netlink.calls[-1]
    assert (count, index, settings.backend) == (1, 5, SPEC.backend)
    assert (settings.size_bytes, settings.block_size, settings.flags) == (None, None, None)
    assert settings.kernel_timeout == 90
    assert timers == [5, 5]


@pytest.mark.parametrize("backend", ["", "somebody else's"])
def test_device_of_others_is_never_touched(transport, sysfs, monkeypatch, backend):
    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = backend
    assert not attachment.exists()
    with pytest.raises(AttachError, match="disconnected by somebody else"):
        asyncio.run(attachment.reconnect([]))
    asyncio.run(attachment.disconnect(1.0))
    assert [call[0] for call in transport.netlink.calls] == ["connect"]


def test_device_that_others_disconnected_is_given_up(transport, sysfs, monkeypatch):
    # While anybody has it open, sysfs still shows our identifier; only RECONFIGURE tells.
    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    assert attachment.exists()
    transport.netlink.failure = NetlinkRefused(Command.RECONFIGURE, errno.EINVAL)
    with pytest.raises(AttachError, match="disconnected by somebody else"):
        asyncio.run(attachment.reconnect([]))
    assert not attachment.exists()


def test_a_driver_that_does_not_answer_is_told_with_what_helps(transport, sysfs, monkeypatch):
    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    transport.netlink.failure = TimeoutError()
    for work in (attachment.reconnect([]), attachment.disconnect(1.0)):
        with pytest.raises(AttachError, match="in time") as caught:
            asyncio.run(work)
        assert caught.value.code == "timed_out"
        assert "start the host anew" in caught.value.hint
    assert attachment.exists()


def test_device_that_cannot_be_looked_at_is_not_taken_for_gone(transport, monkeypatch, tmp_path):
    def read_text(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    monkeypatch.setattr(sysfs_module, "read_text", read_text)
    held = attachment._exclusive_fd = os.open(tmp_path, os.O_RDONLY)
    for work in (attachment.reconnect([]), attachment.disconnect(1.0)):
        with pytest.raises(AttachError, match="Too many open files"):
            asyncio.run(work)
    assert [call[0] for call in transport.netlink.calls] == ["connect"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)  # it stays: others may use it again
    assert attachment.size() is None
    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(transport.adopt(SPEC, 5))


FULL = OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("place", ["partitions", "message"])
def test_a_disconnect_that_lacks_descriptors_is_an_error_with_a_name(
    transport, sysfs, monkeypatch, tmp_path, place
):
    def partitions(name):
        raise FULL

    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    held = attachment._exclusive_fd = os.open(tmp_path, os.O_RDONLY)
    if place == "partitions":
        monkeypatch.setattr(holders, "partitions", partitions)
    else:
        transport.netlink.failure = FULL
    with pytest.raises(AttachError, match="Too many open files"):
        asyncio.run(attachment.disconnect(1.0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)


@pytest.mark.parametrize("failure", [FULL, NetlinkRefused(Command.STATUS, errno.ENOMEM)])
def test_what_cannot_be_told_of_a_release_is_a_late_one(transport, sysfs, monkeypatch, failure):
    async def status(index):
        raise failure

    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    transport.netlink.status = status
    with pytest.raises(AttachError) as caught:
        asyncio.run(attachment.disconnect(0.05))
    assert caught.value.code == "device_not_released"


def test_a_mode_that_cannot_be_told_is_an_error_with_a_name(transport, monkeypatch):
    def read_int(path):
        raise FULL

    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)
    monkeypatch.setattr(sysfs_module, "read_int", read_int)
    with pytest.raises(AttachError, match="Too many open files"):
        attachment.is_read_only()


@pytest.mark.parametrize(
    "failure", [TimeoutError(), NetlinkRefused(Command.DISCONNECT, errno.EINVAL)]
)
def test_a_disconnect_that_fails_keeps_nobody_out(transport, sysfs, monkeypatch, tmp_path, failure):
    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    scanned = []

    async def bring_back(name):
        scanned.append((name, attachment._exclusive_fd))

    monkeypatch.setattr(partition_nodes, "bring_back", bring_back)
    monkeypatch.setattr(NbdAttachment, "_link", lambda self: scanned.append("linked"))
    attachment = _connect(transport)
    sysfs["/sys/block/nbd5/backend"] = SPEC.backend
    held = os.open(tmp_path, os.O_RDONLY)
    attachment._exclusive_fd = held
    asyncio.run(attachment.lock())  # what is held need not be taken
    transport.netlink.failure = failure
    with pytest.raises(AttachError):
        asyncio.run(attachment.disconnect(1.0))
    assert scanned == [("nbd5", -1), "linked"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)


@pytest.mark.parametrize(
    ("number", "index", "code", "words"),
    [
        (errno.EBUSY, 3, "device_busy", "/dev/nbd3 is in use by process 77 (qemu-nbd)"),
        (errno.EPERM, None, "nbd_no_permission", "did not allow"),
        (errno.EINVAL, None, "kernel_refused", "Invalid argument"),
    ],
)
def test_refusals_are_worded(transport, sysfs, monkeypatch, number, index, code, words):
    monkeypatch.setattr(leaks, "is_free", lambda name: "")  # it was, a moment ago
    sysfs["/sys/block/nbd3/pid"] = "77"
    sysfs["/proc/77/comm"] = "qemu-nbd"
    transport._netlink = _Netlink(NetlinkRefused(Command.CONNECT, number))
    spec = AttachSpec(**{name: getattr(SPEC, name) for name in SPEC.__slots__} | {"index": index})
    with pytest.raises(AttachError) as caught:
        _connect(transport, spec)
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.hint


def test_deaths_are_waited_for(transport, monkeypatch):
    monkeypatch.setattr(NbdAttachment, "write_resend_timeout", lambda self: None)
    attachment = _connect(transport)

    async def main():
        loop = asyncio.get_running_loop()

        def die(index):
            transport._deaths[index] = transport.deaths(index) + 1
            transport._died.set()

        loop.call_later(0.01, die, 9)
        loop.call_later(0.02, die, 5)
        loop.call_later(0.03, die, 5)
        begin = loop.time()
        await attachment.wait_dead(2, 10.0)
        assert transport.deaths(5) == 2
        assert loop.time() - begin < 5
        # Nothing more comes: the wait ends with its limit.
        await attachment.wait_dead(3, 0.05)

    asyncio.run(main())
