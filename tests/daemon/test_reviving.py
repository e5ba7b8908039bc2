# SPDX-License-Identifier: Apache-2.0
"""A failed device goes on because somebody asks: on a moved image, or without what is unflushed."""

import os
import shutil
import signal

import pytest

from fvdtest.daemon import fvdctl, wait_until


@pytest.fixture
def restarts():
    return 1


@pytest.fixture
def failed(daemon, clone, base):
    """A device that failed because its base is away; call the last of it to bring that back."""
    image, model = clone()
    disk = daemon.attach(image)
    for offset, data in ((0, b"flushed"), (9000, b"flushed, too")):
        disk.write(offset, data)
        model.write(offset, data)
    disk.flush()
    away = base.rename(base.parent / "away.raw")
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").state == "failed", "it to fail")
    yield image, model, disk, lambda: away.rename(base)
    if away.exists():
        away.rename(base)
        daemon.ctl("recover", "web", check=False)


def test_a_wrong_name_is_not_kept(daemon, failed):
    image, model, disk, mend = failed
    refused = daemon.ctl("recover", "web", "--image", image.parent / "typo.fvd", check=False)
    assert refused.returncode == 4
    assert "typo.fvd" in refused.stderr
    mend()
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)


def test_another_image_is_refused(daemon, failed, clone):
    _, model, disk, mend = failed
    mend()
    other, _ = clone("other")
    before = other.read_bytes()
    for options in ((), ("--discard-unflushed",)):
        refused = daemon.ctl("recover", "web", "--image", other, *options, check=False)
        assert "is another image" in refused.stderr
    assert other.read_bytes() == before
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None


def test_an_image_moved_as_a_copy_is_used_and_the_old_file_is_not(daemon, failed):
    image, model, disk, mend = failed
    moved = image.parent / "moved.fvd"
    shutil.copy(image, moved)
    image.unlink()
    mend()
    # What is live belongs to the old file, which is gone.
    refused = daemon.ctl("recover", "web", "--image", moved, check=False)
    assert refused.returncode == 1
    assert "belongs to another file" in refused.stderr
    daemon.ctl("recover", "web", "--discard-unflushed", "--image", moved)
    assert daemon.device("web").image == str(moved)
    assert model.difference(disk.read(0, model.size)) is None
    disk.write(0, b"later")
    model.write(0, b"later")
    disk.flush()
    daemon.ctl("detach", "web")
    assert fvdctl("check", moved).returncode == 0


def test_nothing_is_given_up_while_somebody_uses_the_device(daemon, failed):
    _, model, disk, mend = failed
    mend()
    disk.holders.append("/dev/nbd0 is mounted on /mnt")
    refused = daemon.ctl("recover", "web", "--discard-unflushed", check=False)
    assert refused.returncode == 5
    assert "mounted on /mnt" in refused.stderr
    assert daemon.device("web").state == "failed"
    disk.holders.clear()
    daemon.ctl("recover", "web", "--discard-unflushed")
    assert model.difference(disk.read(0, model.size)) is None


def test_a_device_that_works_gives_nothing_up(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    for options in ((), ("--discard-unflushed",), ("--image", image)):
        refused = daemon.ctl("recover", "web", *options, check=False)
        assert refused.returncode == 1
        assert "only a failed device" in refused.stderr
