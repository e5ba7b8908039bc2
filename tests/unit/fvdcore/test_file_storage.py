# SPDX-License-Identifier: Apache-2.0
"""Files as stores, on a disk's file system and in memory: errors, holes, flags."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

NOWAIT, DSYNC, KEEP, HINT = 1, 2, 1, 2
DATA, ZERO = 0, 1
SIZE = 1 << 20
FOLDERS = {"disk": None, "memory": "/dev/shm"}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    if FOLDERS[request.param] is None:
        yield tmp_path
        return
    if not os.access(FOLDERS[request.param], os.W_OK):
        pytest.skip("no file system in memory here")
    made = Path(tempfile.mkdtemp(dir=FOLDERS[request.param]))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def path(folder):
    path = folder / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def store(probes, path):
    fd = os.open(path, os.O_RDWR)
    made = probes.storage.FileStorage(fd)
    os.close(fd)  # it has its own
    yield made
    made.close()


def test_reads_what_was_written(store, path):
    data = os.urandom(70001)
    assert store.write(data, 4095) == 0
    assert store.read(70001, 4095) == data
    assert path.read_bytes()[4095 : 4095 + 70001] == data
    assert store.length == SIZE
    assert store.flush() == 0
    store.start_writeback(4096, 0)


def test_the_descriptor_is_closed_once(store):
    fd = store.fd
    store.close()
    store.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_that_is_none_is_refused(probes):
    with pytest.raises(OSError, match="file_storage_open") as caught:
        probes.storage.FileStorage(-1)
    assert caught.value.errno == errno.EBADF


def test_a_file_that_became_shorter_is_an_error_and_no_zeros(store, path):
    os.truncate(path, SIZE - 100)
    assert store.read(200, SIZE - 200) == -errno.EIO
    assert store.read(1, SIZE) == -errno.EIO
    assert len(store.read(100, SIZE - 200)) == 100


def test_a_file_that_became_shorter_is_found_out_by_a_flush_and_not_written(store, path):
    os.truncate(path, SIZE - 100)
    assert store.write(b"n" * 50, SIZE - 150) == 0, "nobody has looked yet"
    assert store.flush() == -errno.ENODATA
    assert store.write(b"n" * 50, SIZE - 150) == -errno.EIO
    assert store.resize(2 * SIZE) == -errno.EIO
    assert path.stat().st_size == SIZE - 100


def test_one_that_is_made_shorter_here_is_none(store, path):
    assert store.resize(SIZE // 2) == 0
    assert store.flush() == 0
    assert store.write(b"n" * 100, SIZE // 2 - 100) == 0
    assert store.resize(SIZE) == 0
    assert store.flush() == 0


def test_nowait_reads_what_is_in_memory(store, path):
    """Or says EAGAIN where the file system knows no such reads, as one in memory may."""
    assert store.read(8192, 4096) == path.read_bytes()[4096:12288]
    assert store.read(8192, 4096, NOWAIT) in (path.read_bytes()[4096:12288], -errno.EAGAIN)


def test_nowait_does_not_wait_for_the_disk(probes, tmp_path):
    cold = tmp_path / "cold"
    cold.write_bytes(os.urandom(SIZE))
    fd = os.open(cold, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, SIZE, os.POSIX_FADV_DONTNEED)
    store = probes.storage.FileStorage(fd)
    first = store.read(SIZE, 0, NOWAIT)
    store.close()
    os.close(fd)
    assert first in (-errno.EAGAIN, cold.read_bytes())


def test_dsync_writes_the_same_bytes(store, path):
    assert store.write(b"durable" * 100, 12345, DSYNC) == 0
    assert path.read_bytes()[12345 : 12345 + 700] == b"durable" * 100


def test_zeroing_gives_space_back(store, path):
    before = os.stat(path).st_blocks
    assert store.zero(SIZE // 2, 0) == 0
    assert os.stat(path).st_blocks <= before - SIZE // 2 // 512
    assert store.read(SIZE // 2, 0) == bytes(SIZE // 2)
    assert os.stat(path).st_size == SIZE
    assert not store.no_punch


def test_zeroing_may_keep_space(store, path):
    before = os.stat(path).st_blocks
    rest = path.read_bytes()[SIZE // 2 :]
    assert store.zero(SIZE // 2, 0, KEEP) == 0
    assert os.stat(path).st_blocks >= before
    assert path.read_bytes() == bytes(SIZE // 2) + rest


def test_space_may_be_taken_for_what_comes(store, path):
    assert store.resize(3 * SIZE) == 0
    assert store.zero(SIZE, 2 * SIZE, KEEP | HINT) == 0
    assert SIZE < path.stat().st_blocks * 512 < 2.5 * SIZE
    assert store.read(SIZE, 2 * SIZE) == bytes(SIZE)
    assert store.status(SIZE, 2 * SIZE)[0] in (DATA, ZERO)


def test_space_that_others_may_need_is_not_taken(store, path):
    used, room = path.stat().st_blocks, os.statvfs(path)
    free = room.f_bavail * room.f_frsize
    assert store.zero(free // 8, SIZE, KEEP | HINT) == -errno.ENOSPC
    assert path.stat().st_blocks == used


def test_zeroing_falls_back_where_no_hole_can_be_punched(store, path):
    store.no_punch = True
    rest = path.read_bytes()
    assert store.zero(200_001, 777) == 0
    assert path.read_bytes() == rest[:777] + bytes(200_001) + rest[777 + 200_001 :]


@pytest.mark.parametrize("flags", [0, KEEP])
def test_zeroing_nothing_and_odd_ranges(store, path, flags):
    rest = path.read_bytes()
    assert store.zero(0, 5, flags) == 0
    assert path.read_bytes() == rest
    assert store.zero(5000, 123, flags) == 0
    assert path.read_bytes() == rest[:123] + bytes(5000) + rest[5123:]


def test_zeroing_on_a_read_only_descriptor_is_an_error(probes, path):
    fd = os.open(path, os.O_RDONLY)
    store = probes.storage.FileStorage(fd)
    os.close(fd)
    assert store.zero(4096, 0) < 0
    assert store.write(b"x", 0) == -errno.EBADF
    store.close()


def test_status_sees_holes(store, path):
    assert store.zero(65536, 65536) == 0
    assert store.zero(SIZE - 524288, 524288) == 0
    assert store.status(SIZE, 0) == (DATA, 65536)
    assert store.status(SIZE - 65536, 65536) == (ZERO, 65536)
    assert store.status(4096, 131072) == (DATA, 4096)
    assert store.status(4096, 65536) == (ZERO, 4096)
    assert store.status(SIZE - 524288, 524288) == (ZERO, SIZE - 524288)


def test_status_of_a_whole_file(store):
    assert store.status(SIZE, 0) == (DATA, SIZE)


def test_resize_cuts_and_what_grows_again_is_zero(store, path):
    assert store.resize(4096) == 0
    assert (store.length, path.stat().st_size) == (4096, 4096)
    assert store.resize(SIZE) == 0
    assert store.length == SIZE
    assert store.read(SIZE - 4096, 4096) == bytes(SIZE - 4096)


def test_resize_tells_what_the_kernel_says(probes, path):
    fd = os.open(path, os.O_RDONLY)
    store = probes.storage.FileStorage(fd)
    os.close(fd)
    assert store.resize(4096) == -errno.EINVAL
    assert (store.length, path.stat().st_size) == (SIZE, SIZE)
    store.close()
