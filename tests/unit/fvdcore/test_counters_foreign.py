# SPDX-License-Identifier: Apache-2.0
"""A stats page of the same shape but another version or with other names is not summed."""

import os
import struct

import pytest

from fvdengine.stats import read_stats


@pytest.fixture
def page_file(probes, tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(bytes(probes.plain.page_shape()[3]))
    return path


@pytest.fixture
def mapped(probes, page_file):
    """Map the page anew: mapped() as often as wanted; freed at the end."""
    pages = []

    def make():
        fd = os.open(page_file, os.O_RDWR)
        try:
            pages.append(probes.plain.Page(fd))
        finally:
            os.close(fd)
        return pages[-1]

    yield make
    for page in pages:
        page.free()


def test_a_page_of_another_version_number_starts_at_zero(probes, page_file, mapped):
    slots = probes.plain.slots()
    mapped().count(1, slots["io_requests_read"], 40)
    with page_file.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<I", 2))
    mapped()
    assert read_stats(page_file).counters["io_requests_read"] == 0


def test_a_page_with_other_names_starts_at_zero(probes, page_file, mapped):
    """As many slots, but the third counts something else there."""
    slots = probes.plain.slots()
    mapped().count(1, slots["io_requests_flush"], 40)
    with page_file.open("r+b") as file:
        file.seek(4096 + 2 * 64)
        file.write(b"another_thing\0")
    mapped()
    assert read_stats(page_file).counters["io_requests_flush"] == 0
