# SPDX-License-Identifier: Apache-2.0
"""Who uses a device, read from a made-up /proc and /sys: every kind of holder is named."""

import errno
import os
import stat

import pytest

from fvdd.attach import holders
from fvdd.attach.holders import Disk, describe, find_holders, partitions, read_disk

DISK = Disk("nbd0", {"nbd0": (43, 0), "nbd0p1": (43, 1), "nbd0p12": (43, 12)})


@pytest.fixture
def proc(tmp_path):
    """A /proc with nobody in it, and functions to populate it."""
    root = tmp_path / "proc"
    root.mkdir()
    (root / "swaps").write_text("Filename Type Size Used Priority\n")
    _process(root, "self", "mnt:[1]")
    return root


def _process(root, pid, namespace, mounts="", name="prog"):
    folder = root / str(pid)
    (folder / "ns").mkdir(parents=True)
    (folder / "fd").mkdir()
    os.symlink(namespace, folder / "ns" / "mnt")
    (folder / "mountinfo").write_text(mounts)
    (folder / "comm").write_text(name + "\n")
    return folder


def _find(proc, tmp_path, **more):
    return [
        holder.what
        for holder in find_holders(DISK, proc=str(proc), sys_block=str(tmp_path / "block"), **more)
    ]


def _line(number, place, source="/dev/x", kind="ext4"):
    return f"36 35 {number} / {place} rw shared:1 - {kind} {source} rw\n"


def test_nobody(proc, tmp_path):
    _process(proc, 1, "mnt:[1]", _line("8:1", "/"))
    assert _find(proc, tmp_path) == []


def test_mount_of_the_disk_and_of_a_partition(proc, tmp_path):
    _process(proc, 1, "mnt:[1]", _line("43:0", "/mnt") + _line("43:12", "/srv/a\\040b"))
    assert _find(proc, tmp_path) == [
        "/dev/nbd0 is mounted on /mnt",
        "/dev/nbd0p12 is mounted on /srv/a b",
    ]


def test_mount_in_another_namespace_names_a_process(proc, tmp_path):
    _process(proc, 1, "mnt:[1]")
    _process(proc, 77, "mnt:[2]", _line("43:1", "/data"), name="postgres")
    assert _find(proc, tmp_path) == [
        "/dev/nbd0p1 is mounted on /data in the mount namespace of process 77 (postgres)"
    ]


def test_namespace_is_looked_at_once(proc, tmp_path):
    for pid in (1, 2, 3):
        _process(proc, pid, "mnt:[1]", _line("43:0", "/mnt"))
    assert len(_find(proc, tmp_path)) == 1


def test_file_system_with_a_number_of_its_own_is_found_by_its_source(proc, tmp_path):
    _process(proc, 1, "mnt:[1]", _line("0:42", "/pool", "/dev/nbd0p1", "btrfs"))
    assert _find(proc, tmp_path) == ["/dev/nbd0p1 is mounted on /pool"]


def test_swap(proc, tmp_path):
    with open(proc / "swaps", "a") as file:
        file.write("/dev/nbd0p1 partition 1048572 0 -2\n/dev/sda2 partition 1 0 -3\n")
    assert _find(proc, tmp_path) == ["/dev/nbd0p1 is used as swap"]


def test_device_mapper(proc, tmp_path):
    block = tmp_path / "block"
    (block / "nbd0" / "nbd0p1" / "holders" / "dm-3").mkdir(parents=True)
    (block / "dm-3" / "dm").mkdir(parents=True)
    (block / "dm-3" / "dm" / "name").write_text("vg-root\n")
    (block / "nbd0" / "holders" / "md127").mkdir(parents=True)
    assert _find(proc, tmp_path) == [
        "/dev/nbd0 is part of the device /dev/md127",
        "/dev/nbd0p1 is part of the device /dev/mapper/vg-root",
    ]


def test_opener_is_named_once_and_oneself_is_left_out(proc, tmp_path, monkeypatch):
    for pid, name in ((5, "dd"), (6, "fvdd")):
        folder = _process(proc, pid, "mnt:[1]", name=name)
        for fd in ("0", "3"):
            os.symlink("/dev/nbd0", folder / "fd" / fd)
    real = os.stat

    def fake_stat(path, **more):
        if "/fd/" in str(path):
            values = [0] * 10
            values[0] = stat.S_IFBLK
            return os.stat_result(values, {"st_rdev": os.makedev(43, 0)})
        return real(path, **more)

    monkeypatch.setattr(holders.os, "stat", fake_stat)
    assert _find(proc, tmp_path, own_pid=6) == ["/dev/nbd0 is open in process 5 (dd)"]


