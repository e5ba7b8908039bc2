# SPDX-License-Identifier: Apache-2.0
"""A device that nobody can bring back is taken from the kernel, with what that still caches."""

import os

import pytest

from fvdtest.guest import load_driver, run, wait_until

pytestmark = pytest.mark.kernel

BLOCK = 4096
SIZE = 64 << 20
AT = 40 << 20
IN_THE_HEADER = 100


def write(device, data, *, sync):
    """Write as a program does; what is not synced stays in the kernel's cache."""
    fd = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(fd, data, AT)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def break_worker(fvd):
    """End the worker so that none can follow: at once, where a base that is away is tried again
    and again."""
    fd = os.open(fvd.folder / "state/devices/disk/live", os.O_WRONLY)
    try:
        os.pwrite(fd, b"damaged", IN_THE_HEADER)
    finally:
        os.close(fd)
    os.kill(fvd.status("disk")["worker_pid"], 9)
    wait_until(lambda: fvd.status("disk")["state"] == "failed", 60, "it to fail")


def test_device_without_a_worker_is_given_up_when_nobody_uses_it(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, SIZE)
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    flushed, lost = os.urandom(BLOCK), os.urandom(BLOCK)
    write(device, flushed, sync=True)
    point = mounts(device, "-o", "ro")
    break_worker(fvd)
    refused = fvd.ctl("detach", "disk", "--discard-unflushed", check=False)
    assert refused.returncode == 5
    assert f"is mounted on {point}" in refused.stderr
    run("umount", point)
    write(device, lost, sync=False)
    done = fvd.ctl("detach", "disk", "--discard-unflushed")
    assert "what was not flushed is given up" in done.stderr
    assert fvd.names() == []
    # The number is free for the next, who sees what was flushed.
    assert fvd.attach(image, "--device", device, "--name", "disk") == device
    with open(device, "rb") as file:
        assert os.pread(file.fileno(), BLOCK, AT) == flushed
    fvd.detach("disk")
    assert "no errors found" in fvd.ctl("check", image).stdout


def test_nothing_is_given_up_behind_a_loop_device(fvd, store):
    load_driver("loop", "block/loop.ko")
    image = store / "disk.fvd"
    fvd.ctl("create", image, SIZE)
    device = fvd.attach(image, "--name", "disk")
    loop = run("losetup", "--find", "--show", device).stdout.strip()
    break_worker(fvd)
    for verb in ("detach", "recover"):
        refused = fvd.ctl(verb, "disk", "--discard-unflushed", check=False)
        assert refused.returncode == 5, refused.stderr
        assert f"{device} is behind the loop device {loop}" in refused.stderr
    run("losetup", "--detach", loop)
    fvd.ctl("recover", "disk", "--discard-unflushed")
    assert fvd.status("disk")["state"] == "attached"
    fvd.detach("disk")
