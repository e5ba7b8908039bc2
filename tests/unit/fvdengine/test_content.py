# SPDX-License-Identifier: Apache-2.0
"""The content of chains of files, read without the engine, against bytes in memory."""

import os
import random
from dataclasses import replace

import pytest

from fvdengine import content
from fvdengine.create import create_image
from fvdengine.errors import InvalidTable
from fvdengine.metadata import pack_table
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

BLOCK, CHUNK, SIZE = 4096, 16384, 1 << 18
UNMAPPED = 0xFFFFFFFF
READ = OpenOptions(read_only=True)


@pytest.fixture
def build(tmp_path):
    """A function that makes an image over `base` with random bits and places, and its bytes."""

    def make(rng, name, base, base_format, below, compact, separate):
        path = tmp_path / name
        size = rng.randrange(1, SIZE // 512) * 512
        options = CreateOptions(
            base=str(base), base_format=base_format, size=size, journal_size=65536
        )
        header = create_image(path, options).header
        table_offset = header.journal_offset + header.journal_size
        if compact:
            header = replace(
                header, table_offset=table_offset, table_size=4096, chunk_size=CHUNK
            )
        if separate:
            header = replace(header, data_file=f"{name}.data", data_offset=0)
        store = tmp_path / f"{name}.data" if separate else path
        count = -(-size // CHUNK)
        places = [
            place if rng.random() < 0.6 else UNMAPPED
            for place in rng.sample(range(2 * count), count)
        ]
        bitmap = bytes(rng.choice([0, 255, rng.randrange(256)]) for _ in range(64)).ljust(
            header.bitmap_size, b"\0"
        )
        room = 2 * count * CHUNK if compact else size
        stored = rng.randbytes(room)
        with path.open("r+b") as file:
            file.write(2 * header.pack().ljust(8192, b"\0"))  # its backup copy, too
            file.seek(header.bitmap_offset)
            file.write(bitmap)
            file.seek(table_offset)
            file.write(pack_table(places, 4096))
        with store.open("r+b" if not separate else "wb") as file:
            file.seek(header.data_offset)
            file.write(stored)
            file.truncate(header.data_offset + room)
        expected = bytearray()
        for at in range(0, size, 512):
            block = at // BLOCK
            if at < header.base_img_size and not bitmap[block // 8] >> block % 8 & 1:
                expected += below[at : at + 512].ljust(512, b"\0")
                continue
            place = places[at // CHUNK]
            start = at if not compact else place * CHUNK + at % CHUNK
            is_zero = compact and place == UNMAPPED
            expected += bytes(512) if is_zero else stored[start : start + 512]
        return path, bytes(expected)

    return make


@pytest.mark.parametrize("seed", range(24))
def test_chain_reads_as_its_model(build, tmp_path, seed):
    rng = random.Random(seed)
    below = rng.randbytes(rng.randrange(1, SIZE))
    path, base_format = tmp_path / "base.raw", "raw"
    path.write_bytes(below)
    os.utime(path, ns=(10**18, 10**18))
    for level in range(rng.randrange(1, 4)):
        path, below = build(
            rng, f"level{level}", path, base_format, below, rng.random() < 0.7, rng.random() < 0.5
        )
        base_format = "fvd"
    with open_plan(path, replace(READ, accept_changed_base=True)) as plan:
        found = content.load_content(plan.layers)
        assert found.read(0, len(below)) == below
        start = rng.randrange(len(below))
        length = rng.randrange(len(below) - start)
        assert found.read(start, length) == below[start : start + length]
        assert list(found.pieces(start, start)) == []


def test_place_behind_the_end_of_the_data_file_is_refused(build, tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    path, _ = build(
        random.Random(1), "top", tmp_path / "base.raw", "raw", b"b" * SIZE, True, True
    )
    os.truncate(tmp_path / "top.data", CHUNK)
    with (
        open_plan(path, READ) as plan,
        pytest.raises(InvalidTable, match="behind the end of its storage"),
    ):
        content.load_content(plan.layers)
