# SPDX-License-Identifier: Apache-2.0
"""An image on a block device: zeroing takes any range, whatever the device's own block size."""

import os
import select
import shutil
import subprocess

import pytest

from fvdtest.images import make_image, open_image

MIB = 1 << 20


@pytest.fixture(params=[512, 4096])
def loop_device(request, tmp_path):
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    store = tmp_path / "store"
    with store.open("wb") as file:
        file.write(b"\xaa" * (32 * MIB))
    done = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", str(request.param), str(store)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_odd_ranges_are_zeroed_and_zeros_of_the_base_too(tmp_path, loop_device):
    base = tmp_path / "base.raw"
    size = 2 * MIB + 512
    base.write_bytes(b"b" * MIB + bytes(size - MIB))
    make_image(
        loop_device, base=str(base), block_size=4096, journal_size=65536, force=True,
        allow_dirs=(str(tmp_path),),
    )  # fmt: skip
    opened = open_image(loop_device, allow_dirs=(str(tmp_path),), prefetch_delay=0)
    try:
        opened.device.write_zeroes(10, 100)
        opened.device.write_zeroes(8192 + 512, 512)
        while (state := opened.device.status()["prefetch_state"]) != "done":
            assert state == "running"
            assert select.select([opened.device.event_fd], [], [], 20)[0]
            opened.device.take_events()
        model = bytearray(b"b" * MIB + bytes(size - MIB))
        model[10:110] = bytes(100)
        model[8704:9216] = bytes(512)
        assert opened.device.read(0, size) == model
        opened.device.trim(0, 8192)
    finally:
        opened.close()


def test_a_compact_image_shows_nothing_of_what_the_device_held(tmp_path, loop_device):
    """The device is full of old data: every place is zeroed where a write leaves it out (I9, S4).
    Its journal is written in whole physical sectors, of 4096 bytes too."""
    make_image(loop_device, size=16 * MIB, compact=True, chunk_size=65536, journal_size=65536,
               force=True)  # fmt: skip
    model = bytearray(16 * MIB)
    for turn in range(2):
        opened = open_image(loop_device)
        try:
            for chunk in range(turn, 256, 7):
                at = chunk * 65536 + 1000 * turn + 17
                opened.device.write(at, b"x" * 3000, fua=chunk % 2 == 0)
                model[at : at + 3000] = b"x" * 3000
            opened.device.trim(20 * 65536, 30 * 65536)
            model[20 * 65536 : 50 * 65536] = bytes(30 * 65536)
            assert opened.device.read(0, 16 * MIB) == model
            opened.device.flush()
        finally:
            opened.abandon() if turn == 0 else opened.close()
    opened = open_image(loop_device, read_only=True)
    assert opened.device.read(0, 16 * MIB) == model
    opened.close()
