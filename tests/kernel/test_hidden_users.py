# SPDX-License-Identifier: Apache-2.0
"""Users whom neither an exclusive open nor a look at descriptors finds: a loop device, a mapping
whose descriptor is closed, a mount whose node was renamed. They are told, and lose nothing."""

import ctypes
import mmap
import os
import stat
from pathlib import Path

import pytest

from fvdtest.guest import load_driver, run, wait_until

pytestmark = pytest.mark.kernel

REFUSALS = (("detach", "disk"), ("set-read-only", "disk", "on"))


def expect_refused(fvd, device, words):
    """Neither verb does anything, and both say why; the device goes on as it was."""
    for verb in REFUSALS:
        done = fvd.ctl(*verb, check=False)
        assert done.returncode == 5, done.stderr
        assert words in done.stderr
    assert fvd.status("disk")["state"] == "attached"
    assert Path(f"/sys/block/{Path(device).name}/ro").read_text().strip() == "0"


def end_use(point):
    """Write once more, which must get through, and unmount."""
    (point / "after").write_text("after")
    run("sync", "-f", point)
    run("umount", point)


def test_loop_devices_over_a_partition_and_the_disk_are_users(fvd, store, mounts):
    load_driver("loop", "block/loop.ko")
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image)
    run("sfdisk", "-q", device, input="label: dos\n,\n")
    for node in (f"{device}p1", device):
        loop = run("losetup", "--find", "--show", node).stdout.strip()
        run("mkfs.ext4", "-q", "-F", loop)
        point = mounts(loop)
        behind = f"{node} is behind the loop device {loop}, {loop} is mounted on {point}"
        expect_refused(fvd, device, behind)
        end_use(point)
        run("losetup", "--detach", loop)
    fvd.detach("disk")
    point = mounts(fvd.attach(image))
    assert (point / "after").read_text() == "after"
    run("umount", point)


def test_mapping_without_a_descriptor_is_a_user(fvd, store):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "16M")
    device = fvd.attach(image)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(device, os.O_RDWR)
    at = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    expect_refused(fvd, device, f"{device} is mapped by process {os.getpid()}")
    ctypes.memmove(at, b"after", 5)
    assert libc.munmap(at, mmap.PAGESIZE) == 0
    fvd.detach("disk")
    with Path(fvd.attach(image)).open("rb") as file:
        assert file.read(5) == b"after"


@pytest.mark.parametrize("instead", ["nothing", "another device"])
def test_mount_of_a_node_that_was_renamed_is_a_user(fvd, store, mounts, instead):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = Path(fvd.attach(image))
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    away = device.rename(f"{device}.away")
    try:
        if instead == "another device":
            os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(43, 480))
        expect_refused(fvd, device, f"is mounted on {point}")
        end_use(point)
        fvd.detach("disk")
        assert not list(Path("/dev").glob(".fvdd*"))
    finally:
        away.rename(device)
    point = mounts(fvd.attach(image))
    assert (point / "after").read_text() == "after"
    run("umount", point)


def test_leaked_device_behind_a_loop_device_is_left(fvd, store):
    load_driver("loop", "block/loop.ko")
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "lost")
    loop = run("losetup", "--find", "--show", device).stdout.strip()
    worker = fvd.status("lost")["worker_pid"]
    fvd.kill()
    os.kill(worker, 9)
    run("rm", "-rf", fvd.folder / "state/devices/lost")
    fvd.start()
    backend = Path(f"/sys/block/{Path(device).name}/backend")
    left = fvd.ctl("doctor", "--reclaim", check=False)
    assert "reclaimed" not in left.stderr
    assert f"{device} is behind the loop device {loop}" in left.stdout
    assert backend.exists()
    run("losetup", "--detach", loop)
    done = fvd.ctl("doctor", "--reclaim", check=False)
    assert f"reclaimed {device}" in done.stderr
    wait_until(lambda: not backend.exists(), 30, "the device to be given back")
