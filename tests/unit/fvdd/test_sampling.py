# SPDX-License-Identifier: Apache-2.0
"""Samples of a disk: where they are taken, what they are counted as, and when it is enough."""

import pytest

from fvdd.worker.sampling import EXTENTS_MAX, SAMPLES, STEP, list_extents, sample_map


class Disk:
    def __init__(self, size, kinds):
        self.size, self.kinds, self.asked = size, kinds, []

    def block_status(self, offset, length):
        assert 0 <= offset < offset + length <= self.size
        self.asked.append(offset)
        return [(length, self.kinds[offset * len(self.kinds) // self.size])]


def test_each_cell_is_looked_at_as_often():
    disk = Disk(1 << 30, ["data", "base", "zero", "base-zero"])
    found = sample_map(disk, 4)
    assert found == {
        "size": 1 << 30, "local": [SAMPLES, 0, 0, 0], "base": [0, SAMPLES, 0, 0],
        "zero": [0, 0, SAMPLES, SAMPLES],
    }  # fmt: skip
    assert len(set(disk.asked)) == 4 * SAMPLES


@pytest.mark.parametrize("size", [0, 512, 1024, 1000])
def test_a_tiny_disk_is_not_looked_at_behind_its_end(size):
    found = sample_map(Disk(size, ["data"]), 512)
    assert sum(found["local"]) == (512 * SAMPLES if size else 0)


def test_what_takes_too_long_is_left_out():
    times = iter([0.0, 0.0, 0.9, 1.1, 1.2])
    found = sample_map(Disk(1 << 20, ["data"]), 10, lambda: next(times))
    assert found["local"] == [SAMPLES, SAMPLES, *[0] * 8]


class Striped:
    """Of each two blocks of 512 bytes the second is data."""

    def __init__(self, size):
        self.size = size

    def block_status(self, offset, length):
        assert length <= STEP
        places = range(offset, offset + length, 512)
        return [(512, "data" if at // 512 % 2 else "base") for at in places]


def test_extents_come_in_parts_without_gaps():
    disk, at, parts = Striped(512 * (EXTENTS_MAX + 7)), 0, []
    while at is not None:
        parts.append(list_extents(disk, at))
        at = parts[-1]["next"]
    assert [len(part["extents"]) for part in parts] == [EXTENTS_MAX, 7]
    assert sum(length for part in parts for length, _ in part["extents"]) == disk.size
    assert parts[1]["extents"][0][1] == "base"


def test_extents_that_take_long_are_told_in_parts():
    times = iter([0.0, 2.0])
    found = list_extents(Disk(3 * STEP, ["data"]), 0, lambda: next(times))
    assert (found["extents"], found["next"]) == ([[STEP, "data"]], STEP)
    assert list_extents(Disk(0, ["data"]), 0)["next"] is None
