# SPDX-License-Identifier: Apache-2.0
"""A device that nobody can bring back is taken down because somebody says so; one that can be is
not, and loses nothing."""

import json
import os
import shutil
import signal

import pytest

from fvdapi.errors import ApiError
from fvdd.devices import giving_up, supervise
from fvdd.devices.adoption import worker_pids
from fvdtest.daemon import Daemon, fvdctl, wait_until

DISCARD = "--discard-unflushed"


@pytest.fixture
def restarts():
    return 1


class Failed:
    """A device of which something was flushed and something else was not, and whose base is away,
    so that no worker of it can come back."""

    def __init__(self, daemon, clone, base, *options):
        self.image, self.model = clone()
        self.base, self.away = base, base.with_name("away.raw")
        self.disk = daemon.attach(self.image, *options)
        for offset in (0, 9000, 3 << 20):
            if "-r" not in options:
                self.write(offset, b"flushed")
                self.disk.flush()
        self.directory = daemon.state / "devices/web"
        base.rename(self.away)

    def write(self, offset, data):
        self.disk.write(offset, data)
        self.model.write(offset, data)

    def fail(self, daemon):
        os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
        wait_until(lambda: daemon.device("web").state == "failed", "it to fail")
        return self

    def mend(self):
        self.away.rename(self.base)

    def check_gone(self, daemon, done):
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("; what was not flushed is given up\n")
        assert not self.directory.exists()
        assert daemon.transport.disks == {}
        assert worker_pids(self.directory) == []
        assert json.loads(daemon.ctl("list", "--json").stdout) == {"devices": []}

    def check_flushed(self, daemon):
        """The image goes on with what was flushed, by its journal."""
        disk = daemon.attach(self.image)
        assert self.model.difference(disk.read(0, self.model.size)) is None
        disk.write(0, b"and on")
        daemon.ctl("detach", "web")
        assert "state         clean" in fvdctl("info", self.image).stdout
        assert fvdctl("check", self.image).returncode == 0


def test_given_up_only_when_asked_and_goes_on_from_the_journal(daemon, clone, base):
    failed = Failed(daemon, clone, base).fail(daemon)
    refused = daemon.ctl("detach", "web", check=False)
    assert refused.returncode == 1
    assert "its live state is kept; remove the cause, then detach again" in refused.stderr
    assert "fvdctl detach web --discard-unflushed" in refused.stderr
    assert daemon.device("web").state == "failed"
    before = failed.image.read_bytes()
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))
    assert failed.image.read_bytes() == before
    # While the base is away an attach fails, and leaves nothing behind.
    assert "base.raw" in daemon.ctl("attach", failed.image, check=False).stderr
    assert list((daemon.state / "devices").iterdir()) == []
    failed.mend()
    failed.check_flushed(daemon)


def test_refused_while_somebody_uses_the_device(daemon, clone, base):
    failed = Failed(daemon, clone, base).fail(daemon)
    failed.disk.holders.append("/dev/nbd0 is mounted on /mnt")
    refused = daemon.ctl("detach", "web", DISCARD, check=False)
    assert refused.returncode == 5
    assert "mounted on /mnt" in refused.stderr
    assert daemon.device("web").state == "failed"
    assert daemon.transport.disks == {0: failed.disk}
    assert not (daemon.state / giving_up.FOLDER).exists()
    failed.disk.holders.clear()
    failed.mend()  # nothing was lost by it
    daemon.ctl("recover", "web")
    assert failed.model.difference(failed.disk.read(0, failed.model.size)) is None


@pytest.mark.parametrize("has_failed", [True, False])
def test_what_can_be_detached_as_ever_is(daemon, clone, base, has_failed):
    failed = Failed(daemon, clone, base)
    failed.write(5 << 20, b"acknowledged")
    if has_failed:
        failed.fail(daemon)
    failed.mend()
    answer = json.loads(daemon.ctl("detach", "web", DISCARD, "--json").stdout)
    assert answer["discarded_unflushed"] is False
    assert "state         clean" in fvdctl("info", failed.image).stdout
    failed.check_flushed(daemon)


def test_reader_has_nothing_to_lose(daemon, clone, base):
    failed = Failed(daemon, clone, base, "-r").fail(daemon)
    assert "it has no live state" in daemon.ctl("detach", "web", check=False).stderr
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))


def test_damaged_live_state_is_told_as_that(daemon, clone, base):
    failed = Failed(daemon, clone, base).fail(daemon)
    (failed.directory / "live").write_bytes(b"?" * 4096)
    refused = daemon.ctl("detach", "web", check=False)
    assert "its live state cannot be read" in refused.stderr
    assert "is kept" not in refused.stderr
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))
    failed.mend()
    failed.check_flushed(daemon)  # the image itself says which session it was


