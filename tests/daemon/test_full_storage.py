# SPDX-License-Identifier: Apache-2.0
"""Writes wait for space on the storage of an image: what would wait with them is refused."""

import os
import threading

import pytest

from fvdtest.daemon import fvdctl, wait_until

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def parked(daemon, tiny):
    """A device with a write that waits for space, which ends where `filler` is removed."""
    image = tiny / "disk.fvd"
    compact = ("--compact", "--storage-grow-unit", MIB, "--journal-size", "64K")
    fvdctl("create", image, SIZE, *compact)
    disk = daemon.attach(image, "--name", "disk", "--on-full", "wait", "--connections", 2)
    filler = tiny / "filler"
    with filler.open("wb") as file:
        space = os.statvfs(tiny)
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - MIB)
    data = os.urandom(4 * MIB)
    writer = threading.Thread(target=disk.write, args=(0, data))
    writer.start()
    try:
        wait_until(lambda: daemon.device("disk").parked, "a write to wait for space")
        yield
    finally:
        filler.unlink(missing_ok=True)
        writer.join()
    assert disk.read(0, len(data)) == data


@pytest.mark.parametrize(
    "words",
    [
        ("detach", "disk"), ("snapshot", "disk", "{tiny}/new.fvd"),
        ("snapshot", "disk", "{folder}/new.fvd"), ("backup", "disk", "{folder}/copy.raw"),
        ("set-read-only", "disk", "on"),
    ],
    ids=["detach", "snapshot", "snapshot elsewhere", "backup", "read-only"],
)  # fmt: skip
def test_what_would_wait_is_refused(daemon, parked, tiny, tmp_path, words):
    before = sorted(os.listdir(tiny)), sorted(os.listdir(tmp_path))
    worker = daemon.device("disk").worker_pid
    words = [word.format(tiny=tiny, folder=tmp_path) for word in words]
    refused = daemon.ctl(*words, check=False)
    assert refused.returncode == 5, refused.stderr
    assert f"wait for space on the storage of {tiny}/disk.fvd" in refused.stderr
    assert "make space there" in refused.stderr
    assert (sorted(os.listdir(tiny)), sorted(os.listdir(tmp_path))) == before
    after = daemon.device("disk")
    assert (after.state, after.worker_pid, after.restarts) == ("attached", worker, 0)
