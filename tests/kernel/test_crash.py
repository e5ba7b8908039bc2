# SPDX-License-Identifier: Apache-2.0
"""A worker killed under a mounted file system: input and output pause, nothing fails or is lost."""

import hashlib
import os
import signal
import threading

import pytest

from fvdtest.guest import run, wait_until

pytestmark = pytest.mark.kernel

ROUNDS = 3
RECOVERY_SECONDS = 60


class Writer(threading.Thread):
    """Writes numbered files, each synced, and remembers what was acknowledged."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.written = {}
        self.error = None
        self.ending = threading.Event()

    def run(self):
        number = 0
        try:
            while not self.ending.is_set():
                data = os.urandom(50_000)
                path = self.folder / f"{number:06}"
                with path.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self.written[path.name] = hashlib.sha256(data).digest()
                number += 1
        except OSError as error:
            self.error = error


def test_killed_worker_is_replaced_and_nothing_is_lost(fvd, store, mounts):
    image = store / "disk.fvd"
    fvd.ctl("create", image, "600M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    writer = Writer(point)
    writer.start()
    try:
        for _ in range(ROUNDS):
            count = len(writer.written)
            wait_until(lambda c=count: len(writer.written) > c + 5, RECOVERY_SECONDS, "writes")
            old = fvd.status("disk")["worker_pid"]
            os.kill(old, signal.SIGKILL)
            wait_until(
                lambda p=old: fvd.status("disk")["worker_pid"] not in (p, None, 0),
                RECOVERY_SECONDS,
                "a new worker",
            )
        count = len(writer.written)
        wait_until(lambda: len(writer.written) > count + 5, RECOVERY_SECONDS, "writes after all")
    finally:
        writer.ending.set()
        writer.join(RECOVERY_SECONDS)
    assert writer.error is None
    assert fvd.status("disk")["restarts"] == ROUNDS
    run("umount", point)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    found = {name: hashlib.sha256((point / name).read_bytes()).digest() for name in writer.written}
    assert found == writer.written
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", image)