@pytest.fixture
def looked_at(monkeypatch):
    """The descriptors that were looked at; each is one of the disk."""
    real, found = os.stat, []

    def fake_stat(path, **more):
        if "/fd/" not in str(path):
            return real(path, **more)
        found.append(str(path).rpartition("/")[2])
        return os.stat_result([stat.S_IFBLK] + [0] * 9, {"st_rdev": os.makedev(43, 0)})

    monkeypatch.setattr(holders.os, "stat", fake_stat)
    return found


MOUNTS = "".join(
    f"{number} 35 0:{number} / {place} rw - {kind} source rw\n"
    for number, place, kind in (
        (40, "/far", "nfs4"), (41, "/by", "fuse.sshfs"), (42, "/", "ext4"), (43, "/dev", "devtmpfs")
    )
)  # fmt: skip


def _open_in(process, fd, path, mount):
    os.symlink(path, process / "fd" / str(fd))
    (process / "fdinfo").mkdir(exist_ok=True)
    (process / "fdinfo" / str(fd)).write_text(f"pos:\t0\nflags:\t0100000\nmnt_id:\t{mount}\n")


def test_what_lies_on_storage_that_may_hang_is_not_looked_at(proc, tmp_path, looked_at):
    process = _process(proc, 5, "mnt:[1]", MOUNTS)
    files = [("/far/file", 40), ("/by/file", 41), ("/detached", 99), ("/far/gone (deleted)", 40)]
    for fd, (path, mount) in enumerate(files):
        _open_in(process, fd, path, mount)
    assert _find(proc, tmp_path) == []
    assert looked_at == []


@pytest.mark.parametrize(
    ("path", "mount"),
    [("/srv/a node", 42), ("/dev/nbd0", 43), ("/nbd0p1", 99), ("/far/dev/nbd0 (deleted)", 40)],
)
def test_nodes_of_other_names_and_places_are_found(proc, tmp_path, looked_at, path, mount):
    _open_in(_process(proc, 5, "mnt:[1]", MOUNTS), 3, path, mount)
    assert _find(proc, tmp_path) == ["/dev/nbd0 is open in process 5 (prog)"]
    assert looked_at == ["3"]


def test_loop_device_and_its_mount(proc, tmp_path, monkeypatch):
    _process(proc, 1, "mnt:[1]", MOUNTS + _line("7:3", "/mnt"))
    (tmp_path / "block/loop3").mkdir(parents=True)
    (tmp_path / "block/loop3/dev").write_text("7:3\n")

    def over(numbers, may_hang, sys_block):
        assert (numbers, sys_block) == (DISK.numbers, str(tmp_path / "block"))
        paths = ("/far/x", "/far", "/by/a/b", "/farther", "/mnt/x", "/", "/dev/nbd0", "detached")
        assert [path for path in paths if may_hang(path)] == ["/far/x", "/far", "/by/a/b"]
        yield "nbd0p1", "loop3"

    monkeypatch.setattr(holders.loops, "over", over)
    assert _find(proc, tmp_path) == [
        "/dev/nbd0p1 is behind the loop device /dev/loop3",
        "/dev/loop3 is mounted on /mnt",
    ]


def test_mapping_is_told_of_who_has_no_descriptor(proc, tmp_path, looked_at, monkeypatch):
    _process(proc, 5, "mnt:[1]", MOUNTS)
    _open_in(_process(proc, 6, "mnt:[1]"), 3, "/dev/nbd0", 43)
    _process(proc, 7, "mnt:[1]")

    def find(process, numbers, safe):
        assert (numbers, safe) == (DISK.numbers, {"0:42", "0:43"})
        return "nbd0p1" if process.endswith("/5") else None

    monkeypatch.setattr(holders.mapped, "find", find)
    assert _find(proc, tmp_path, own_pid=7) == [
        "/dev/nbd0p1 is mapped by process 5 (prog)",
        "/dev/nbd0 is open in process 6 (prog)",
    ]


def test_want_of_descriptors_is_no_answer(proc, tmp_path, monkeypatch):
    _process(proc, 5, "mnt:[1]", MOUNTS)

    def fail(*words, **more):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Too many"):
        _find(proc, tmp_path)


def test_numbers_come_from_sysfs(tmp_path):
    for name, number in (("nbd0", "43:0"), ("nbd0/nbd0p2", "259:4"), ("nbd0/nbd0p10", "259:9")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dev").write_text(number + "\n")
    (tmp_path / "nbd0" / "queue").mkdir()
    assert partitions("nbd0", str(tmp_path)) == ["nbd0p2", "nbd0p10"]
    assert read_disk("nbd0", str(tmp_path)).numbers == {
        "nbd0": (43, 0), "nbd0p2": (259, 4), "nbd0p10": (259, 9),
    }  # fmt: skip
    assert read_disk("nbd9", str(tmp_path)).numbers == {}


def test_long_list_is_cut():
    many = [holders.Holder(str(number)) for number in range(7)]
    assert describe(many) == "0, 1, 2, 3, 3 more"
