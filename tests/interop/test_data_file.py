# SPDX-License-Identifier: Apache-2.0
"""After prefetch a data file is a plain raw image, which other programs read without us."""

import random
import select
import subprocess

import pytest

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest import tools
from fvdtest.images import open_image

MIB = 1 << 20
SIZE = 6 * MIB + 512


@pytest.mark.parametrize("block_size", [4096, 65536])
def test_qemu_img_finds_the_data_file_equal_to_the_disk(tmp_path, block_size):
    tools.need("qemu-img")
    noise = random.Random(7)
    base = tmp_path / "base.raw"
    base.write_bytes(noise.randbytes(2 * MIB) + bytes(MIB) + noise.randbytes(2 * MIB + 77))
    image, data = tmp_path / "clone.fvd", tmp_path / "data.raw"
    create_image(
        image,
        CreateOptions(size=SIZE, base=str(base), data_file=str(data), block_size=block_size),
    )
    opened = open_image(image, prefetch_delay=0)
    for offset in (100, MIB - 3000, 3 * MIB, SIZE - 5000):
        opened.device.write(offset, noise.randbytes(5000))
    while (state := opened.device.status()["prefetch_state"]) != "done":
        assert state == "running"
        assert select.select([opened.device.event_fd], [], [], 30)[0]
        opened.device.take_events()
    expected = tmp_path / "expected.raw"
    expected.write_bytes(opened.device.read(0, SIZE))
    opened.close()
    base.unlink()
    assert data.stat().st_size == SIZE
    subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", data, expected], check=True
    )
    again = open_image(image)
    assert again.device.read(0, SIZE) == expected.read_bytes()
    again.close()
