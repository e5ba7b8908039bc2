# SPDX-License-Identifier: Apache-2.0
"""A bitmap section of a gigabyte with the bits of a few blocks: nobody reads what is padding."""

import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from fvdengine.check import check_image
from fvdengine.header import Header
from fvdengine.info import image_info
from fvdengine.opening import OpenOptions, open_device, open_plan
from fvdengine.repair import repair_image
from fvdtest.forge import header_of

VAST = 1 << 30
MIB = 1 << 20


@pytest.fixture
def vast(image):
    """The clone, its metadata moved so that the bitmap section has a gigabyte, a hole mostly."""
    raw = image.read_bytes()
    old = Header.unpack(raw)
    behind = old.bitmap_offset + VAST
    new = replace(
        old, bitmap_size=VAST, journal_offset=behind, data_offset=behind + old.journal_size
    )
    with image.open("r+b") as file:
        file.truncate(new.data_offset + new.virtual_disk_size)
        for at in (0, 8192):
            file.seek(at)
            file.write(new.pack())
        file.seek(old.bitmap_offset)
        file.write(bytes(old.data_offset + old.virtual_disk_size - old.bitmap_offset))
    return image


def test_opening_takes_no_memory_for_padding(vast, base):
    assert image_info(vast).metadata_memory == 4096
    before = os.stat(vast).st_blocks
    tracemalloc.start()
    with open_plan(vast) as plan:
        device = open_device(plan)
        device.write(512, b"x" * 4096)
        lines = Path("/proc/self/status").read_text().splitlines()
        memory = int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
        device.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB
    assert memory < VAST // 1024
    assert os.stat(vast).st_blocks - before < 1024
    with open_plan(vast, OpenOptions(read_only=True)) as plan:
        device = open_device(plan)
        assert device.read(0, 8192) == base.read_bytes()[:512] + b"x" * 4096 + (
            base.read_bytes()[4608:8192]
        )
        device.close()


def test_bits_in_the_padding_are_found_and_cleared(vast):
    at = header_of(vast).bitmap_offset + VAST - 5000
    with vast.open("r+b") as file:
        file.seek(at)
        file.write(b"\x03")
    found = check_image(vast)
    assert [f.message for f in found.findings] == [
        "the bitmap has 2 bits set behind its last block"
    ]
    before = os.stat(vast).st_blocks
    tracemalloc.start()
    assert repair_image(vast).exit_status == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB
    assert os.stat(vast).st_blocks - before < 1024
    assert check_image(vast).findings == []
