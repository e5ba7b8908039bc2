# SPDX-License-Identifier: Apache-2.0
"""Processes killed or replaced under a mounted file system: I/O pauses, nothing fails or is lost.

One accident of each kind always; more with `make proof`, as many as its hour has room for: the
rounds of both kernels count together. FVD_CRASH_FACTOR multiplies them.
"""

import os
import signal

import pytest

from fvdtest.guest import run, wait_until
from fvdtest.writer import Writer, verifying_fio

pytestmark = pytest.mark.kernel

RESEND_SECONDS = 2.0
# The kernel looks at its timer now and then, and in here a new process takes seconds, more of them
# while other tests run beside it. How short the gap is is measured on the host, in test_kill_gap.
SLACK_SECONDS = 25.0
RECOVERY_SECONDS = 60


@pytest.fixture
def formatted(fvd, store, mounts):
    """An attached image with a mounted file system: the image, the device, the mount point."""
    image = store / "disk.fvd"
    fvd.ctl("create", image, "600M")
    device = fvd.attach(image, "--name", "disk")
    run("mkfs.ext4", "-q", "-F", device)
    return image, device, mounts(device)


def reconnected():
    """How often the kernel says that it lost a connection or got a new one."""
    text = run("dmesg").stdout
    return text.count("reconnected socket") + text.count("Receive control failed")


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
    before, reconnects = fvd.status("disk")["upgrades"], reconnected()
    answer = fvd.client.upgrade("disk")
    assert answer.method == "handed over"
    assert fvd.status("disk")["upgrades"] == before + 1
    assert reconnected() == reconnects


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
def test_nothing_is_lost(fvd, mounts, formatted, accidents):
    image, device, point = formatted
    slowest = [0.0]
    with verifying_fio(point), Writer(point) as writer:
        for accident in accidents:
            writer.wait_for_more()
            writer.slowest = 0.0
            accident(fvd)
            writer.wait_for_more()
            if accident is kill_worker:
                slowest.append(writer.slowest)
    print(f"pauses after kill -9: {', '.join(f'{one:.1f}' for one in sorted(slowest))} s")
    # What was in flight waits for the kernel's timer and is sent again; twice at the worst.
    assert max(slowest) < 2 * RESEND_SECONDS + SLACK_SECONDS, slowest
    run("umount", point)
    run("e2fsck", "-fn", device)
    point = mounts(device)
    writer.check(point)
    run("umount", point)
    fvd.detach("disk")
    fvd.ctl("check", image)
