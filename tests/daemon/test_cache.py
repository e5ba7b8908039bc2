# SPDX-License-Identifier: Apache-2.0
"""The cache mode of a device: chosen once, kept over a killed worker and an upgrade."""

import os
import signal
from pathlib import Path

from fvdtest.daemon import wait_until


def bypasses(pid, image):
    """Does the process have the file open past the page cache?"""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if link.readlink() != image:
                continue
            said = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
        except OSError:
            continue  # closed meanwhile
        if int(said.split("flags:")[1].split()[0], 8) & os.O_DIRECT:
            return True
    return False


def test_mode_outlives_workers(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--cache", "none")
    first = daemon.device("web")
    assert first.cache == "none"
    assert bypasses(first.worker_pid, image)
    data = os.urandom(5000)
    disk.write(4001, data)
    model.write(4001, data)
    os.kill(first.worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").state == "attached", "the end of the recovery")
    assert bypasses(daemon.device("web").worker_pid, image)
    daemon.ctl("upgrade", "web")
    last = daemon.device("web")
    assert last.cache == "none"
    assert bypasses(last.worker_pid, image)
    assert model.difference(disk.read(0, model.size)) is None
    shown = daemon.ctl("status", "web").stdout
    assert any(line.split() == ["cache", "none"] for line in shown.splitlines()), shown
