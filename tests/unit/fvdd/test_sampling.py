# SPDX-License-Identifier: Apache-2.0
"""Samples of a disk: where they are taken, what they are counted as, and when it is enough."""

import pytest

from fvdd.worker.sampling import SAMPLES, sample_map


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
