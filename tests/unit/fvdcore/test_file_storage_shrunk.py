# SPDX-License-Identifier: Apache-2.0
"""What a file loses that becomes shorter under an open image is an error, never zeros that stay."""

import errno
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


@pytest.fixture(params=("writeback", "none"))
def raw(request, tmp_path):
    """An image of the raw layout, full of data that are durable, and its length."""
    path = make_image(tmp_path / "raw.fvd", size=4 * MIB)
    opened = open_image(path, cache=request.param)
    opened.device.write(0, b"d" * (4 * MIB))
    opened.device.flush()
    yield opened.device, path, os.path.getsize(path)
    opened.abandon()


def test_what_an_image_lost_is_not_made_zeros_by_a_write_once_a_read_has_failed(raw):
    device, path, length = raw
    os.truncate(path, length - 2 * MIB)
    with pytest.raises(EngineFault):
        device.read(2 * MIB, 4096)
    with pytest.raises(EngineFault):
        device.write(3 * MIB, b"n" * 4096)
    assert os.path.getsize(path) == length - 2 * MIB
    with pytest.raises(EngineFault):
        device.read(2 * MIB, 4096)
    assert device.read(0, 2 * MIB) == b"d" * (2 * MIB), "the rest is there"


def test_a_flush_stops_an_image_that_was_cut(raw):
    device, path, length = raw
    os.truncate(path, length - 2 * MIB)
    device.write(3 * MIB, b"n" * 4096)  # nobody has looked yet
    with pytest.raises(EngineFault):
        device.flush()
    assert device.status()["fault_errno"] == errno.ENODATA
    with pytest.raises(EngineFault):
        device.write(0, b"n" * 4096)


def test_no_write_gives_a_cut_image_its_length_again(raw):
    device, path, length = raw
    os.truncate(path, length - 2 * MIB)
    with pytest.raises(EngineFault):
        device.write(4 * MIB - 4096, b"n" * 4096)
    assert os.path.getsize(path) == length - 2 * MIB
    with pytest.raises(EngineFault):
        device.flush()


def test_no_growth_gives_a_cut_image_its_length_again(tmp_path):
    path = make_image(tmp_path / "compact.fvd", size=1024 * MIB, compact=True)
    opened = open_image(path)
    try:
        opened.device.write(0, b"d" * MIB)
        opened.device.flush()
        length = os.path.getsize(path)
        os.truncate(path, length - MIB)
        with pytest.raises(EngineFault):
            opened.device.resize(2048 * MIB)
        assert os.path.getsize(path) < length
        with pytest.raises(EngineFault):
            opened.device.flush()
    finally:
        opened.abandon()


def test_what_the_engine_cuts_itself_is_no_fault(tmp_path):
    path = make_image(tmp_path / "compact.fvd", size=64 * MIB, compact=True)
    for _ in range(2):  # a close gives back what was taken beforehand
        opened = open_image(path)
        opened.device.write(0, b"d" * MIB)
        opened.device.flush()
        assert opened.device.status()["fault_errno"] == 0
        opened.close()
