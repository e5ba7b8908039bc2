# SPDX-License-Identifier: Apache-2.0
"""TRIM and WRITE_ZEROES: what reads zeros, what stays in the base, what space is given back."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4096
SIZE = 64 * BLOCK
BASE = b"\xb5" * SIZE


@pytest.fixture(scope="module")
def make(probes, image_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")

    class Made:
        def __init__(self, base_size=SIZE, size=SIZE, **options):
            self.path = folder / os.urandom(8).hex()
            content = image_of(base_size=base_size, size=size, **options)
            self.path.write_bytes(content[:-size])
            os.truncate(self.path, len(content))  # the data area is a hole
            self.fd = os.open(self.path, os.O_RDWR)
            self.base = probes.storage.Storage(BASE[:base_size])
            self.image = probes.image.Image(self.fd, self.base)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.image.free()
            os.close(self.fd)
            self.path.unlink()

        def space(self):
            os.fsync(self.fd)
            return os.fstat(self.fd).st_blocks * 512

    return Made


def test_trim_leaves_blocks_of_the_base_where_they_are(make):
    with make() as one:
        assert one.image.write(2 * BLOCK, b"x" * 2 * BLOCK) == 0
        assert one.image.trim(0, SIZE) == 0
        assert one.image.local() == [2, 3]
        assert one.image.read(0, SIZE) == (
            BASE[: 2 * BLOCK] + bytes(2 * BLOCK) + BASE[4 * BLOCK :])  # fmt: skip


def test_trim_gives_space_back(make):
    with make() as one:
        assert one.image.write(0, b"x" * SIZE) == 0
        before = one.space()
        assert one.image.trim(0, SIZE) == 0
        assert one.space() <= before - SIZE


def test_trim_acts_on_whole_pages_only(make):
    with make() as one:
        assert one.image.write(0, b"x" * SIZE) == 0
        assert one.image.trim(100, 2 * BLOCK) == 0
        assert one.image.read(0, 3 * BLOCK) == (
            b"x" * BLOCK + bytes(BLOCK) + b"x" * BLOCK)  # fmt: skip
        assert one.image.trim(3 * BLOCK + 1, BLOCK - 2) == 0
        assert one.image.read(3 * BLOCK, BLOCK) == b"x" * BLOCK


@settings(max_examples=60)
@given(base_sectors=st.integers(1, 64), more=st.integers(0, 32),
       block=st.sampled_from([512, 1536, 4096, 16384]), keep=st.booleans(),
       steps=st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(1, 30000)),
                      min_size=1, max_size=5))  # fmt: skip
def test_zeroes_read_back_and_nothing_else_changed(make, base_sectors, more, block, keep, steps):
    base_size, size = base_sectors * 512, (base_sectors + more) * 512
    model = bytearray(BASE[:base_size].ljust(size, b"\0"))
    with make(base_size, size, block_size=block, bytes_per_prefetch=block) as one:
        for zero, at, length in steps:
            offset = min(int(at * size), size - 1)
            length = min(length, size - offset)
            if zero:
                assert one.image.write_zeroes(offset, length, keep) == 0
            else:
                assert one.image.write(offset, b"w" * length) == 0
            model[offset : offset + length] = (b"\0" if zero else b"w") * length
            assert one.image.read(0, size) == model


def test_zeroing_without_keep_takes_no_space(make):
    with make() as one:
        before = one.space()
        assert one.image.write_zeroes(0, SIZE) == 0
        assert one.image.local() == list(range(64))
        assert one.space() < before + 2 * BLOCK
        assert one.image.read(0, SIZE) == bytes(SIZE)


def test_zeroing_with_keep_keeps_space(make):
    with make() as one:
        before = one.space()
        assert one.image.write_zeroes(0, SIZE, True) == 0
        assert one.space() >= before + SIZE // 2
        assert one.image.read(0, SIZE) == bytes(SIZE)


def test_old_bytes_under_a_clear_bit_are_never_exposed(make):
    """What a failed write left in storage is zeroed before the bit is set (I9)."""
    with make() as one:
        data = one.image.facts()["data_offset"]
        os.pwrite(one.fd, b"old" * 4096, data)
        assert one.image.write_zeroes(0, 2 * BLOCK) == 0
        assert one.image.read(0, 2 * BLOCK) == bytes(2 * BLOCK)


def test_zeroing_is_flushed_before_its_record(make, probes):
    with make() as one:
        log = probes.storage.Storage(b"")
        one.image.put_log(log)
        assert one.image.write_zeroes(0, BLOCK) == 0
        assert [entry[0] for entry in log.log()] == ["zero"]
        assert one.image.flush() == 0
        assert one.image.local() == [0]


def test_a_failed_zeroing_sets_no_bit(make, probes):
    with make() as one:
        log = probes.storage.Storage(b"")
        one.image.put_log(log)
        log.fail("zero", errno.EIO)
        assert one.image.write_zeroes(0, 4 * BLOCK) == -errno.EIO
        assert one.image.local() == []
        log.fail("zero", errno.EIO)
        assert one.image.write(0, b"x" * BLOCK) == 0
        assert one.image.trim(0, BLOCK) == -errno.EIO


def test_zeroing_waits_for_the_locks_of_its_blocks(make, task, wait_until):
    with make() as one:
        one.image.lock(1, 2)
        call = task(one.image.write_zeroes, 0, 4 * BLOCK)
        wait_until(one.image.lock_waiters, "zeroing to wait")
        assert one.image.local() == []
        one.image.unlock(1, 2)
        assert call.result() == 0


def test_a_part_of_a_block_is_completed_from_the_base(make):
    with make() as one:
        assert one.image.write_zeroes(100, 200) == 0
        assert one.image.local() == [0]
        assert one.image.read(0, BLOCK) == BASE[:100] + bytes(200) + BASE[300:BLOCK]


def test_more_than_one_step_is_taken(make):
    """Steps are 128 MiB; a request may be larger."""
    size = 300 << 20
    with make(BLOCK, BLOCK) as small:
        assert small.image.write_zeroes(0, BLOCK) == 0
    with make(0, BLOCK, journal_pages=0) as plain:
        path = plain.path
        os.truncate(path, plain.image.facts()["data_offset"] + size)
        assert plain.image.trim(0, size) == 0
        assert plain.image.write_zeroes(0, size) == 0
