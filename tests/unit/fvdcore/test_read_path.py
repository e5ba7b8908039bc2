# SPDX-License-Identifier: Apache-2.0
"""Reads: runs, edges, holes, errors, reads that must not wait; and an image as a base."""

import errno
import os

import pytest

BLOCK = 4096
DATA, ZERO, BASE, BASE_ZERO = range(4)
NOWAIT = 1


@pytest.fixture
def make(probes, image_of, tmp_path):
    made = []

    def make(base, **options):
        path = tmp_path / f"image{len(made)}"
        path.write_bytes(image_of(**options))
        fd = os.open(path, os.O_RDWR)
        storage = probes.storage.Storage(base) if isinstance(base, bytes) else base
        made.append(probes.image.Image(fd, storage))
        os.close(fd)
        return made[-1], storage

    yield make
    for image in reversed(made):
        image.free()


def test_runs_end_where_local_and_base_meet(make):
    image, _ = make(b"b" * 64 * BLOCK, size=70 * BLOCK)
    assert image.write(2 * BLOCK, b"x" * 3 * BLOCK) == 0
    whole = 70 * BLOCK
    assert image.run(0, whole) == (BASE, 2 * BLOCK)
    assert image.run(100, 200) == (BASE, 200)
    assert image.run(2 * BLOCK + 7, whole - 2 * BLOCK - 7) == (DATA, 3 * BLOCK - 7)
    assert image.run(5 * BLOCK, whole - 5 * BLOCK) == (BASE, 59 * BLOCK)
    assert image.run(64 * BLOCK, 6 * BLOCK) == (DATA, 6 * BLOCK)


def test_a_local_end_of_the_base_runs_on_behind_it(make):
    image, _ = make(b"b" * 64 * BLOCK, size=70 * BLOCK)
    assert image.write(63 * BLOCK, b"x" * BLOCK) == 0
    assert image.run(63 * BLOCK, 7 * BLOCK) == (DATA, 7 * BLOCK)


def test_a_base_that_ends_within_a_block(make):
    """Behind its end the disk reads zeros, and what is written there needs no bit."""
    size = 10 * BLOCK
    image, _ = make(b"b" * (9 * BLOCK + 512), base_size=9 * BLOCK + 512, size=size)
    assert image.run(9 * BLOCK, BLOCK) == (BASE, 512)
    assert image.read(9 * BLOCK, BLOCK) == b"b" * 512 + bytes(BLOCK - 512)
    assert image.write(9 * BLOCK + 1024, b"end") == 0
    assert image.local() == []
    assert image.read(9 * BLOCK, 1027) == b"b" * 512 + bytes(512) + b"end"


def test_bytes_are_counted_by_where_they_came_from(make, probes):
    slots = probes.plain.slots()
    image, _ = make(b"b" * 64 * BLOCK)
    assert image.write(0, b"x" * BLOCK) == 0
    assert image.read(0, 3 * BLOCK) == b"x" * BLOCK + b"b" * 2 * BLOCK
    assert image.counter(slots["read_bytes_image"]) == BLOCK
    assert image.counter(slots["read_bytes_base"]) == 2 * BLOCK
    assert image.counter(slots["base_requests_demand"]) == 1
    assert image.counter(slots["base_bytes_demand"]) == 2 * BLOCK


def test_a_read_that_must_not_wait_counts_nothing(make, probes):
    slots = probes.plain.slots()
    image, base = make(b"b" * 64 * BLOCK)
    base.fail("read", errno.EAGAIN)
    assert image.read(0, BLOCK, NOWAIT) == -errno.EAGAIN
    assert base.log("read") == [("read", 0, BLOCK, NOWAIT)]
    for name in ("read_bytes_base", "base_requests_demand", "base_errors_demand"):
        assert image.counter(slots[name]) == 0


def test_an_error_of_the_base_fails_the_read_and_is_counted(make, probes):
    slots = probes.plain.slots()
    image, base = make(b"b" * 64 * BLOCK)
    base.fail("read", errno.EIO)
    assert image.read(0, BLOCK) == -errno.EIO
    assert image.counter(slots["base_errors_demand"]) == 1
    assert image.read(0, BLOCK) == b"b" * BLOCK


def test_status_tells_holes_of_the_image_and_of_the_base(make):
    base = bytearray(b"b" * 64 * BLOCK)
    base[8 * BLOCK : 16 * BLOCK] = bytes(8 * BLOCK)
    image, _ = make(bytes(base), size=70 * BLOCK)
    assert image.write(0, b"x" * BLOCK) == 0
    assert image.write_zeroes(BLOCK, BLOCK) == 0
    assert image.status(0, 70 * BLOCK) == (DATA, BLOCK)
    assert image.status(BLOCK, BLOCK) == (ZERO, BLOCK)
    assert image.status(2 * BLOCK, 62 * BLOCK) == (BASE, 6 * BLOCK)
    assert image.status(8 * BLOCK, 56 * BLOCK) == (BASE_ZERO, 8 * BLOCK)


def test_an_image_serves_as_a_base_and_takes_no_writes(make):
    lower, _ = make(b"b" * 64 * BLOCK)
    assert lower.write(BLOCK, b"L" * BLOCK) == 0
    top, _ = make(lower)
    assert top.write(2 * BLOCK, b"T" * BLOCK) == 0
    assert top.read(0, 3 * BLOCK) == b"b" * BLOCK + b"L" * BLOCK + b"T" * BLOCK
    assert lower.as_layer("read", BLOCK, 10) == b"L" * 10
    assert lower.as_layer("write", 0, 10) == -errno.EROFS
    assert lower.as_layer("zero", 0, 10) == -errno.EROFS
    assert lower.as_layer("status", BLOCK, BLOCK) == (DATA, BLOCK)
