# SPDX-License-Identifier: Apache-2.0
"""Two fvdds of one kernel that cannot see each other: each leaves the other's devices alone."""

import os
import subprocess
from pathlib import Path

import pytest

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdd.attach.leaks import sees_every_process
from fvdtest.guest import START_SECONDS, run, wait_until

pytestmark = pytest.mark.kernel


def answers(socket):
    try:
        with Client(str(socket)) as client:
            return client.health()
    except ApiError:
        return None


@pytest.fixture
def container(tmp_path):
    """Call it to make a PID namespace with a /proc of its own; it returns what starts an fvdd in
    it, which returns the socket and the log."""
    made = []

    def make():
        go, socket, log = tmp_path / "go", tmp_path / "b.sock", tmp_path / "b.log"
        os.mkfifo(go)
        fvdd = f"fvdd --socket {socket} --state-dir {tmp_path}/b --metrics off"
        words = ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "sh", "-c"]
        with log.open("wb") as file:
            script = f"read word <{go}; exec {fvdd}"
            made.append(subprocess.Popen([*words, script], stdout=file, stderr=file))
        fd = os.open(go, os.O_WRONLY)  # waits until somebody reads, in the namespace

        def start():
            os.write(fd, b"go\n")
            os.close(fd)
            wait_until(lambda: answers(socket), START_SECONDS, "the fvdd in the namespace")
            return socket, log

        return start

    yield make
    for process in made:
        process.kill()
        process.wait(START_SECONDS)


def test_device_of_the_host_is_not_given_away_in_a_pid_namespace(fvd, store, mounts, container):
    assert sees_every_process()
    start = container()  # before the mount, which the namespace must not inherit
    image = store / "disk.fvd"
    fvd.ctl("create", image, "64M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    point = mounts(device)
    (point / "file").write_text("dirty" * 1000)
    socket, log = start()
    # Not by itself, not even asked for it: who has it is out of its sight.
    wait_until(lambda: "leaked device" in log.read_text(), 30, "its word of the device")
    assert "cannot see whether another fvdd has it" in log.read_text()
    with Client(str(socket)) as client:
        answer = client.reclaim()
    assert answer.reclaimed == ()
    assert Path(f"/sys/block/{Path(device).name}/backend").exists()
    run("sync", "-f", point)
    run("umount", point)
    fvd.detach("disk")
    point = mounts(fvd.attach(image))
    assert (point / "file").read_text() == "dirty" * 1000
    run("umount", point)
