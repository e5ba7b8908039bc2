# SPDX-License-Identifier: Apache-2.0
"""The room of a store: of the one that the data are in, or none at all."""

import os
import stat
import threading
from types import SimpleNamespace

import pytest

from fvdd.metrics import stores
from fvdd.metrics.exposition import Exposition
from fvdd.metrics.stores import (
    Looker,
    Room,
    Store,
    device_size,
    file_id,
    room_of,
    write_stores,
)


def store_of(path, **values):
    known = {"file_id": None, "grows": False, "used": 7 << 20}
    return Store("nbd0", str(path), **(known | values))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x" * 70000)
    return path


def test_a_file_has_the_room_of_its_file_system(image):
    system, status = os.statvfs(image), os.stat(image)
    room = room_of(store_of(image, file_id=file_id(status)))
    assert room.size == system.f_blocks * system.f_frsize
    assert room.taken == status.st_blocks * 512
    assert abs(room.available - system.f_bavail * system.f_frsize) < room.size / 10


def test_another_file_of_the_same_name_is_not_measured(image):
    before = file_id(os.stat(image))
    image.rename(image.with_suffix(".old"))
    assert room_of(store_of(image, file_id=before)) is None
    image.write_bytes(b"another")
    assert room_of(store_of(image, file_id=before)) is None


@pytest.fixture
def block_device(monkeypatch):
    """A path that is a block device of 100 MiB."""
    status = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_rdev=os.makedev(7, 3))
    monkeypatch.setattr(stores.os, "stat", lambda path: status)
    monkeypatch.setattr(stores, "device_size", {status.st_rdev: 100 << 20}.__getitem__)
    return status


def test_of_a_block_device_the_engine_says_what_is_used(block_device):
    found = store_of("/dev/loop3", file_id=(0, block_device.st_rdev))
    assert room_of(found) == Room(100 << 20, 93 << 20, 7 << 20)
    assert room_of(found._replace(used=200 << 20)).available == 0
    assert room_of(found._replace(file_id=(0, 5))) is None


def test_what_can_grow_or_is_not_known_has_no_free_space(block_device):
    """A volume that a program extends has the room of its group, which nobody here sees."""
    assert room_of(store_of("/dev/vg/web", grows=True)) == Room(100 << 20, None, 7 << 20)
    assert room_of(store_of("/dev/vg/web", used=None)) == Room(100 << 20, None, None)


def test_only_what_is_known_has_series(image, tmp_path):
    found = [
        store_of(image), store_of(tmp_path / "gone")._replace(device="nbd1"),
        store_of("")._replace(device="nbd2"),
    ]  # fmt: skip
    out = Exposition()
    write_stores(out, Looker().rooms(found))
    lines = [line for line in out.text().splitlines() if not line.startswith("#")]
    assert [line.partition(" ")[0] for line in lines] == [
        'fvd_backing_store_size_bytes{device="nbd0"}',
        'fvd_backing_store_avail_bytes{device="nbd0"}',
        'fvd_image_allocated_bytes{device="nbd0"}',
    ]


def test_a_device_that_is_gone_has_no_size(image):
    with pytest.raises(OSError, match="No such file"):
        device_size(os.makedev(4000, 1))


def test_a_store_that_hangs_holds_up_no_other_and_is_asked_by_one_at_a_time(
    image, tmp_path, monkeypatch
):
    hanging = store_of(tmp_path / "hanging")._replace(device="nbd1")
    twin = store_of(image)._replace(device="nbd2")
    answers, asked, real = threading.Event(), [], room_of

    def slow(store):
        if store is hanging:
            asked.append(store)
            answers.wait(60)
        return real(store)

    monkeypatch.setattr(stores, "room_of", slow)
    looker = Looker()
    for _ in range(3):
        found = looker.rooms([hanging, store_of(image), twin], 0.05)
        while len(found) < 2:  # a busy machine
            found = looker.rooms([hanging, store_of(image), twin], 0.05)
        assert [store.device for store, _ in found] == ["nbd0", "nbd2"]
    assert asked == [hanging]
    answers.set()
    while len(asked) < 2:  # its next turn
        assert looker.rooms([hanging], 0.05) == []
