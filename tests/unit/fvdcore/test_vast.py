# SPDX-License-Identifier: Apache-2.0
"""Disks of 64 TiB and beyond, and the last place that a chunk can have, in sparse files."""

import os
import struct
import tempfile
from pathlib import Path

import pytest

from fvdengine.chain import read_header
from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.errors import EngineFailed
from fvdengine.geometry import PLACE_LIMIT
from fvdengine.opening import OpenOptions, open_plan
from fvdtest.images import make_image, open_image

TIB, MIB, PAGE = 1 << 40, 1 << 20, 4096


@pytest.fixture
def vast():
    """A folder on tmpfs, where files may be that long."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def on_disk(path, offset, length):
    """What the disk shows there, by the files alone."""
    with open_plan(path, OpenOptions(read_only=True)) as plan:
        return load_content(plan.layers).read(offset, length)


@pytest.mark.parametrize("compact", [False, True])
def test_a_vast_disk_is_exact_at_every_border(vast, compact):
    size = 64 * TIB - PAGE if compact else 8 * TIB - PAGE
    base = vast / "base.raw"
    marks = [0, 2 * TIB - 512, 2 * TIB, 4 * TIB - 512, size - 512]
    with base.open("wb") as file:
        file.truncate(size)
        for number, at in enumerate(marks):
            file.seek(at)
            file.write(bytes([number + 1]) * 512)
    options = {"compact": True, "chunk_size": 256 * MIB} if compact else {}
    path = make_image(
        vast / "vast.fvd", base=str(base), size=size + PAGE, journal_size=65536, **options
    )
    end = 96 * TIB if compact else size + PAGE
    opened = open_image(path)
    for at in marks:
        opened.device.write(at, b"w" * 100)
    if compact:
        opened.device.resize(end)
    opened.device.write(end - 512, b"e" * 512)
    with pytest.raises(ValueError, match="leave the disk"):
        opened.device.write(end - 511, b"e" * 512)
    opened.close()
    opened = open_image(path, read_only=True)
    for number, at in enumerate(marks):
        expected = b"w" * 100 + bytes([number + 1]) * 412
        assert opened.device.read(at, 512) == expected
        assert on_disk(path, at, 512) == expected
    assert opened.device.read(end - 1024, 1024) == bytes(512) + b"e" * 512
    opened.close()
    assert check_image(path).findings == []


def test_the_last_place_is_used_and_the_one_behind_it_refused(vast):
    path = make_image(vast / "a.fvd", size=16 * PAGE, compact=True, chunk_size=PAGE,
                      storage_grow_unit=PAGE)  # fmt: skip
    with path.open("r+b") as file:
        header = read_header(file.fileno(), str(path))
        end = header.data_offset + PLACE_LIMIT * PAGE
        file.truncate(end)
        file.seek(end - PAGE)
        file.write(b"L" * PAGE)
        file.seek(header.table_offset)
        file.write(struct.pack("<I", PLACE_LIMIT - 1))
    opened = open_image(path)
    assert opened.device.read(0, PAGE) == b"L" * PAGE
    for chunk in range(1, 16):  # there is no place behind the last one
        opened.device.write(chunk * PAGE, bytes([chunk]) * PAGE)
    opened.close()
    expected = b"L" * PAGE + b"".join(bytes([chunk]) * PAGE for chunk in range(1, 16))
    assert on_disk(path, 0, 16 * PAGE) == expected
    assert path.stat().st_size == end
    os.truncate(path, end + PAGE)
    with path.open("r+b") as file:
        file.seek(header.table_offset)
        file.write(struct.pack("<I", PLACE_LIMIT))
    with pytest.raises(EngineFailed, match="outside storage"):
        open_image(path)
