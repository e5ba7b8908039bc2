# SPDX-License-Identifier: Apache-2.0
"""The settle step of a read: what becomes local, what is skipped and counted, zeros as holes."""

import errno
import os

import pytest

BLOCK = 4096
SIZE = 64 * BLOCK


@pytest.fixture
def make(probes, image_of, tmp_path):
    made = []

    class Made:
        def __init__(self, base=None, base_size=SIZE, **options):
            self.base_bytes = os.urandom(base_size) if base is None else base
            path = tmp_path / f"image{len(made)}"
            content = image_of(base_size=base_size, size=SIZE, **options)
            path.write_bytes(content[:-SIZE])
            os.truncate(path, len(content))  # the data area is a hole
            self.fd = os.open(path, os.O_RDWR)
            self.base = probes.storage.Storage(self.base_bytes)
            self.image = probes.image.Image(self.fd, self.base)
            self.slots = probes.plain.slots()
            made.append(self)

        def read_and_settle(self, offset, length):
            data = self.image.read(offset, length)
            self.image.settle(offset, data)
            return data

        def count(self, name):
            return self.image.counter(self.slots[name])

    yield Made
    for one in made:
        one.image.free()
        os.close(one.fd)


def test_whole_blocks_that_were_read_become_local(make):
    one = make()
    assert one.read_and_settle(0, 3 * BLOCK) == one.base_bytes[: 3 * BLOCK]
    assert one.image.local() == [0, 1, 2]
    assert one.count("cor_bytes") == 3 * BLOCK
    one.base.fail("read", errno.EIO, always=True)
    assert one.image.read(0, 3 * BLOCK) == one.base_bytes[: 3 * BLOCK]


@pytest.mark.parametrize(
    ("offset", "length", "local"),
    [(1, 3 * BLOCK - 1, [1, 2]), (0, 3 * BLOCK - 1, [0, 1]), (5, 100, []), (10, BLOCK, []),
     (SIZE - BLOCK, BLOCK, [63])],
)  # fmt: skip
def test_blocks_read_in_part_stay_in_the_base(make, offset, length, local):
    one = make()
    one.read_and_settle(offset, length)
    assert one.image.local() == local


def test_the_partial_last_block_counts_when_all_of_it_was_read(make):
    one = make(base_size=9 * BLOCK + 512)
    one.read_and_settle(9 * BLOCK, 511)
    assert one.image.local() == []
    one.read_and_settle(9 * BLOCK, 512)
    assert one.image.local() == [9]
    assert one.count("cor_bytes") == 512


def test_zeros_become_holes(make):
    one = make(base=bytes(32 * BLOCK) + os.urandom(32 * BLOCK))
    before = os.fstat(one.fd).st_blocks
    one.read_and_settle(0, 32 * BLOCK)
    assert one.image.local() == list(range(32))
    assert os.fstat(one.fd).st_blocks <= before + 8
    assert one.count("cor_zero_bytes") == 32 * BLOCK
    assert one.count("cor_blocks") == one.count("cor_zero_blocks") == 32
    assert one.image.read(0, 32 * BLOCK) == bytes(32 * BLOCK)


def test_zeros_are_punched_over_what_a_failed_write_left(make):
    one = make(base=bytes(SIZE))
    os.pwrite(one.fd, b"old" * BLOCK, one.image.facts()["data_offset"])
    one.read_and_settle(0, 4 * BLOCK)
    assert one.image.read(0, 4 * BLOCK) == bytes(4 * BLOCK)


def test_newer_data_are_never_overwritten(make):
    """The guest writes between the read of the base and the settling."""
    one = make()
    data = one.image.read(0, 4 * BLOCK)
    assert one.image.write(BLOCK, b"new" * 1365 + b"!") == 0
    one.image.settle(0, data)
    assert one.image.local() == [0, 1, 2, 3]
    assert one.image.read(0, 4 * BLOCK) == (
        data[:BLOCK] + b"new" * 1365 + b"!" + data[2 * BLOCK :])  # fmt: skip


def test_a_locked_range_is_skipped_and_counted_as_busy(make):
    one = make()
    one.image.lock(1, 2)
    one.read_and_settle(0, 4 * BLOCK)
    one.image.unlock(1, 2)
    assert one.image.local() == []
    assert one.count("cor_skipped_bytes_busy") == 4 * BLOCK
    assert one.count("cor_bytes") == 0


def test_what_another_one_stores_is_waited_for(make, task, wait_until):
    """Reads of neighbours share the block at their border: all the same nothing is read twice."""
    one = make()
    while not one.count("cor_bytes"):  # the wait has a limit, which a busy machine may exceed
        one.image.lock(1, 2)
        copying = task(one.read_and_settle, 0, 4 * BLOCK)
        wait_until(lambda it=copying: one.image.lock_patient() or not it.is_alive(), "the copy")
        one.image.unlock(1, 2)
        copying.result()
    assert one.image.local() == [0, 1, 2, 3]


def test_above_the_bound_of_outstanding_data_nothing_is_copied(make):
    one = make(max_outstanding_copy_on_read_data=65536)
    one.image.outstanding(65536 - BLOCK)
    one.read_and_settle(0, 2 * BLOCK)
    assert one.image.local() == []
    assert one.count("cor_skipped_bytes_backlog") == 2 * BLOCK
    one.read_and_settle(0, BLOCK)
    assert one.image.local() == [0]
    assert one.count("cor_outstanding_bytes") == 0


@pytest.mark.parametrize(("error", "reason"), [(errno.ENOSPC, "nospace"), (errno.EIO, "error")])
def test_a_copy_that_fails_is_counted_and_harms_nobody(make, probes, error, reason):
    one = make()
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    log.fail("write", error)
    assert one.read_and_settle(0, 2 * BLOCK) == one.base_bytes[: 2 * BLOCK]
    assert one.image.local() == []
    assert one.count(f"cor_skipped_bytes_{reason}") == 2 * BLOCK
    assert one.image.facts()["fault"] == 0
    assert one.count("cor_outstanding_bytes") == 0


def test_large_copies_start_write_back_at_once(make, probes):
    one = make()
    log = probes.storage.Storage(b"")
    one.image.put_log(log)
    one.read_and_settle(0, 8 * BLOCK)
    assert log.log("writeback") == []
    one.read_and_settle(16 * BLOCK, 16 * BLOCK)
    assert [entry[2] for entry in log.log("writeback")] == [16 * BLOCK]


def test_local_runs_between_are_passed_over(make):
    one = make()
    assert one.image.write(2 * BLOCK, b"x" * BLOCK) == 0
    one.read_and_settle(0, 6 * BLOCK)
    assert one.image.local() == list(range(6))
    assert one.count("cor_bytes") == 5 * BLOCK
