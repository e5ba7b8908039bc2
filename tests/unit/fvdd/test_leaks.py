# SPDX-License-Identifier: Apache-2.0
"""Leaked devices: found by their identifier, given back only when nothing hangs on them."""

import errno
import os

import pytest

from fvdd.attach.attachment import AttachError, Leak
from fvdd.attach.leaks import Places, find_leaks, hold, is_free, sees_every_process

OURS = "fvd:web:1111-22"


@pytest.fixture
def host(tmp_path):
    """A made-up /sys/block and /proc; call it to add a device or a process."""
    places = Places(str(tmp_path / "sys"), str(tmp_path / "proc"))
    for folder in (places.sys_block, places.proc):
        os.makedirs(folder)
    (tmp_path / "proc/swaps").write_text("Filename\n")

    class Host:
        def __init__(self):
            self.places = places

        def device(self, name, backend=None, **files):
            folder = tmp_path / "sys" / name
            folder.mkdir()
            values = {"dev": "43:0", "inflight": "       0        0", "size": "8", **files}
            if backend is not None:
                values["backend"] = backend
            for file, text in values.items():
                (folder / file).write_text(f"{text}\n")

        def process(self, pid, *words):
            folder = tmp_path / "proc" / str(pid)
            folder.mkdir()
            (folder / "cmdline").write_bytes(b"\0".join(map(os.fsencode, words)) + b"\0")
            (folder / "mountinfo").touch()

        def find(self, *known):
            return find_leaks(known, places)

    return Host()


def test_devices_of_others_are_not_looked_at(host):
    host.device("nbd0", "fvd:web:1111-22")
    host.device("nbd1", "qemu:abc")
    host.device("nbd2")
    host.device("sda", "fvd:x:1")
    (leak,) = host.find()
    assert (leak.device, leak.index, leak.backend, leak.obstacle) == ("/dev/nbd0", 0, OURS, "")
    assert host.find(OURS) == []


def test_requests_in_flight_are_an_obstacle(host):
    host.device("nbd0", OURS, inflight="0 3")
    assert host.find()[0].obstacle == "requests are in flight"


def test_mount_is_an_obstacle(host, tmp_path):
    host.device("nbd0", OURS)
    host.process(7, "bash")
    (tmp_path / "proc/7/mountinfo").write_text("1 2 43:0 / /mnt rw - ext4 /dev/nbd0 rw\n")
    (tmp_path / "proc/7/ns").mkdir()
    os.symlink("mnt:[1]", tmp_path / "proc/7/ns/mnt")
    assert "mounted on /mnt" in host.find()[0].obstacle


def test_worker_of_another_daemon_is_an_obstacle(host, tmp_path):
    host.device("nbd0", OURS)
    (tmp_path / "device.json").write_text('{"attachment": "1111-22"}')
    host.process(9, "@usr/bin/python3", "-P", "-m", "fvdd.worker", "device", "--dir", tmp_path)
    assert host.find()[0].obstacle == "process 9 serves it for another fvdd"
    (tmp_path / "device.json").write_text('{"attachment": "other"}')
    assert host.find()[0].obstacle == ""


@pytest.mark.parametrize("record", [None, "{"])
def test_worker_whose_directory_was_moved_away_is_an_obstacle(host, tmp_path, record):
    host.device("nbd0", OURS)
    directory = tmp_path / "web"
    if record is not None:
        directory.mkdir()
        (directory / "device.json").write_text(record)
    host.process(9, "python3", "-P", "-m", "fvdd.worker", "device", "--dir", directory)
    assert "process 9 may serve it" in host.find()[0].obstacle
    host.device("nbd1", "fvd:other:2222-33")
    assert host.find()[1].obstacle == ""


@pytest.mark.parametrize(
    "words", [("/usr/bin/python3", "/usr/bin/fvdd"), ("python3", "-m", "fvdd")]
)
def test_another_daemon_is_an_obstacle(host, words):
    host.device("nbd0", OURS)
    host.process(9, *words)
    assert "another fvdd runs (process 9)" in host.find()[0].obstacle


def test_number_is_free_only_when_nothing_hangs_on_it(host):
    host.device("nbd0", size="0")
    host.device("nbd1", size="0", pid="77")
    host.device("nbd2", size="8")
    host.device("nbd3", size="0", inflight="1 0")
    assert is_free("nbd0", host.places) == ""
    assert is_free("nbd9", host.places) == ""
    assert "process 77" in is_free("nbd1", host.places)
    assert "not let go" in is_free("nbd2", host.places)
    assert "in flight" in is_free("nbd3", host.places)


def test_number_that_cannot_be_looked_at_is_not_free(host, monkeypatch):
    def fail(*words, **more):
        raise OSError(errno.EMFILE, "Too many open files")

    host.device("nbd0", size="0", pid="77")
    monkeypatch.setattr("builtins.open", fail)
    assert "Too many open files" in is_free("nbd0", host.places)
    with pytest.raises(OSError, match="Too many"):
        host.find()


# Held before it is given back


@pytest.fixture
def leak(host, tmp_path):
    """A leaked device whose node is a plain file: it has the number 0:0."""
    (tmp_path / "node").touch()
    host.device("nbd0", OURS, dev="0:0")
    return Leak(str(tmp_path / "node"), 0, OURS, "")


def test_device_that_nobody_has_is_held(host, leak):
    os.close(hold(leak, host.places))


def test_device_that_is_busy_is_left_alone(host, leak, monkeypatch):
    def refuse(path, flags):
        assert flags & os.O_EXCL
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AttachError, match="for somebody it does not name"):
        hold(leak, host.places)


def test_what_has_changed_since_it_was_looked_at_is_left_alone(host, leak, tmp_path):
    host.process(9, "fvdd")
    with pytest.raises(AttachError, match="another fvdd runs"):
        hold(leak, host.places)
    (tmp_path / "sys/nbd0/backend").write_text("fvd:other:2\n")
    with pytest.raises(AttachError, match="it is another's by now"):
        hold(leak, host.places)
    (tmp_path / "sys/nbd0/dev").write_text("43:0\n")
    with pytest.raises(AttachError, match="its node leads elsewhere"):
        hold(leak, host.places)
    os.unlink(leak.device)
    with pytest.raises(AttachError, match="it cannot be opened"):
        hold(leak, host.places)


def test_only_the_hosts_own_pid_namespace_shows_every_process(tmp_path, monkeypatch):
    assert not sees_every_process(str(tmp_path))
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").touch()
    assert not sees_every_process(str(tmp_path))
    inode = os.stat(tmp_path / "self/ns/pid").st_ino
    monkeypatch.setattr("fvdd.attach.leaks.HOSTS_PID_NAMESPACE", inode)
    assert sees_every_process(str(tmp_path))
