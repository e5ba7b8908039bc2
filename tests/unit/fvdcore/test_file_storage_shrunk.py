# SPDX-License-Identifier: Apache-2.0
"""A base that becomes shorter under an open clone is an error, never zeros that stay for ever."""

import os
import select

import pytest

from fvdcore import EngineFault
from fvdtest.images import make_image, open_image

MIB = 1 << 20


def test_what_a_base_lost_is_never_taken_for_zeros(tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (4 * MIB))
    image = make_image(tmp_path / "clone.fvd", base=str(base), block_size=4096)
    opened = open_image(image)
    try:
        os.truncate(base, 2 * MIB)
        opened.device.prefetch_start()
        while opened.device.status()["base_bytes_left"] > 2 * MIB:
            select.select([opened.device.event_fd], [], [], 0.02)
        with pytest.raises(EngineFault):
            opened.device.read(3 * MIB, 4096)
        assert opened.device.status()["prefetch_state"] == "running"
        assert opened.device.status()["base_bytes_left"] == 2 * MIB
        assert opened.device.read(0, 2 * MIB) == b"b" * (2 * MIB)
        assert all(kind != "zero" for _, kind in opened.device.block_status(0, 4 * MIB))
    finally:
        opened.close()


def test_prefetch_goes_on_behind_what_cannot_be_read(tmp_path):
    """A range of the base that fails must not hide what lies behind it."""
    lower = tmp_path / "lower.raw"
    lower.write_bytes(b"l" * (4 * MIB))
    middle = make_image(tmp_path / "middle.fvd", base=str(lower), block_size=4096)
    opened = open_image(middle)
    opened.device.write(3 * MIB, b"m" * MIB)
    opened.close()
    top = make_image(
        tmp_path / "top.fvd", base=str(middle), base_format="fvd", block_size=4096
    )
    opened = open_image(top)
    try:
        os.truncate(lower, 0)
        opened.device.prefetch_start()
        while opened.device.status()["base_bytes_left"] > 3 * MIB:
            select.select([opened.device.event_fd], [], [], 0.02)
        assert opened.device.read(3 * MIB, MIB) == b"m" * MIB
    finally:
        opened.close()
