# SPDX-License-Identifier: Apache-2.0
"""A kernel that does not disconnect when it is told: the device goes on as if nothing had been."""

import asyncio
import os

import pytest

from fvdd.app import App, Parts
from fvdd.attach.kernel_nbd import NbdTransport
from fvdtest.daemon import Daemon, fvdctl
from fvdtest.guest import run

pytestmark = pytest.mark.kernel


@pytest.fixture
def own(tmp_path):
    """fvdd in this process, over the kernel's driver, which ignores the first DISCONNECT."""
    transport = NbdTransport()
    real, refused = transport.netlink.disconnect, []

    async def disconnect(index):
        if not refused:
            refused.append(index)
            raise TimeoutError
        await real(index)

    transport.netlink.disconnect = disconnect
    daemon = Daemon(tmp_path)
    daemon._app = App(daemon._app.config, Parts(transport, daemon._spawn))
    daemon.start()
    yield daemon
    with daemon.client() as client:
        left = [status for status in client.devices() if status.device]
    daemon.stop()
    daemon.kill_workers()
    for status in left:
        asyncio.run(NbdTransport().netlink.disconnect(int(status.device.removeprefix("/dev/nbd"))))


def test_device_stays_usable_after_a_disconnect_that_failed(own, store, mounts):
    image = store / "disk.fvd"
    fvdctl("create", image, "64M")
    device = own.ctl("attach", image).stdout.strip()
    run("sfdisk", "-q", device, input="label: dos\n,16M\n,\n")
    done = own.ctl("detach", "disk", check=False)
    assert "did not disconnect" in done.stderr
    assert own.device("disk").state == "failed"
    assert os.path.exists(f"{device}p1")
    assert os.path.realpath("/dev/fvd/disk-part2") == f"{device}p2"
    own.ctl("recover", "disk")
    run("mkfs.ext4", "-q", "-F", f"{device}p2")
    point = mounts(f"{device}p2")
    (point / "file").write_text("kept")
    done = own.ctl("detach", "disk", check=False)
    assert f"{device}p2 is mounted on" in done.stderr
    run("umount", point)
    own.ctl("detach", "disk")
    assert not os.path.exists(f"{device}p1")
