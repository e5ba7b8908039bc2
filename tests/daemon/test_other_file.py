# SPDX-License-Identifier: Apache-2.0
"""The name of an image that is attached is given to another file: the device goes on with its own.

A device is one file, whatever that is called by now. What has its name meanwhile is never opened in
its place, never changed, and never lost.
"""

import json
import os
import shutil
import signal

import pytest

from fvdtest.daemon import wait_until
from fvdtest.held import Held, in_background

TEXT = b"of the device itself"


@pytest.fixture
def other(daemon, clone):
    """Another image, which holds something else."""
    image, _ = clone("other")
    disk = daemon.attach(image, "--name", "other")
    disk.write(0, b"OTHER" * 2000)
    daemon.ctl("detach", "other")
    return image


class Place:
    """An image that loses its name to another file while it is attached."""

    def __init__(self, daemon, clone, other, tmp_path, *options):
        self.daemon, self.other, self.moved = daemon, other, tmp_path / "moved.fvd"
        self.image, self.model = clone()
        self.disk = daemon.attach(self.image)
        self.write(4096, TEXT)
        if options:
            daemon.ctl("detach", "web")
            self.disk = daemon.attach(self.image, *options)
        self.before = other.read_bytes()
        self.inode = other.stat().st_ino

    def write(self, offset, data):
        self.disk.write(offset, data)
        self.model.write(offset, data)

    def lose_name(self, how="replaced"):
        self.image.rename(self.moved)
        if how == "replaced":
            self.other.rename(self.image)

    def kill_worker(self):
        old = self.daemon.device("web").worker_pid
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: self.daemon.device("web").worker_pid not in (old, None), "a successor")

    def check(self, how="replaced"):
        """The device serves what is its own, and the other file is as it was."""
        status = self.daemon.device("web")
        assert status.state == "attached", status.reason
        assert self.model.difference(self.disk.read(0, self.model.size)) is None
        there = self.image if how == "replaced" else self.other
        assert there.stat().st_ino == self.inode
        assert there.read_bytes() == self.before


@pytest.mark.parametrize("options", [("-r",), ()], ids=["reader", "writer"])
def test_successor_has_the_same_file(daemon, clone, other, tmp_path, options):
    place = Place(daemon, clone, other, tmp_path, *options)
    place.lose_name()
    place.kill_worker()
    place.check()
    assert daemon.device("web").image == str(place.moved)


def test_upgrade_of_a_reader_has_the_same_file(daemon, clone, other, tmp_path):
    place = Place(daemon, clone, other, tmp_path, "-r")
    place.lose_name()
    daemon.ctl("upgrade", "web")
    place.check()


def test_mode_that_was_changed_has_the_same_file(daemon, clone, other, tmp_path):
    place = Place(daemon, clone, other, tmp_path)
    daemon.ctl("set-read-only", "web", "on")
    place.lose_name()
    place.kill_worker()
    place.check()
    daemon.ctl("set-read-only", "web", "off")
    place.write(8192, TEXT)
    place.check()


@pytest.mark.parametrize("how", ["replaced", "renamed"])
@pytest.mark.parametrize("verb", ["snapshot", "backup", "set-read-only"])
def test_name_is_lost_while_an_operation_begins(
    daemon, clone, other, tmp_path, monkeypatch, verb, how
):
    place = Place(daemon, clone, other, tmp_path)
    new = tmp_path / "new"
    words = {
        "snapshot": ("snapshot", "web", new), "backup": ("backup", "web", new),
        "set-read-only": ("set-read-only", "web", "on"),
    }[verb]  # fmt: skip
    held = Held(monkeypatch, "flush")
    result = in_background(daemon, *words)
    with held:
        place.lose_name(how)
    done = result()
    if verb != "set-read-only":
        assert done.returncode == 1
        assert "renamed meanwhile" in done.stderr
        assert not new.exists()
    place.check(how)
    if verb != "set-read-only":
        daemon.ctl(*words)
        place.write(8192, TEXT)
        place.check(how)


@pytest.mark.parametrize("how", ["replaced", "copied", "renamed"])
def test_name_is_lost_while_a_backup_copies(daemon, clone, other, tmp_path, monkeypatch, how):
    place = Place(daemon, clone, other, tmp_path)
    held = Held(monkeypatch)
    result = in_background(daemon, "backup", "web", tmp_path / "copy.raw")
    with held:
        place.write(100_000, b"during")
        place.disk.flush()
        if how == "copied":
            shutil.copy(place.image, tmp_path / "again")
            place.image.rename(place.moved)
            (tmp_path / "again").rename(place.image)
        else:
            place.lose_name(how)
        place.write(200_000, b"later")
    done = result()
    base = f"{place.image}.backup-base"
    assert done.returncode == 1
    assert f"{place.moved} needs {base}: keep it" in done.stderr
    place.check("replaced" if how == "replaced" else "renamed")
    again = daemon.ctl("backup", "web", tmp_path / "next.raw", check=False)
    assert again.returncode == 1
    assert f"mv {place.moved} {place.image}" in again.stderr
    assert base in daemon.ctl("doctor", check=False).stdout
    # What is said helps.
    if how != "renamed":
        place.image.rename(tmp_path / "elsewhere")
    place.moved.rename(place.image)
    daemon.ctl("backup", "web", tmp_path / "next.raw")
    assert not os.path.exists(base)
    assert place.model.difference(place.disk.read(0, place.model.size)) is None
    daemon.ctl("detach", "web")


def test_new_file_of_that_name_is_no_part_of_the_device(daemon, clone, tmp_path):
    image, _ = clone()
    daemon.attach(image)
    moved = image.rename(tmp_path / "moved.fvd")
    clone()
    refused = daemon.ctl("detach", image, check=False)
    assert "no attached device belongs to" in refused.stderr
    refused = daemon.ctl("attach", moved, "--name", "again", check=False)
    assert "is attached already as web" in refused.stderr
    daemon.ctl("attach", image, "--name", "fresh")
    assert json.loads(daemon.ctl("status", image, "--json").stdout)["name"] == "fresh"
    daemon.ctl("detach", moved)
    with daemon.client() as client:
        assert [status.name for status in client.devices()] == ["fresh"]
