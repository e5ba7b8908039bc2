# SPDX-License-Identifier: Apache-2.0
"""Options of a device, and a block device that becomes longer under a compact image."""

import os
import select
import shutil
import socket
import subprocess

import pytest

from fvdtest.images import make_image, open_image
from fvdtest.nbd_client import CMD_WRITE, NbdClient

MIB = 1 << 20
BLOCK = 4096


@pytest.mark.parametrize("policy", ["", "retry", "WAIT"])
def test_unknown_policy_is_refused_and_the_image_untouched(tmp_path, policy):
    path = make_image(tmp_path / "disk.fvd", size=MIB)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="on_full"):
        open_image(path, on_full=policy)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [{"crew_threads": 0}, {"crew_threads": 33}, {"open_session": b"short"}],
    ids=lambda wrong: f"{wrong}",
)
def test_options_out_of_range_are_refused(tmp_path, wrong):
    path = make_image(tmp_path / "disk.fvd", size=MIB)
    with pytest.raises(ValueError, match="crew_threads|open_session"):
        open_image(path, **wrong)


def test_figures_say_that_nothing_waits(tmp_path):
    opened = open_image(make_image(tmp_path / "disk.fvd", size=MIB), on_full="wait")
    try:
        opened.device.storage_grown(True)
        figures = opened.device.status()
        assert (figures["parked"], figures["growing_bytes"]) == (0, 0)
        assert opened.device.take_events() == []
    finally:
        opened.close()


@pytest.fixture
def loop_device(tmp_path):
    """A block device of 4 MiB, and the file to make it longer."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    store = tmp_path / "store"
    store.write_bytes(b"\xaa" * (4 * MIB))
    done = subprocess.run(
        ["losetup", "--find", "--show", str(store)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device, store
    subprocess.run(["losetup", "--detach", device], check=True)


def events_of(device, kind, wait_until):
    """Wait for an event of the kind; its value."""

    def look():
        select.select([device.event_fd], [], [], 1)
        return [value for name, value in device.take_events() if name == kind]

    return wait_until(look, kind)[-1]


def test_a_real_device_is_grown_while_writes_wait(tmp_path, loop_device, wait_until):
    node, store = loop_device
    make_image(
        node, size=64 * MIB, compact=True, chunk_size=MIB, storage_grow_unit=8 * MIB,
        journal_size=65536, force=True,
    )  # fmt: skip
    opened = open_image(node, can_grow=True)
    device = opened.device
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    device.serve(theirs.detach())
    client = NbdClient(mine)
    try:
        for at in range(3):
            client.write(at * MIB, bytes([at]) * BLOCK)
        sent = client.send_request(CMD_WRITE, 3 * MIB, BLOCK, b"n" * BLOCK)
        more = events_of(device, "grow", wait_until)
        assert more == 8 * MIB
        assert device.status()["growing_bytes"] == more
        assert client.read(MIB, BLOCK) == bytes([1]) * BLOCK
        os.truncate(store, 4 * MIB + more)
        subprocess.run(["losetup", "-c", node], check=True)
        device.storage_grown(True)
        answer = client.read_answer()
        assert (answer.cookie, answer.error) == (sent, 0)
        # What the device held before is never seen (I9).
        assert client.read(3 * MIB, MIB) == b"n" * BLOCK + bytes(MIB - BLOCK)
        assert events_of(device, "parked", wait_until) == 0
    finally:
        client.close()
        opened.close()
    again = open_image(node, read_only=True)
    assert again.device.read(3 * MIB, BLOCK) == b"n" * BLOCK
    again.close()


def test_prefetch_that_found_no_space_goes_on_when_storage_has_grown(
    tmp_path, loop_device, wait_until
):
    node, store = loop_device
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(8 * MIB))
    make_image(
        node, base=str(base), compact=True, chunk_size=MIB, storage_grow_unit=8 * MIB,
        journal_size=65536, force=True, allow_dirs=(str(tmp_path),),
    )  # fmt: skip
    opened = open_image(node, allow_dirs=(str(tmp_path),), can_grow=True, prefetch_delay=0)
    device = opened.device
    try:
        more = events_of(device, "grow", wait_until)
        assert device.status()["prefetch_state"] == "failed"
        os.truncate(store, 4 * MIB + more)
        subprocess.run(["losetup", "-c", node], check=True)
        device.storage_grown(True)
        wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to finish")
        assert device.read(0, 8 * MIB) == base.read_bytes()
    finally:
        opened.close()
