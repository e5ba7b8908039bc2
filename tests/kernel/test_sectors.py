# SPDX-License-Identifier: Apache-2.0
"""An image on a block device with sectors of 4096 bytes: its journal is written in sectors of 512.

The device is that of another NBD server, attached by nbd-client: no other has such sectors under
both kernels.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer

pytestmark = pytest.mark.kernel

DEVICE = "/dev/nbd9"  # fvdd takes the lowest free number
SIZE = "300M"


@pytest.fixture
def coarse(store):
    """A block device of 500 MiB with sectors of 4096 bytes."""
    backing, socket = store / "backing.raw", store / "backing.sock"
    with backing.open("wb") as file:
        file.truncate(500 << 20)
    argv = ["qemu-nbd", "--persistent", "--format=raw", "--discard=unmap", f"--socket={socket}"]
    with subprocess.Popen([*argv, str(backing)]) as server:
        try:
            wait_until(socket.exists, 30, "the server")
            run("nbd-client", "-unix", socket, DEVICE, "-b", "4096")
            assert run("blockdev", "--getss", DEVICE).stdout.strip() == "4096"
            yield Path(DEVICE)
            run("nbd-client", "-d", DEVICE)
        finally:
            server.terminate()  # its end is waited for, whatever failed


@pytest.mark.parametrize(
    "compact", [pytest.param(False, marks=pytest.mark.proof), True], ids=["raw", "compact"]
)
def test_an_image_on_coarse_sectors_keeps_what_was_synced(fvd, store, mounts, coarse, compact):
    base = store / "base.raw"
    with base.open("wb") as file:
        file.truncate(200 << 20)
    layout = ["--compact", "--chunk-size", "64K"] if compact else []
    allowed = ["--allow-dir", store]
    made = ["--base", base, "--base-format", "raw", *layout, *allowed]
    fvd.ctl("create", "--force", coarse, SIZE, *made)
    device = fvd.attach(coarse, "--name", "disk", "--copy-on-read", *allowed)
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    with Writer(point) as writer:
        writer.wait_for_more()
        worker = fvd.status("disk")["worker_pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: fvd.status("disk")["restarts"] == 1, 60, "the successor")
        writer.wait_for_more()
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", coarse, *allowed)
    fvd.ctl("resize", coarse, "350M", *allowed)
    fvd.ctl("check", coarse, *allowed)
    device = fvd.attach(coarse, "--name", "disk", *allowed)
    assert run("blockdev", "--getsize64", device).stdout.strip() == str(350 << 20)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    writer.check(point)
    run("umount", point)
    fvd.detach("disk")
