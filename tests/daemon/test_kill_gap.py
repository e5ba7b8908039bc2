# SPDX-License-Identifier: Apache-2.0
"""How long a device is silent after kill -9 of its worker; the spare worker that shortens it."""

import os
import signal
import statistics
import time

import pytest

from fvdd.devices.adoption import worker_pids
from fvdd.devices.spares import SPARE_PLACE
from fvdtest.daemon import Daemon, wait_until

KILLS = 40


@pytest.fixture
def restarts():
    """As many as are killed: the budget is another test's subject."""
    return 10 * KILLS


def spare(daemon):
    """The process that waits."""
    wait_until(daemon.has_spare, "the spare worker")
    (pid,) = worker_pids(daemon.state / "devices" / SPARE_PLACE)
    return pid


def gap(daemon, disk, number):
    """Kill the worker and ask at once, as a file system would; seconds until the answer."""
    offset = number * 65_536
    disk.write(offset, bytes([number + 1]) * 4096)
    dead = daemon.device("web").worker_pid
    begin = time.monotonic()
    os.kill(dead, signal.SIGKILL)
    assert disk.read(offset, 4096) == bytes([number + 1]) * 4096
    seconds = time.monotonic() - begin
    assert daemon.device("web").worker_pid != dead
    return seconds


def test_successor_is_the_spare_and_is_known_by_its_directory(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(4096, b"acknowledged")
    model.write(4096, b"acknowledged")
    successor = spare(daemon)
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").state == "attached", "the end of the recovery")
    assert daemon.device("web").worker_pid == successor
    assert worker_pids(daemon.state / "devices/web") == [successor]
    assert spare(daemon) != successor


def test_next_daemon_finds_the_worker_that_was_a_spare(tmp_path, clone):
    image, model = clone()
    first = Daemon(tmp_path).start()
    disk = first.attach(image)
    successor = spare(first)
    os.kill(first.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    waiting = spare(first)
    first.stop()
    assert not os.path.exists(f"/proc/{waiting}")
    second = Daemon(tmp_path, after=first).start()
    try:
        wait_until(second.settled, "the adoption")
        assert second.device("web").worker_pid == successor
        assert second.device("web").restarts == 0
        second.detach_all()
        wait_until(lambda: not second.has_spare(), "the end of the spare that nobody needs")
    finally:
        second.stop()
        second.kill_workers()


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_requests_are_served_again_within_half_a_second(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    gaps = []
    for number in range(KILLS):
        spare(daemon)
        gaps.append(gap(daemon, disk, number))
        model.write(number * 65_536, bytes([number + 1]) * 4096)
        wait_until(lambda: daemon.device("web").state == "attached", "the end of the recovery")
    print(f"gap: median {statistics.median(gaps):.3f} s, longest {max(gaps):.3f} s")
    assert model.difference(disk.read(0, model.size)) is None
    assert statistics.median(gaps) < 0.2
    assert max(gaps) < 0.5
