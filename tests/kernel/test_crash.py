# SPDX-License-Identifier: Apache-2.0
"""Processes killed or replaced under a mounted file system: I/O pauses, nothing fails or is lost.

One accident of each kind always; more with `make proof`, as many as its hour has room for: the
rounds of both kernels count together. FVD_CRASH_FACTOR multiplies them.
"""

import contextlib
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer, verifying_fio

pytestmark = pytest.mark.kernel

RESEND_SECONDS = 2.0
# What was in flight waits for the kernel's timer, at the worst twice, and is served in a moment.
# How short that is on a machine with more than one slow processor is shown by test_kill_gap.
LONGEST_SECONDS = 2 * RESEND_SECONDS + 2.0
MEDIAN_SECONDS = RESEND_SECONDS + 1.0
# In here a process starts in this time when nothing else runs; where it takes longer, so may the
# rest.
QUIET_START_SECONDS = 0.15
# Files written between two accidents of a campaign, at most.
PACE = 60
RECOVERY_SECONDS = 60
RECORD_MAX = 8192


@pytest.fixture
def formatted(fvd, store, mounts):
    """An attached image with a mounted file system: the image, the device, the mount point."""
    image = store / "disk.fvd"
    fvd.ctl("create", image, "600M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    return image, device, mounts(device)


@contextlib.contextmanager
def no_reconnect():
    """The kernel does not say meanwhile that it lost a connection or got a new one. Its records are
    read one by one: its ring drops old ones, so what is in it cannot be counted. One that was
    dropped before it was read is an error (EPIPE)."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield
        with contextlib.suppress(BlockingIOError):
            while True:
                record = os.read(log, RECORD_MAX).decode(errors="replace")
                assert "reconnected socket" not in record
                assert "Receive control failed" not in record
    finally:
        os.close(log)


def test_a_reconnect_would_be_seen():
    with pytest.raises(AssertionError), no_reconnect():
        Path("/dev/kmsg").write_text("block nbd0: reconnected socket\n")


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


def upgrade(fvd):
    """Replace the worker by the installed version; the kernel notices nothing."""
    before = fvd.status("disk")["upgrades"]
    with no_reconnect():
        answer = fvd.client.upgrade("disk")
        assert answer.method == "handed over"
        assert fvd.status("disk")["upgrades"] == before + 1


def bare_start():
    """Seconds that a process takes to start now, which does nothing."""
    begin = time.monotonic()
    run(sys.executable, "-I", "-S", "-c", "")
    return time.monotonic() - begin


def judge(pauses, load):
    """How long requests waited; `load`: how much slower everything is than on a quiet machine."""
    median = statistics.median(pauses)
    print(f"pauses after kill -9: median {median:.1f} s of {sorted(round(p, 1) for p in pauses)}")
    print(f"a process takes {load:.1f} times as long to start as where nothing else runs")
    assert max(pauses) < LONGEST_SECONDS * load
    if len(pauses) > 10:
        assert median < MEDIAN_SECONDS * load


def proof(accident, rounds):
    rounds *= int(os.environ.get("FVD_CRASH_FACTOR", "1"))
    marks = [pytest.mark.proof, pytest.mark.timeout(3600)]
    return pytest.param([accident] * rounds, marks=marks, id=f"{accident.__name__}-proof")


@pytest.mark.parametrize(
    "accidents",
    [
        pytest.param([kill_worker, upgrade, kill_daemon, kill_both], id="each"),
        proof(kill_worker, 30), proof(kill_daemon, 5), proof(kill_both, 5), proof(upgrade, 15),
    ],
)  # fmt: skip
def test_nothing_is_lost(fvd, mounts, formatted, accidents, rng):
    image, device, point = formatted
    pauses, starts = [], []
    with verifying_fio(point), Writer(point) as writer:
        for accident in accidents:
            writer.wait_for_more(rng.randrange(1, PACE) if len(accidents) > 10 else 5)
            starts.append(bare_start())
            writer.slowest = 0.0
            accident(fvd)
            writer.wait_for_more()
            if accident is kill_worker:
                pauses.append(writer.slowest)
    if pauses:
        judge(pauses, max(1.0, statistics.median(starts) / QUIET_START_SECONDS))
    run("umount", point)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    writer.check(point)
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", image)
