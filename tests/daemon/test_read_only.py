# SPDX-License-Identifier: Apache-2.0
"""A device changes between writable and read-only while it stays attached."""

import errno
import os
import signal

import pytest

from fvdtest.daemon import Daemon, fvdctl, wait_until


def refuses_writes(disk):
    try:
        disk.write(0, b"refused")
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def test_worker_refuses_writes_until_it_is_writable_again(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.write(0, b"before")
    model.write(0, b"before")
    done = daemon.ctl("set-read-only", "web", "on")
    assert "read-only" in done.stderr
    assert refuses_writes(disk)
    assert disk.is_read_only
    assert daemon.status("web")["read_only"] is True
    assert model.difference(disk.read(0, model.size)) is None
    # The image is closed clean: whoever reads may have it too.
    assert fvdctl("check", image).returncode == 0
    daemon.ctl("set-read-only", "web", "on")  # said twice
    daemon.ctl("set-read-only", "web", "off")
    assert not disk.is_read_only
    disk.write(5000, b"after")
    model.write(5000, b"after")
    assert model.difference(disk.read(0, model.size)) is None
    assert (disk.deaths, disk.resent) == (0, 0)


def test_mode_stays_over_the_death_of_the_worker(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    daemon.ctl("set-read-only", "web", "on")
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").restarts == 1, "the successor")
    assert refuses_writes(disk)
    daemon.ctl("detach", "web")
    assert daemon.attach(image).read(0, 1) == model.read(0, 1)
    assert daemon.status("web")["read_only"] is False


def test_mode_stays_over_a_restart_of_fvdd(tmp_path, clone):
    image, _ = clone()
    first = Daemon(tmp_path).start()
    disk = first.attach(image)
    first.ctl("set-read-only", "web", "on")
    first.stop()
    second = Daemon(tmp_path, after=first).start()
    try:
        wait_until(second.settled, "the adoption")
        assert second.status("web")["read_only"] is True
        assert refuses_writes(disk)
        second.ctl("set-read-only", "web", "off")
        disk.write(0, b"again")
        second.detach_all()
    finally:
        second.stop()
        second.kill_workers()


def test_held_device_keeps_its_mode_and_the_holder_is_named(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image)
    disk.holders.append("/dev/nbd0 is mounted on /mnt")
    refused = daemon.ctl("set-read-only", "web", "on", check=False)
    assert refused.returncode == 5
    assert "mounted on /mnt" in refused.stderr
    disk.holders.clear()
    disk.write(0, b"goes on")
    assert daemon.status("web")["read_only"] is False


def test_device_that_was_attached_read_only_stays_so(daemon, clone):
    image, _ = clone()
    daemon.attach(image, "-r")
    refused = daemon.ctl("set-read-only", "web", "off", check=False)
    assert refused.returncode == 1
    assert "attached read-only" in refused.stderr


def test_image_that_somebody_else_writes_by_then_stays_read_only(daemon, clone, tmp_path):
    image, _ = clone()
    disk = daemon.attach(image)
    daemon.ctl("set-read-only", "web", "on")
    other = Daemon(tmp_path / "other")
    (tmp_path / "other").mkdir()
    other.start()
    try:
        refused = other.ctl("attach", image, check=False)
        assert refused.returncode == 5  # the reader keeps writers out
    finally:
        other.stop()
        other.kill_workers()
    assert refuses_writes(disk)


@pytest.mark.parametrize("mode", ["yes", ""])
def test_other_modes_are_refused(daemon, clone, mode):
    image, _ = clone()
    daemon.attach(image)
    assert daemon.ctl("set-read-only", "web", mode, check=False).returncode != 0


def test_prefetch_of_a_read_only_device_is_refused(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    daemon.ctl("set-read-only", "web", "on")
    done = daemon.ctl("prefetch", "web", "resume", check=False)
    assert done.returncode != 0
    assert "read-only cannot prefetch" in done.stderr
    assert "ValueError" not in done.stderr


def test_mode_that_only_the_kernel_has_is_changed_when_it_is_said_again(daemon, clone):
    """fvdd died between the kernel's change and the record's."""
    image, _ = clone()
    disk = daemon.attach(image)
    worker = daemon.device("web").worker_pid
    disk.is_read_only = True
    disk.holders.append("/dev/nbd0 is mounted on /mnt")
    assert "mounted on /mnt" in daemon.ctl("set-read-only", "web", "off", check=False).stderr
    disk.holders.clear()
    daemon.ctl("set-read-only", "web", "off")
    assert not disk.is_read_only
    assert daemon.device("web").worker_pid == worker
    daemon.ctl("set-read-only", "web", "off")  # said twice
