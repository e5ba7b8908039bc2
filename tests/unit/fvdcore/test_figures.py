# SPDX-License-Identifier: Apache-2.0
"""Figures of a device: they agree with what was done to it."""

import select

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
