# SPDX-License-Identifier: Apache-2.0
"""A compact image on a file system that is really full: what a guest frees is there at once."""

import errno
import os
import socket
import time

import pytest

from fvdcore import EngineFault
from fvdtest.images import content_on_disk, make_image, open_image
from fvdtest.nbd_client import CMD_TRIM, CMD_WRITE, NbdClient

KIB, MIB = 1 << 10, 1 << 20
SIZE = 32 * MIB


@pytest.fixture(params=["image", "data file"])
def path(request, tiny, tmp_path):
    options = {"size": SIZE, "compact": True, "journal_size": 64 * KIB, "chunk_size": 256 * KIB}
    if request.param == "image":
        return make_image(tiny / "disk.fvd", **options)
    return make_image(tmp_path / "disk.fvd", data_file=str(tiny / "data"), **options)


def fill(device):
    """Write until there is no space; where the first write was that found none."""
    for offset in range(0, SIZE, MIB):
        try:
            device.write(offset, os.urandom(MIB))
        except EngineFault as error:
            if error.errno != errno.ENOSPC:
                raise
            return offset
    raise AssertionError("the store is not full")


def test_what_was_trimmed_can_be_written_again_at_once(path):
    opened = open_image(path)
    device = opened.device
    end = fill(device)
    for turn in range(4):
        new = bytes([turn + 1]) * MIB
        device.trim(turn * MIB, MIB)
        device.write(end, new)
        assert device.read(end, MIB) == new
        assert device.read(turn * MIB, MIB) == bytes(MIB)
        end += MIB
    device.flush()
    opened.close()
    found = content_on_disk(path)
    assert found[: 4 * MIB] == bytes(4 * MIB)
    assert found[end - MIB : end] == new


def test_zeroes_that_keep_their_space_find_what_was_trimmed(path):
    opened = open_image(path)
    end = fill(opened.device)
    opened.device.trim(0, MIB)
    opened.device.write_zeroes(end, MIB, no_hole=True)
    opened.device.trim(MIB, MIB)
    opened.device.write(end, b"n" * MIB)
    opened.close()


def test_a_write_that_waits_goes_on_when_a_guest_trims(path, wait_until):
    opened = open_image(path, on_full="wait")
    end = fill(opened.device)
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    client = NbdClient(mine)
    opened.device.serve(theirs.detach())
    write = client.send_request(CMD_WRITE, end, MIB, b"n" * MIB)
    wait_until(lambda: opened.device.status()["parked"], "the write to wait")
    begun = time.monotonic()
    trim = client.send_request(CMD_TRIM, 0, MIB)
    answers = {answer.cookie: answer.error for answer in (client.read_answer() for _ in range(2))}
    assert answers == {write: 0, trim: 0}
    assert time.monotonic() - begun < 10, "not only when the background settles it"
    assert client.read(end, MIB) == b"n" * MIB
    client.close()
    opened.close()


@pytest.mark.parametrize("behind", [0, 1], ids=["alone", "with one behind it"])
def test_a_write_that_waits_ends_unanswered_with_its_connection(path, wait_until, behind):
    opened = open_image(path, on_full="wait")
    end = fill(opened.device)
    failed = opened.device.status()["failed_requests"]
    mine, theirs = socket.socketpair()
    client = NbdClient(mine)
    opened.device.serve(theirs.detach())
    for _ in range(1 + behind):
        client.send_request(CMD_WRITE, end, MIB, b"n" * MIB)
    wait_until(lambda: opened.device.status()["parked"] == 1 + behind, "the writes to wait")
    client.close()
    wait_until(lambda: not opened.device.status()["connections"], "the connection to end")
    figures = opened.device.status()
    # Whoever sent them sends them again: nobody was told that there is no space.
    assert (figures["parked"], figures["failed_requests"]) == (0, failed)
    opened.close()
