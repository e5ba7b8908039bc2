# SPDX-License-Identifier: Apache-2.0
"""The search for holes against a model that looks at every block."""

import os
import random

import pytest

from fvdengine import content, geometry
from fvdengine.chain import Layer
from fvdengine.geometry import Wanted
from fvdengine.holes import holes_of_base


def search(path, wanted, shortest):
    fd = os.open(path, os.O_RDONLY)
    try:
        layer = Layer(str(path), fd, "raw", None, os.fstat(fd).st_size)
        layout = geometry.choose_layout(wanted)
        bitmap, holes = holes_of_base([layer], layout, shortest)
    finally:
        os.close(fd)
    return layout, bitmap, holes


def model(data, block, end, shortest):
    """Runs of zero blocks as (offset, length), at least `shortest` bytes long."""
    data = data[:end].ljust(end, b"\0")
    found = []
    for start in range(0, end, block):
        stop = min(start + block, end)
        if any(data[start:stop]):
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], stop - found[-1][0])
        else:
            found.append((start, stop - start))
    return tuple(run for run in found if run[1] >= shortest)


@pytest.mark.parametrize("seed", range(40))
def test_holes_equal_the_model(tmp_path, seed):
    rng = random.Random(seed)
    length = rng.randrange(1, 600_000)
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.truncate(length)
        for _ in range(rng.randrange(6)):  # data, zeros with storage, and holes between them
            at = rng.randrange(length)
            size = min(rng.choice([1, 5000, 60_000, 200_000]), length - at)
            file.seek(at)
            file.write(rng.choice([bytes(size), b"x" * size, b"x" + bytes(size - 1)]))
    block = rng.choice([4096, 8192, 65536])
    size = rng.choice([rng.randrange(1, 1200) * 512, 600_064])
    shortest = rng.choice([1, block, block + 1, 100_000])
    layout, bitmap, holes = search(path, Wanted(size, length, block), shortest)
    expected = model(path.read_bytes(), block, layout.base_img_size, shortest)
    assert holes == expected
    bits = {n for n in range(len(bitmap) * 8) if bitmap[n >> 3] >> (n & 7) & 1}
    assert bits == {
        n for start, run in expected for n in range(start // block, -(-(start + run) // block))
    }


def test_hole_of_a_file_is_not_read(tmp_path, monkeypatch):
    """1 TiB of nothing with a block of data in the middle: one block's neighbourhood is read."""
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    asked = []
    real = content.Content.read

    def read(self, start, length):
        asked.append(length)
        return real(self, start, length)

    monkeypatch.setattr(content.Content, "read", read)
    _, bitmap, holes = search(path, Wanted(1 << 40, 1 << 40), 1 << 20)
    assert sum(asked) <= 1 << 20
    assert [length for _, length in holes] == [1 << 39, (1 << 39) - 32768]
    assert sum(byte.bit_count() for byte in bitmap) == (1 << 40) // 32768 - 1


def test_short_runs_stay_in_the_base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes((b"x" * 4096 + bytes(4096)) * 8)
    assert search(path, Wanted(65536, 65536), 4097)[2] == ()
    assert len(search(path, Wanted(65536, 65536), 4096)[2]) == 8
