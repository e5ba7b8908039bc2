# SPDX-License-Identifier: Apache-2.0
"""Devices grow while file systems on them are written to, under the kernel's own driver."""

import fcntl
import os
import random
import signal
import socket
import struct
import threading

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer

pytestmark = pytest.mark.kernel

ROUNDS = 10
UEVENT_GROUP = 1
EXT4_IOC_RESIZE_FS = 0x40086610
MIB = 1 << 20


def size_of(node):
    return int(run("blockdev", "--getsize64", node).stdout)


def grow_ext4(point, size):
    """What resize2fs does with a mounted file system; its own opening of the device for writing is
    refused by kernels that keep everybody from writing to what is mounted."""
    fd = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("=Q", size // os.statvfs(point).f_bsize))
    finally:
        os.close(fd)


class Uevents:
    """What the kernel tells udev while the with block runs."""

    def __enter__(self):
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)
        self._sock.bind((0, UEVENT_GROUP))
        self._sock.setblocking(False)
        return self

    def __exit__(self, *_):
        self._sock.close()

    def of(self, name):
        """Actions and variables of a device so far."""
        found = []
        while True:
            try:
                words = self._sock.recv(65536).split(b"\0")
            except BlockingIOError:
                return found
            fields = dict(word.split(b"=", 1) for word in words if b"=" in word)
            if fields.get(b"DEVNAME") == name.encode():
                found.append(fields)


@pytest.mark.parametrize("connections", [pytest.param(1, marks=pytest.mark.proof), 2])
def test_mounted_ext4_grows_under_a_writer(fvd, store, mounts, connections):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image, "--name", "disk", "--connections", connections)
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    with Uevents() as uevents, Writer(point) as writer:
        for size in (260 * MIB, 330 * MIB):
            writer.wait_for_more()
            fvd.ctl("resize", "disk", size)
            assert size_of(device) == size
            grow_ext4(point, size_of(device))
            writer.wait_for_more()
        actions = uevents.of(os.path.basename(device))
    assert sum(event.get(b"RESIZE") == b"1" for event in actions) == 2
    status = fvd.status("disk")
    assert (status["size_bytes"], status["restarts"], status["reconnects"]) == (330 * MIB, 0, 0)
    usage = os.statvfs(point)
    assert usage.f_blocks * usage.f_frsize > 280 * MIB
    run("umount", point)
    run("e2fsck", "-fn", device)
    writer.check(mounts(device))
    run("umount", point.parent / "mount1")
    fvd.detach("disk")
    fvd.ctl("check", image)
    # The next attachment has the size from the beginning.
    assert size_of(fvd.attach(image)) == 330 * MIB


@pytest.mark.proof
def test_worker_killed_around_a_resize(fvd, store, mounts, rng):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    size = 200 * MIB
    with Writer(point) as writer:
        for _ in range(ROUNDS):
            writer.wait_for_more()
            old, size = size, size + 4 * MIB
            pid = fvd.status("disk")["worker_pid"]
            timer = threading.Timer(rng.random() * 0.5, os.kill, (pid, signal.SIGKILL))
            timer.start()
            done = fvd.ctl("resize", "disk", size, check=False)
            timer.join()
            wait_until(lambda pid=pid: is_replaced(fvd, pid), 90, "the successor")
            if done.returncode:
                assert size_of(device) in (old, size), done.stderr
                fvd.ctl("resize", "disk", size)
            assert size_of(device) == fvd.status("disk")["size_bytes"] == size
            writer.wait_for_more()
        grow_ext4(point, size_of(device))
        writer.wait_for_more()
    run("umount", point)
    run("e2fsck", "-fn", device)
    writer.check(mounts(device))
    run("umount", point.parent / "mount1")
    fvd.detach("disk")
    fvd.ctl("check", image)


def is_replaced(fvd, pid):
    status = fvd.status("disk")
    return status["state"] == "attached" and status["worker_pid"] not in (pid, None)


@pytest.mark.proof
def test_fvdd_killed_around_a_resize(fvd, store, mounts, rng):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "200M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    with Writer(point) as writer:
        writer.wait_for_more()
        timer = threading.Timer(rng.random() * 0.5, fvd.kill)
        timer.start()
        fvd.ctl("resize", "disk", "230M", check=False)
        timer.join()
        fvd.start()
        wait_until(lambda: fvd.status("disk")["state"] == "attached", 90, "the adoption")
        assert size_of(device) in (200 * MIB, 230 * MIB)
        fvd.ctl("resize", "disk", "230M")
        assert size_of(device) == fvd.status("disk")["size_bytes"] == 230 * MIB
        grow_ext4(point, size_of(device))
        writer.wait_for_more()
    run("umount", point)
    run("e2fsck", "-fn", device)


@pytest.mark.proof
def test_partition_in_use_grows_after_its_disk(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "100M")
    device = fvd.attach(image, "--name", "disk")
    run("sfdisk", "-q", device, input="label: gpt\n,20M\n,\n")
    run("mkfs.ext4", "-q", "-F", f"{device}p2")
    point = mounts(f"{device}p2")
    with Writer(point) as writer:
        fvd.ctl("resize", "disk", "160M")
        before = size_of(f"{device}p2")
        run("sfdisk", "-q", "--no-reread", "--force", "-N", "2", device, input=",+\n")
        run("partx", "--update", "--nr", "2", device)
        assert size_of(f"{device}p2") > before + 50 * MIB
        grow_ext4(point, size_of(f"{device}p2"))
        writer.wait_for_more()
    run("umount", point)
    run("e2fsck", "-fn", f"{device}p2")
    # Nobody uses a partition now: growing leaves them where they are.
    fvd.ctl("resize", "disk", "170M")
    assert size_of(f"{device}p2") > before + 50 * MIB
    assert os.path.realpath("/dev/fvd/disk-part2") == f"{device}p2"


def test_new_space_reads_zeros_and_keeps_what_is_written(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M", "--compact")
    device = fvd.attach(image, "--name", "disk")
    fvd.ctl("resize", "disk", "+64M")
    with open(device, "r+b", buffering=0) as disk:
        disk.seek(64 * MIB)
        assert disk.read(MIB) == bytes(MIB)
        disk.seek(128 * MIB - 4096)
        data = random.Random(1).randbytes(4096)
        disk.write(data)
        os.fsync(disk.fileno())
    fvd.detach("disk")
    device = fvd.attach(image, "--name", "disk")
    with open(device, "rb") as disk:
        disk.seek(128 * MIB - 4096)
        assert disk.read() == data
