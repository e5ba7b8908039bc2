# SPDX-License-Identifier: Apache-2.0
"""A failed device goes on because somebody asks: on a moved image, or without what is unflushed."""

import json
import os
import shutil
import signal

import pytest

from fvdtest.daemon import Daemon, fvdctl, record_of, wait_until


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
    assert daemon.ctl("recover", "web", check=False).returncode == 1  # finds it without a name
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


def test_a_start_on_a_copy_that_fails_gives_nothing_up(daemon, failed):
    image, model, disk, mend = failed
    hidden = image.rename(image.parent / "hidden.fvd")
    moved = image.parent / "moved.fvd"
    shutil.copy(hidden, moved)
    directory = daemon.state / "devices/web"
    before = {entry.name: entry.read_bytes() for entry in directory.glob("live*")}
    assert before
    options = ("--discard-unflushed", "--image", moved)
    refused = daemon.ctl("recover", "web", *options, check=False)
    assert refused.returncode == 1
    assert "base.raw" in refused.stderr
    assert {entry.name: entry.read_bytes() for entry in directory.glob("live*")} == before
    assert daemon.device("web").image == str(hidden)  # its own file, where that is now
    mend()
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None


def test_a_start_on_the_own_image_that_fails_gives_nothing_up(daemon, failed):
    _, model, disk, mend = failed
    assert daemon.ctl("recover", "web", "--discard-unflushed", check=False).returncode == 1
    mend()
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None


def test_a_copy_is_refused_while_the_image_is_where_it_was(daemon, failed):
    image, model, disk, mend = failed
    copy = image.parent / "copy.fvd"
    shutil.copy(image, copy)
    mend()
    for options in ((), ("--discard-unflushed",)):
        refused = daemon.ctl("recover", "web", "--image", copy, *options, check=False)
        assert refused.returncode == 1
        assert f"itself is where it was, {image}" in refused.stderr
        assert "fvdctl detach web, then attach the copy" in refused.stderr
    daemon.ctl("recover", "web")
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)


def test_a_copy_from_before_the_attachment_is_refused(daemon, clone, base):
    image, model = clone()
    old = image.parent / "last-week.fvd"
    shutil.copy(image, old)
    disk = daemon.attach(image)
    disk.write(0, b"flushed")
    model.write(0, b"flushed")
    disk.flush()
    away = base.rename(base.parent / "away.raw")
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").state == "failed", "it to fail")
    away.rename(base)
    hidden = image.rename(image.parent / "hidden.fvd")
    refused = daemon.ctl("recover", "web", "--discard-unflushed", "--image", old, check=False)
    assert refused.returncode == 1
    assert "not from the time of this attachment" in refused.stderr
    daemon.ctl("recover", "web", "--image", hidden)
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize("committed", [False, True])
def test_a_recovery_on_a_moved_image_that_was_broken_off(tmp_path, clone, committed):
    """fvdd died while the state of the file that the record names, or no longer names, was aside:
    the next one takes it back, or has no use for it."""
    image, model = clone()
    daemon = Daemon(tmp_path).start()
    second = None
    try:
        disk = daemon.attach(image)
        disk.write(5000, b"acknowledged")
        model.write(5000, b"acknowledged")
        daemon.stop()
        directory, status = daemon.state / "devices/web", image.stat()
        aside = directory / f"live.of-{status.st_dev}-{status.st_ino + committed}"
        if committed:
            aside.write_bytes(b"of a file that was given up")
        else:
            (directory / "live").rename(aside)
        second = Daemon(tmp_path, after=daemon).start()
        wait_until(second.settled, "the adoption to end")
        assert second.device("web").state == "attached"
        assert second.device("web").restarts == (0 if committed else 1)
        assert not aside.exists()
        assert model.difference(disk.read(0, model.size)) is None
        second.detach_all()
    finally:
        if second is not None:
            second.stop()
        daemon.kill_workers()


def test_what_a_base_needs_now_is_given_to_recover_and_kept_only_if_it_helps(
    daemon, failed, base, tmp_path
):
    _, model, disk, mend = failed
    before = json.loads(record_of(daemon).read_text())["request"]
    refused = daemon.ctl("recover", "web", "--allow-dir", "/srv", check=False)
    assert refused.returncode == 1
    assert json.loads(record_of(daemon).read_text())["request"] == before
    mend()
    os.utime(base, (1, 1))
    refused = daemon.ctl("recover", "web", check=False)
    assert "has changed" in refused.stderr
    refused = daemon.ctl("recover", "web", "--connections", "2", check=False)
    assert "leave out --connections" in refused.stderr
    daemon.ctl("recover", "web", "--accept-changed-base")
    assert model.difference(disk.read(0, model.size)) is None
    after = json.loads(record_of(daemon).read_text())["request"]
    assert after == {**before, "accept_changed_base": True}, "for its successors, too"


def test_boot_of_a_device_that_nobody_serves_says_so(daemon, failed, tmp_path):
    image, _, _, mend = failed
    table = tmp_path / "fvdtab"
    table.write_text(f"web {image} -\n")
    refused = daemon.ctl("boot", "web", "--file", table, check=False)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert "device web is attached, but has failed: " in refused.stderr
    assert "then: fvdctl recover web" in refused.stderr
    mend()
    daemon.ctl("recover", "web")
    assert daemon.ctl("boot", "web", "--file", table).stdout == "/dev/nbd0\n"
