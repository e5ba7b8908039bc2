# SPDX-License-Identifier: Apache-2.0
"""OFD locks: one writer or many readers, across descriptors and processes, holders by name."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest

from fvdengine import locking
from fvdengine.errors import ImageInUse
from fvdengine.locking import BOTH, LockRange

HOLDER = """
import os, sys
from fvdengine import locking
fd = os.open(sys.argv[1], os.O_RDWR)
locking.lock(fd, sys.argv[1], exclusive=sys.argv[2] == "exclusive")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(path, kind):
    command = [sys.executable, "-c", HOLDER, str(path), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.stdin.close()
        process.wait(10)


@pytest.fixture
def fresh_fd(base):
    opened = []

    def opener(flags=os.O_RDWR):
        opened.append(os.open(base, flags))
        return opened[-1]

    yield opener
    for fd in opened:
        os.close(fd)


def test_writers_exclude_each_other(fresh_fd):
    first, second = fresh_fd(), fresh_fd()
    assert locking.try_lock(first, BOTH, exclusive=True)
    assert not locking.try_lock(second, BOTH, exclusive=True)
    assert not locking.try_lock(second, BOTH, exclusive=False)
    locking.unlock(first)
    assert locking.try_lock(second, BOTH, exclusive=True)


def test_readers_share_and_keep_writers_out(fresh_fd):
    assert locking.try_lock(fresh_fd(os.O_RDONLY), BOTH, exclusive=False)
    assert locking.try_lock(fresh_fd(os.O_RDONLY), BOTH, exclusive=False)
    assert not locking.try_lock(fresh_fd(), BOTH, exclusive=True)


def test_owner_and_writer_are_independent(fresh_fd):
    assert locking.try_lock(fresh_fd(), (LockRange.OWNER,), exclusive=True)
    assert locking.try_lock(fresh_fd(), (LockRange.WRITER,), exclusive=True)
    assert not locking.try_lock(fresh_fd(), (LockRange.WRITER,), exclusive=True)


def test_failed_attempt_leaves_nothing_locked(fresh_fd):
    writer = fresh_fd()
    assert locking.try_lock(writer, (LockRange.WRITER,), exclusive=True)
    assert not locking.try_lock(fresh_fd(), BOTH, exclusive=True)
    assert locking.try_lock(fresh_fd(), (LockRange.OWNER,), exclusive=True)


def test_duplicate_keeps_the_lock(fresh_fd):
    original = os.open(os.readlink(f"/proc/self/fd/{fresh_fd()}"), os.O_RDWR)
    assert locking.try_lock(original, BOTH, exclusive=True)
    duplicate = os.dup(original)
    os.close(original)
    other = fresh_fd()
    assert not locking.try_lock(other, BOTH, exclusive=True)
    os.close(duplicate)
    assert locking.try_lock(other, BOTH, exclusive=True)


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
def test_holder_is_named_by_pid_and_command(base, fresh_fd, kind):
    with held_by_another(base, kind) as process:
        with pytest.raises(ImageInUse) as caught:
            locking.lock(fresh_fd(), str(base), exclusive=True)
        assert f"process {process.pid} (" in caught.value.message
        assert "python" in caught.value.message
        assert caught.value.details["pids"] == [process.pid]


def test_own_process_is_said_so(base, fresh_fd):
    locking.lock(fresh_fd(), str(base), exclusive=True)
    with pytest.raises(ImageInUse, match="in use by this process"):
        locking.lock(fresh_fd(), str(base), exclusive=True)


def test_lock_on_another_file_does_not_count(base, tmp_path, fresh_fd):
    other = tmp_path / "other"
    other.write_bytes(b"x")
    fd = os.open(other, os.O_RDWR)
    try:
        assert locking.try_lock(fd, BOTH, exclusive=True)
        assert locking.find_holders(fresh_fd()) == []
        assert [holder.pid for holder in locking.find_holders(fd)] == [os.getpid()]
    finally:
        os.close(fd)


def test_waiting_ends_when_the_lock_is_free(base, fresh_fd):
    first, second = fresh_fd(), fresh_fd()
    locking.lock(first, str(base), exclusive=True)
    timer = threading.Timer(0.1, locking.unlock, [first])
    timer.start()
    locking.lock(second, str(base), exclusive=True, wait_seconds=10)
    timer.join()


def test_waiting_gives_up_in_time(base, fresh_fd):
    locking.lock(fresh_fd(), str(base), exclusive=True)
    start = time.monotonic()
    with pytest.raises(ImageInUse):
        locking.lock(fresh_fd(), str(base), exclusive=True, wait_seconds=0.05)
    assert time.monotonic() - start < 5
