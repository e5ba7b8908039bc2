# SPDX-License-Identifier: Apache-2.0
"""A copy beside requests, over a disk that says what it was asked: nothing changed is missed."""

import errno
import os

import pytest

from fvdd.worker import copying
from fvdd.worker.copying import EVENT, GRAIN, Mirror
from fvdengine.errors import NoSpace
from fvdengine.metadata import Run, Source

SIZE = 20 * GRAIN + 4096


class _Disk:
    """A disk in memory; `at_read` is called before each read, as others' requests come."""

    def __init__(self, size=SIZE):
        self.data = bytearray(os.urandom(4096) * (size // 4096))
        self.events = []
        self.lost = 0
        self.is_traced = False
        self.at_read = lambda: None

    @property
    def size(self):
        return len(self.data)

    def change(self, offset, data, what=1):
        self.data[offset : offset + len(data)] = data
        self.event(offset, len(data), what)

    def event(self, offset, length, what, kind=0):
        if self.is_traced:
            self.events.append(EVENT.pack(offset, length, kind, what))

    def read(self, offset, length):
        data = bytes(self.data[offset : offset + length])
        self.at_read()
        return data

    def block_status(self, offset, length):
        return [(length, "data")]

    def trace_start(self):
        self.is_traced = True

    def trace_stop(self):
        self.is_traced = False

    def trace_take(self):
        taken, self.events = self.events[:3], self.events[3:]
        return b"".join(taken), self.lost


@pytest.fixture
def target(tmp_path):
    with (tmp_path / "copy").open("w+b", buffering=0) as file:
        yield file.fileno()


def content(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("what", copying.CHANGES)
def test_what_is_changed_behind_and_before_the_copy_is_in_it(target, monkeypatch, what):
    monkeypatch.setattr(copying, "REST_BYTES", 0)
    disk = _Disk()
    changes = iter([(0, b"a"), (SIZE - 4, b"last"), (5 * GRAIN - 1, b"bb"), (GRAIN, bytes(GRAIN))])

    def another():
        for offset, data in changes:
            disk.change(offset, data, what)
            break

    disk.at_read = another
    mirror = Mirror(disk, target)
    mirror.begin()
    mirror.copy()
    disk.change(7 * GRAIN, b"in the last moment")
    assert mirror.end()
    assert content(target) == bytes(disk.data)
    mirror.drop()
    assert not disk.is_traced


def test_events_that_were_lost_cost_a_second_copy_of_all(target):
    disk = _Disk()
    mirror = Mirror(disk, target)
    mirror.begin()
    mirror.copy()
    first = mirror.written
    disk.data[3 * GRAIN] ^= 1  # nobody hears of it
    disk.lost = 1
    mirror.end()
    assert content(target) == bytes(disk.data)
    assert mirror.written == first + SIZE


def test_disk_that_is_changed_all_the_time_does_not_keep_it_for_ever(target, monkeypatch):
    monkeypatch.setattr(copying, "REST_BYTES", 0)
    disk = _Disk()
    disk.at_read = lambda: disk.change(0, os.urandom(8)) or disk.change(2 * GRAIN, os.urandom(8))
    mirror = Mirror(disk, target)
    mirror.begin()
    mirror.copy()
    disk.at_read = lambda: None
    mirror.end()
    assert content(target) == bytes(disk.data)


def test_what_is_no_change_costs_nothing_and_what_is_beyond_the_end_no_error(target):
    disk = _Disk()
    mirror = Mirror(disk, target)
    mirror.begin()
    mirror.copy()
    written = mirror.written
    disk.event(0, 4096, what=0)
    disk.event(0, 4096, what=1, kind=3)
    disk.event(SIZE + GRAIN, 4096, what=1)
    disk.event(0, 0, what=2)
    mirror.end()
    assert mirror.written == written


def test_marks_of_a_vast_disk_are_few():
    class Vast:
        size = 1 << 46

    assert Mirror(Vast(), -1)._grain == (1 << 46) // copying.GRAINS_MAX


@pytest.mark.parametrize("is_lost", [False, True], ids=["written", "trace overflowed"])
def test_much_that_is_left_is_not_copied_in_the_pause(target, monkeypatch, is_lost):
    monkeypatch.setattr(copying, "PAUSE_BYTES_MAX", 4 * GRAIN)
    monkeypatch.setattr(copying, "REST_BYTES", 2 * GRAIN)
    disk = _Disk()
    mirror = Mirror(disk, target)
    mirror.begin()
    assert mirror.copy()
    before = mirror.written
    if is_lost:
        disk.data[-1] ^= 1
        disk.lost += 7
    else:
        disk.change(GRAIN, os.urandom(5 * GRAIN))
    assert not mirror.end()
    assert mirror.written == before
    # It goes on with what is left, and the end comes.
    assert mirror.copy()
    disk.change(4096, os.urandom(2 * GRAIN))
    assert mirror.end()
    assert content(target) == bytes(disk.data)


def test_requests_that_are_faster_than_the_copy_are_told(target, monkeypatch):
    monkeypatch.setattr(copying, "REST_BYTES", 2 * GRAIN)
    monkeypatch.setattr(copying, "PAUSE_BYTES_MAX", 4 * GRAIN)
    disk = _Disk()
    # Each piece of 64 kB that is read costs five others.
    disk.at_read = lambda: disk.change(0, os.urandom(10 * GRAIN))
    mirror = Mirror(disk, target)
    mirror.begin()
    assert not mirror.copy()
    assert not mirror.end()
    written = mirror.written
    assert not mirror.copy()
    assert mirror.written - written < 2 * copying.ROUNDS_MAX * disk.size
    mirror.drop()
    assert not disk.is_traced


def test_copy_that_is_dropped_ends_at_once(target):
    disk = _Disk(16 << 20)
    mirror = Mirror(disk, target)
    disk.at_read = mirror.drop
    mirror.begin()
    with pytest.raises(copying.MirrorDropped):
        mirror.copy()
    assert mirror.written == copying.PIECE or mirror.written == 0
    assert not disk.is_traced
    assert os.fstat(target).st_blocks * 512 <= 2 * copying.PIECE


def test_file_that_cannot_be_as_long_begins_no_trace(tmp_path):
    disk = _Disk()
    (tmp_path / "there").touch()
    with (tmp_path / "there").open("rb") as file, pytest.raises(OSError, match="Invalid"):
        Mirror(disk, file.fileno()).begin()
    assert not disk.is_traced


def no_space(*words):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_storage_of_a_copy_is_named(target, monkeypatch):
    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(NoSpace, match="no space left for /backup/copy.raw"):
        copying.copy_out(_Disk(), target, "/backup/copy.raw")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_storage_of_a_fold_is_named(target, monkeypatch, number):
    class Fault(Exception):
        errno = number

    class Full(_Disk):
        def write(self, offset, data):
            raise Fault("write failed")

    class Header:
        virtual_disk_size = SIZE

    runs = [Run(0, 4096, Source.DATA, 0)]
    monkeypatch.setattr(copying, "read_sound_header", lambda fd, name: Header)
    monkeypatch.setattr(copying, "local_runs", lambda *words: runs)
    os.pwrite(target, b"x" * 4096, 0)
    with pytest.raises(NoSpace if number == errno.ENOSPC else Fault) as failed:
        copying.fold(Full(), target, "/store/web.fvd")
    if number == errno.ENOSPC:
        assert "/store/web.fvd" in str(failed.value)
