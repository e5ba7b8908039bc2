# SPDX-License-Identifier: Apache-2.0
"""What a process maps of a disk is found in a made-up /proc; what may hang is not looked at."""

import errno
import os
import stat
import threading

import pytest

from fvdd.attach import mapped

NUMBERS = {"nbd0": (43, 0), "nbd0p1": (259, 300)}
SAFE = {"0:5", "8:17"}


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A process: add mappings with the device that a look at them shows."""
    (tmp_path / "map_files").mkdir()
    (tmp_path / "maps").write_text("7f0000-7f1000 rw-p 00000000 00:00 0 \n")
    shown, looked_at = {}, []
    real = os.stat

    def fake_stat(path, **more):
        if "/map_files/" not in str(path):
            return real(path, **more)
        name = str(path).rpartition("/")[2]
        looked_at.append(name)
        if isinstance(shown[name], int):
            raise OSError(shown[name], "as asked")
        return os.stat_result([stat.S_IFBLK, *[0] * 9], {"st_rdev": os.makedev(*shown[name])})

    monkeypatch.setattr(mapped.os, "stat", fake_stat)

    class Process:
        def __init__(self):
            self.looked_at = looked_at

        def map(self, at, path, device="00:05", sharing="s", shows=(43, 0)):
            with open(tmp_path / "maps", "a") as file:
                file.write(f"{at:08x}-{at + 4096:08x} rw-{sharing} 00000000 {device} 77   {path}\n")
            shown[f"{at:x}-{at + 4096:x}"] = shows

        def find(self):
            return mapped.find(str(tmp_path), NUMBERS, SAFE)

    return Process()


def test_mapped_node_is_found_by_its_number(process):
    process.map(0x1000, "/dev/zero", shows=(1, 5))
    process.map(0x5000, "/dev/nbd0.away", sharing="p", shows=(259, 300))
    assert process.find() == "nbd0p1"
    assert process.looked_at == ["1000-2000", "5000-6000"]


def test_file_that_is_mapped_often_is_looked_at_once(process):
    for at in (0x1000, 0x3000, 0x5000):
        process.map(at, "/dev/shm/memory", shows=(0, 0))
    process.map(0x7000, "/dev/nbd0")
    assert process.find() == "nbd0"
    assert process.looked_at == ["1000-2000", "7000-8000"]


@pytest.mark.parametrize("path", ["/srv/a node", "/dev/disk/x (deleted)"])
def test_shared_mappings_of_any_name_are_looked_at(process, path):
    process.map(0x1000, path, device="08:11")
    assert process.find() == "nbd0"


def test_what_may_hang_and_programs_are_not_looked_at(process):
    process.map(0x1000, "/far/file", device="00:30")
    process.map(0x5000, "/usr/lib/libc.so", device="08:11", sharing="p")
    assert process.find() is None
    assert process.looked_at == []


def test_name_is_believed_where_nothing_else_can_be_had(process):
    process.map(0x1000, "/dev/nbd0p1", shows=errno.EPERM)
    assert process.find() == "nbd0p1"


def test_mapping_that_ended_meanwhile_is_none(process):
    process.map(0x1000, "/dev/nbd0", shows=errno.ENOENT)
    assert process.find() is None


def test_want_of_descriptors_is_no_answer(process, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(mapped, "_content", fail)
    with pytest.raises(OSError, match="too many"):
        process.find()


def test_process_that_hangs_is_left_out(process, monkeypatch, caplog):
    ends = threading.Event()
    monkeypatch.setattr(mapped, "READ_LIMIT_SECONDS", 0.01)
    monkeypatch.setattr(mapped, "_content", lambda path: b"" if ends.wait(60) else b"")
    process.map(0x1000, "/dev/nbd0")
    assert process.find() is None
    ends.set()
    assert "left out" in caplog.text


def test_process_that_ended_maps_nothing(tmp_path):
    assert mapped.find(str(tmp_path / "none"), NUMBERS, SAFE) is None
