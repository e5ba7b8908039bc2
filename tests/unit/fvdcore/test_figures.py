# SPDX-License-Identifier: Apache-2.0
"""Figures of a device: they agree with what was done to it."""

import os
import select

import pytest

from fvdengine.header import Header
from fvdengine.live import STATS_NAME, create_stats
from fvdengine.stats import read_stats
from fvdtest.images import make_image, open_image

SIZE = 1 << 20


def test_figures_follow_writes_and_flushes(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    image = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"), block_size=4096)
    opened = open_image(image)
    try:
        before = opened.device.status()
        opened.device.write(8192, b"w" * 4096)
        opened.device.write(100, b"p")
        after = opened.device.status()
        opened.device.flush()
        flushed = opened.device.status()
    finally:
        opened.close()
    assert before["size_bytes"] == before["base_bytes"] == before["base_bytes_left"] == SIZE
    assert before["local_bytes"] == before["pending_blocks"] == before["journal_used_bytes"] == 0
    assert before["prefetch_state"] == "disabled"
    assert before["prefetch_eta"] is None
    assert after["local_bytes"] == SIZE - after["base_bytes_left"] == 8192
    assert after["pending_blocks"] == 2
    assert not after["clean"]
    assert flushed["pending_blocks"] == 0
    assert flushed["journal_used_bytes"] == 4096
    assert flushed["fault_errno"] == flushed["in_flight"] == flushed["connections"] == 0


def test_figures_of_a_complete_image(tmp_path):
    image = make_image(tmp_path / "plain.fvd", size=SIZE)
    opened = open_image(image)
    try:
        figures = opened.device.status()
    finally:
        opened.close()
    assert figures["prefetch_state"] == "done"
    assert figures["base_bytes"] == figures["base_bytes_left"] == 0
    assert figures["local_bytes"] == SIZE


def test_prefetch_shows_in_the_figures(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    image = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"))
    opened = open_image(image, prefetch_delay=3600)
    try:
        waiting = opened.device.status()
        opened.device.prefetch_pause()
        paused = opened.device.status()
        opened.device.prefetch_start()
        while opened.device.status()["prefetch_state"] != "done":
            assert select.select([opened.device.event_fd], [], [], 20)[0]
            opened.device.take_events()
        done = opened.device.status()
    finally:
        opened.close()
    assert waiting["prefetch_state"] == "waiting"
    assert paused["prefetch_state"] == "paused"
    assert done["prefetch_state"] == "done"
    assert done["prefetch_bytes"] == SIZE
    assert done["base_bytes_left"] == 0


@pytest.fixture
def counted(tmp_path):
    """Open an image with a statistics page; the device, and what the page says now."""
    opened = []

    def make(image, **options):
        (tmp_path / STATS_NAME).unlink(missing_ok=True)
        fd = create_stats(tmp_path)
        opened.append(open_image(image, stats_fd=fd, **options))
        os.close(fd)
        return opened[-1].device, lambda: read_stats(tmp_path / STATS_NAME)

    yield make
    for one in opened:
        one.close()


def test_storage_in_use_follows_the_chunks_of_a_compact_image(tmp_path, counted):
    image = make_image(tmp_path / "disk.fvd", size=64 * SIZE, compact=True, chunk_size=SIZE)
    before = Header.unpack(image.read_bytes()[:8192]).data_offset
    device, page = counted(image)

    def used():
        return page().gauges["store_used_bytes"]

    assert used() == before
    for at in (0, 9, 30):
        device.write(at * SIZE, b"w" * 512)
    assert used() == before + 3 * SIZE
    device.trim(9 * SIZE, SIZE)
    assert used() == before + 3 * SIZE, "it is free only when a checkpoint has left it out"
    device.close()
    device, page = counted(image)
    assert used() == before + 2 * SIZE
    device.resize(80 * SIZE)
    device.write(79 * SIZE, b"w")
    assert used() == before + 3 * SIZE


def test_an_image_of_raw_layout_uses_its_storage_at_once(tmp_path, counted):
    image = make_image(tmp_path / "disk.fvd", size=4 * SIZE)
    start = Header.unpack(image.read_bytes()[:8192]).data_offset
    device, page = counted(image)
    assert page().gauges["store_used_bytes"] == start + 4 * SIZE
    device.resize(5 * SIZE)
    assert page().gauges["store_used_bytes"] == start + 5 * SIZE