def test_state_that_cannot_be_noted_changes_nothing(daemon, clone, base):
    failed = Failed(daemon, clone, base).fail(daemon)
    (daemon.state / giving_up.FOLDER).write_text("in the way")
    refused = daemon.ctl("detach", "web", DISCARD, check=False)
    assert refused.returncode == 1
    assert f"{daemon.state}/{giving_up.FOLDER}" in refused.stderr
    assert daemon.device("web").state == "failed"
    assert daemon.transport.disks == {0: failed.disk}
    (daemon.state / giving_up.FOLDER).unlink()
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))


def test_worker_that_cannot_end_is_left_to_its_lock(daemon, clone, base, monkeypatch, caplog):
    """It hangs in the kernel, killed, on storage that does not answer."""
    failed = Failed(daemon, clone, base).fail(daemon)

    async def hangs(worker):
        raise ApiError("worker_failed", f"the worker process {worker.pid} does not end")

    real = supervise.make_gone
    monkeypatch.setattr(supervise, "make_gone", hangs)
    done = daemon.ctl("detach", "web", DISCARD, check=False)
    monkeypatch.setattr(supervise, "make_gone", real)
    daemon.kill_workers()
    failed.check_gone(daemon, done)


# fvdd was restarted meanwhile


def leave(relay, clone, base, tmp_path):
    """fvdd ends, the worker dies, and the image is nowhere to be found."""
    failed = Failed(relay.running, clone, base)
    failed.mend()
    worker = relay.running.device("web").worker_pid
    relay.stop()
    os.kill(worker, signal.SIGKILL)
    (tmp_path / "elsewhere").mkdir()
    return failed, failed.image.rename(tmp_path / "elsewhere/web.fvd")


def test_image_that_was_gone_comes_back_later(relay, clone, base, tmp_path):
    failed, hidden = leave(relay, clone, base, tmp_path)
    daemon = relay.next()
    assert daemon.device("web").state == "failed"
    assert DISCARD in daemon.ctl("detach", "web", check=False).stderr
    # What the adoption did not get as far as to find is looked for.
    failed.disk.holders.append("/dev/nbd0 is mounted on /mnt")
    refused = daemon.ctl("detach", "web", DISCARD, check=False)
    assert refused.returncode == 5
    assert "mounted on /mnt" in refused.stderr
    failed.disk.holders.clear()
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))
    hidden.rename(failed.image)
    relay.stop()
    failed.check_flushed(relay.next())


def test_kernel_device_is_gone_as_well(relay, clone, base, tmp_path):
    failed, hidden = leave(relay, clone, base, tmp_path)
    failed.disk.disconnect()
    relay.running.transport.disks.clear()
    daemon = relay.next()
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))
    shutil.copy(hidden, failed.image)
    failed.check_flushed(daemon)


def test_fvdd_that_dies_in_between_is_succeeded(relay, clone, base, tmp_path, monkeypatch):
    failed, hidden = leave(relay, clone, base, tmp_path)
    daemon = relay.next()

    async def killed(session):
        raise KeyError("as if fvdd had died")

    with monkeypatch.context() as patched:
        patched.setattr(giving_up, "_end_worker", killed)
        assert daemon.ctl("detach", "web", DISCARD, check=False).returncode == 1
    relay.stop()
    daemon = relay.next()
    assert daemon.device("web").state == "failed"
    failed.check_gone(daemon, daemon.ctl("detach", "web", DISCARD, check=False))
    hidden.rename(failed.image)
    failed.check_flushed(daemon)


def test_attach_that_was_broken_off_is_given_up_as_well(tmp_path, clone, base):
    """It has no kernel device, and its image cannot be closed."""
    daemon = Daemon(tmp_path, restarts=1).start()
    try:
        failed = Failed(daemon, clone, base)
        failed.mend()
        daemon.stop()
        daemon.kill_workers()
        failed.disk.disconnect()
        daemon.transport.disks.clear()
        record = failed.directory / "device.json"
        record.write_text(
            json.dumps({**json.loads(record.read_text()), "index": None, "device": None})
        )
        base.rename(failed.away)
        second = Daemon(tmp_path, after=daemon, restarts=1).start()
        wait_until(second.settled, "the adoption to end")
        assert DISCARD in second.ctl("detach", "web", check=False).stderr
        done = second.ctl("detach", "web", DISCARD, check=False)
        failed.check_gone(second, done)
        second.stop()
    finally:
        daemon.kill_workers()
