# SPDX-License-Identifier: Apache-2.0
"""Writes: copy-on-write of partial blocks, the base's end, FUA, writes that must not wait."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4096
TRY, FUA = 1, 2
BASE = bytes(range(1, 252)) * (64 * BLOCK // 251 + 1)


@pytest.fixture(scope="module")
def open_image(probes, image_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")

    def make(base_size, size=None, gate=None, **options):
        path = folder / os.urandom(8).hex()
        path.write_bytes(image_of(base_size=base_size, size=size or base_size, **options))
        fd = os.open(path, os.O_RDWR)
        base = probes.storage.Storage(BASE[:base_size])
        image = probes.image.Image(fd, base)
        os.close(fd)
        path.unlink()
        return image, base

    return make


@pytest.fixture
def image(open_image):
    made, _ = open_image(64 * BLOCK)
    yield made
    made.free()


@settings(max_examples=80)
@given(base_sectors=st.integers(1, 80), more=st.integers(0, 40),
       block=st.sampled_from([512, 1536, 4096, 16384]),
       writes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20000)), min_size=1, max_size=6))
def test_any_writes_over_any_base_end_read_back(open_image, base_sectors, more, block, writes):
    """Whole disk after every write: the written bytes changed and nothing else."""
    base_size, size = base_sectors * 512, (base_sectors + more) * 512
    image, _ = open_image(base_size, size, block_size=block, bytes_per_prefetch=block)
    model = bytearray(BASE[:base_size].ljust(size, b"\0"))
    try:
        for number, (at, length) in enumerate(writes):
            offset = min(int(at * size), size - 1)
            data = bytes([200 + number]) * min(length, size - offset)
            assert image.write(offset, data) == 0
            model[offset : offset + len(data)] = data
            end = min(offset + len(data), base_size)
            assert offset >= base_size or set(range(offset // block, -(-end // block))) <= set(
                image.local())
            assert image.read(0, size) == model
    finally:
        image.free()


@pytest.mark.parametrize(
    ("offset", "length", "fills"),
    [(0, BLOCK, []), (BLOCK, 3 * BLOCK, []), (100, BLOCK - 100, [(0, 100)]),
     (0, 100, [(100, BLOCK - 100)]), (5000, 100, [(BLOCK, 904), (5100, 3092)]),
     (BLOCK - 1, 2, [(0, BLOCK - 1), (BLOCK + 1, BLOCK - 1)])],
)  # fmt: skip
def test_only_what_a_partial_block_lacks_is_read(open_image, probes, offset, length, fills):
    image, base = open_image(64 * BLOCK)
    base.forget()
    assert image.write(offset, b"x" * length) == 0
    assert [entry[1:3] for entry in base.log("read")] == fills
    slots = probes.plain.slots()
    assert image.counter(slots["cow_fills"]) == bool(fills)
    assert image.counter(slots["cow_fill_bytes"]) == sum(n for _, n in fills)
    image.free()


def test_an_edge_that_is_local_is_not_filled_again(open_image):
    image, base = open_image(64 * BLOCK)
    assert image.write(10, b"first") == 0
    base.forget()
    assert image.write(100, b"x" * BLOCK) == 0
    assert [entry[1:3] for entry in base.log("read")] == [(BLOCK + 100, BLOCK - 100)]
    assert image.read(0, 200)[10:15] == b"first"
    image.free()


def test_the_last_block_is_filled_up_to_the_end_of_the_base(open_image):
    image, base = open_image(9 * BLOCK + 512, 10 * BLOCK)
    base.forget()
    assert image.write(9 * BLOCK + 100, b"x" * 100) == 0
    assert [entry[1:3] for entry in base.log("read")] == [
        (9 * BLOCK, 100), (9 * BLOCK + 200, 312)]  # fmt: skip
    assert image.local() == [9]
    image.free()


def test_a_write_behind_the_base_sets_no_bit_and_reads_nothing(open_image):
    image, base = open_image(8 * BLOCK, 16 * BLOCK)
    base.forget()
    assert image.write(8 * BLOCK, b"x" * 100) == 0
    assert (image.local(), base.log("read")) == ([], [])
    assert image.read(8 * BLOCK, 101) == b"x" * 100 + b"\0"
    image.free()


def test_a_base_error_leaves_the_blocks_in_the_base(open_image):
    image, base = open_image(64 * BLOCK)
    base.fail("read", errno.EIO)
    assert image.write(10, b"x") == -errno.EIO
    assert image.local() == []
    assert image.read(0, BLOCK) == BASE[:BLOCK]
    assert image.write(10, b"x") == 0
    image.free()


def test_a_failed_data_write_sets_no_bit(open_image, probes):
    image, _ = open_image(64 * BLOCK)
    log = probes.storage.Storage(b"")
    image.put_log(log)
    log.fail("write", errno.ENOSPC)
    assert image.write(0, b"x" * BLOCK) == -errno.ENOSPC
    assert image.local() == []
    assert image.facts()["fault"] == 0
    image.free()


def test_try_writes_what_needs_neither_base_nor_lock(image):
    assert image.write(0, b"x" * BLOCK, TRY) == 0
    assert image.write(100, b"y" * 10, TRY) == 0, "local now"
    assert image.write(BLOCK + 1, b"y", TRY) == -errno.EAGAIN
    assert image.write(0, b"z", TRY | FUA) == -errno.EAGAIN
    image.lock(5, 6)
    assert image.write(5 * BLOCK, b"x" * BLOCK, TRY) == -errno.EAGAIN
    image.unlock(5, 6)
    assert image.local() == [0]


def test_a_write_waits_for_the_lock_of_its_blocks(image, task, wait_until):
    image.lock(0, 2)
    write = task(image.write, BLOCK, b"x" * BLOCK)
    wait_until(image.lock_waiters, "the write to wait")
    assert image.local() == []
    image.unlock(0, 2)
    assert write.result() == 0


def test_fua_shares_the_commit_and_is_durable_on_return(image, probes):
    """Never by a synchronous write, which would collect the errors of other lost pages."""
    log = probes.storage.Storage(b"")
    image.put_log(log)
    flushes = probes.plain.slots()["image_flushes"]
    for number, data in enumerate([b"x" * BLOCK, b"y"], 1):
        before = image.counter(flushes)
        assert image.write(0, data, FUA) == 0
        assert image.counter(flushes) == before + (2 if number == 1 else 1)
    assert [entry[3] for entry in log.log("write")] == [0, 0], "no synchronous write"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failed_fua_write_fails_alone(image, probes, error):
    log = probes.storage.Storage(b"")
    image.put_log(log)
    log.fail("write", error)
    assert image.write(0, b"x" * BLOCK, FUA) == -error
    assert image.facts()["fault"] == 0
    assert image.write(0, b"x" * BLOCK, FUA) == 0


def test_after_a_fault_nothing_is_written(image):
    image.set_fault(errno.ENOSPC)
    assert image.write(0, b"x" * BLOCK) == -errno.EIO
    assert image.write_zeroes(0, BLOCK) == -errno.EIO
    assert image.trim(0, BLOCK) == -errno.EIO
    assert image.local() == []
    assert image.read(0, 5) == BASE[:5]


def test_an_empty_write_changes_nothing(image):
    assert image.write(100, b"") == 0
    assert image.local() == []
