# SPDX-License-Identifier: Apache-2.0
"""The workers of attached devices have no privileges, and everything still works with them."""

import os
import signal
from pathlib import Path

import pytest

from fvdd.priority import HURRIED, USUAL
from fvdd.worker import seccomp
from fvdd.worker.process import OOM_SCORE_ADJ
from fvdtest.guest import run, wait_until

pytestmark = pytest.mark.kernel


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def expect_confined(pid):
    status = status_of(pid)
    for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    if seccomp.is_supported():
        assert status["Seccomp"] == "2"
    # The last to be ended where memory runs out, and never waiting for what it serves itself.
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == OOM_SCORE_ADJ
    assert int(status["VmLck"].split()[0]) > 0


def priorities(pid):
    """The nice values of a process's threads."""
    return {os.getpriority(os.PRIO_PROCESS, int(name)) for name in os.listdir(f"/proc/{pid}/task")}


def test_worker_and_its_successor_serve_without_privileges(fvd, store, mounts):
    base = store / "base.raw"
    base.write_bytes(bytes(range(256)) * 4096 * 32)
    run("mkfs.ext4", "-q", "-F", base)
    image = store / "web.fvd"
    fvd.ctl("create", image, "--base", base, "--copy-on-read")
    begin = fvd.log.stat().st_size
    device = fvd.attach(image, "--name", "web")
    worker = fvd.status("web")["worker_pid"]
    expect_confined(worker)
    # Who starts is in a hurry, who serves is not.
    assert os.getpriority(os.PRIO_PROCESS, fvd.process.pid) == HURRIED
    assert priorities(worker) == {USUAL}
    point = mounts(device)
    (point / "before").write_bytes(b"a" * 300_000)
    os.kill(worker, signal.SIGKILL)
    (point / "after").write_bytes(b"b" * 300_000)
    run("sync", "-f", point)
    wait_until(lambda: fvd.status("web")["state"] == "attached", 60, "a successor")
    successor = fvd.status("web")["worker_pid"]
    assert successor != worker
    expect_confined(successor)
    assert priorities(successor) == {USUAL}
    fvd.ctl("upgrade", "web")
    expect_confined(fvd.status("web")["worker_pid"])
    assert (point / "before").read_bytes() == b"a" * 300_000
    run("umount", point)
    run("fsck.ext4", "-fn", device)
    said = fvd.log.read_bytes()[begin:].decode()
    assert said.count("message=confined") == 3
    # A kernel without filters is told so, and serves.
    assert ("no seccomp filters" in said) is not seccomp.is_supported()
