# SPDX-License-Identifier: Apache-2.0
"""Processes killed under a mounted file system: I/O pauses, nothing fails, nothing is lost."""

import os
import signal

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer

pytestmark = pytest.mark.kernel

ROUNDS = 3
RECOVERY_SECONDS = 60


@pytest.fixture
def formatted(fvd, store, mounts):
    """An attached image with a mounted file system: the image, the device, the mount point."""
    image = store / "disk.fvd"
    fvd.ctl("create", image, "600M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    return image, device, mounts(device)


def kill_worker(fvd):
    """Kill the worker and return when a successor serves."""
    old = fvd.status("disk")["worker_pid"]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: served_by_another(fvd, old), RECOVERY_SECONDS, "a new worker")


def served_by_another(fvd, old):
    status = fvd.status("disk")
    return status["state"] == "attached" and status["worker_pid"] not in (old, None)


def kill_daemon(fvd):
    """Kill fvdd and start another; the worker stays."""
    worker = fvd.status("disk")["worker_pid"]
    fvd.kill()
    fvd.start()
    wait_until(lambda: fvd.status("disk")["state"] == "attached", RECOVERY_SECONDS, "the adoption")
    assert fvd.status("disk")["worker_pid"] == worker


def kill_both(fvd):
    """Kill fvdd and the worker at once, and start another fvdd."""
    worker = fvd.status("disk")["worker_pid"]
    fvd.kill()
    os.kill(worker, signal.SIGKILL)
    fvd.start()
    wait_until(lambda: served_by_another(fvd, worker), RECOVERY_SECONDS, "the revival")


@pytest.mark.parametrize("accident", [kill_worker, kill_daemon, kill_both])
def test_nothing_is_lost(fvd, mounts, formatted, accident):
    image, device, point = formatted
    with Writer(point) as writer:
        for _ in range(ROUNDS):
            writer.wait_for_more()
            accident(fvd)
        writer.wait_for_more()
    run("umount", point)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    writer.check(point)
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", image)
