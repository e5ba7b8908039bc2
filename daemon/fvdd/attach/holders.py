# SPDX-License-Identifier: Apache-2.0
"""Who uses a block device: mounts in any namespace, swap, device-mapper and md, loop devices, open
and mapped files.

Read-only looks at /proc and /sys, so the answer is a snapshot; the exclusive open that detach
makes besides is what keeps a racing mount out. A partition's user counts as the disk's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from fvdd.attach import loops, mapped, sysfs
from fvdd.attach.attachment import Holder

_OCTAL = re.compile(r"\\([0-7]{3})")
# Targets of /proc/PID/fd that cannot be a device node; looking at them would only cost time.
_NOT_A_NODE = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/proc/", "/sys/")
# Of file systems where a look may wait for a server or a program that is gone.
_MAY_HANG = re.compile(r"nfs.*|cifs|smb.*|fuse.*|9p|ceph|afs|gfs2|ocfs2|glusterfs|lustre|virtiofs")
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk and its partitions: kernel name -> (major, minor)."""

    name: str
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def name_of(self, number: tuple[int, int]) -> str | None:
        return next((name for name, own in self.numbers.items() if own == number), None)


def read_disk(name: str, sys_block: str = "/sys/block") -> Disk:
    """The device numbers of the disk `name` and of its partitions, as sysfs has them now."""
    numbers: dict[str, tuple[int, int]] = {}
    folder = os.path.join(sys_block, name)
    for entry in [name, *partitions(name, sys_block)]:
        place = folder if entry == name else os.path.join(folder, entry)
        number = _read_number(os.path.join(place, "dev"))
        if number is not None:
            numbers[entry] = number
    return Disk(name, numbers)


def partitions(name: str, sys_block: str = "/sys/block") -> list[str]:
    """Kernel names of the disk's partitions, lowest number first."""
    try:
        entries = os.listdir(os.path.join(sys_block, name))
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return []
    found = [e for e in entries if re.fullmatch(re.escape(name) + r"p[0-9]+", e)]
    return sorted(found, key=lambda entry: int(entry.rsplit("p", 1)[1]))


def find_holders(
    disk: Disk,
    *,
    own_pid: int | None = None,
    proc: str = "/proc",
    sys_block: str = "/sys/block",
) -> list[Holder]:
    """Everybody who uses the disk or a partition of it, except process `own_pid`. OSError: this
    process, or the host, lacks what it takes to look."""
    mounts = _all_mounts(proc)
    found = list(_mounts(disk, proc))
    found.extend(_swaps(disk, proc))
    found.extend(_stacked(disk, sys_block))
    for name, loop in loops.over(disk.numbers, mounts.may_hang, sys_block):
        found.append(Holder(f"/dev/{name} is behind the loop device /dev/{loop}"))
        found.extend(_mounts(read_disk(loop, sys_block), proc))
    found.extend(_openers(disk, proc, own_pid, mounts))
    return found


def describe(holders: list[Holder], limit: int = 4) -> str:
    """A list of holders as part of a sentence."""
    words = [holder.what for holder in holders[:limit]]
    if len(holders) > limit:
        words.append(f"{len(holders) - limit} more")
    return ", ".join(words)


def _mounts(disk: Disk, proc: str) -> Iterator[Holder]:
    """Mounts of the disk, each mount namespace once, named by its first process."""
    namespaces: set[str] = set()
    seen: set[tuple[str, str]] = set()
    own_namespace = _namespace(proc, "self")
    for pid in _pids(proc):
        namespace = _namespace(proc, str(pid))
        if namespace is None or namespace in namespaces:
            continue
        namespaces.add(namespace)
        foreign = namespace != own_namespace
        for name, place in _mounts_of(disk, f"{proc}/{pid}/mountinfo"):
            if (name, place) in seen:
                continue
            seen.add((name, place))
            where = f" in the mount namespace of {_process(proc, pid)}" if foreign else ""
            yield Holder(f"/dev/{name} is mounted on {place}{where}", pid if foreign else None)


def _mounts_of(disk: Disk, mountinfo: str) -> Iterator[tuple[str, str]]:
    for words in _mount_lines(mountinfo):
        name = disk.name_of(_number(words[2]))
        if name is None:
            # File systems with several devices (btrfs) show a number of their own: look at the
            # source, the second word behind the dash.
            behind = words[words.index("-") + 1 :]
            source = _unescape(behind[1]) if len(behind) > 1 else ""
            base = source.rsplit("/", 1)[-1]
            name = base if source == f"/dev/{base}" and base in disk.numbers else None
        if name is not None:
            yield name, _unescape(words[4])


def _mount_lines(mountinfo: str) -> Iterator[list[str]]:
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return
    for words in map(str.split, lines):
        if len(words) >= 7 and "-" in words:
            yield words


def _swaps(disk: Disk, proc: str) -> Iterator[Holder]:
    try:
        with open(f"{proc}/swaps", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()[1:]
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return
    for line in lines:
        path = _unescape(line.split()[0]) if line.split() else ""
        base = path.rsplit("/", 1)[-1]
        if base in disk.numbers:
            yield Holder(f"/dev/{base} is used as swap")


def _stacked(disk: Disk, sys_block: str) -> Iterator[Holder]:
    for name in disk.numbers:
        place = os.path.join(sys_block, disk.name)
        if name != disk.name:
            place = os.path.join(place, name)
        try:
            users = sorted(os.listdir(os.path.join(place, "holders")))
        except OSError as error:
            sysfs.raise_if_lacking(error)
            continue
        for user in users:
            yield Holder(f"/dev/{name} is part of the device {_mapper_name(user, sys_block)}")


def _openers(disk: Disk, proc: str, own_pid: int | None, mounts: _Mounts) -> Iterator[Holder]:
    for pid in _pids(proc):
        if pid == own_pid:
            continue
        name = _opened_by(disk, f"{proc}/{pid}", mounts.safe)
        if name is not None:
            yield Holder(f"/dev/{name} is open in {_process(proc, pid)}", pid)
            continue
        name = mapped.find(f"{proc}/{pid}", disk.numbers, mounts.safe_devices)
        if name is not None:
            yield Holder(f"/dev/{name} is mapped by {_process(proc, pid)}", pid)


def _opened_by(disk: Disk, process: str, safe: set[str]) -> str | None:
    try:
        fds = os.listdir(f"{process}/fd")
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return None
    names = (_opened(disk, process, fd, safe) for fd in fds)
    return next((name for name in names if name is not None), None)


def _opened(disk: Disk, process: str, fd: str, safe: set[str]) -> str | None:
    link = f"{process}/fd/{fd}"
    try:
        path = os.readlink(link)
        if path.startswith(_NOT_A_NODE):
            return None
        is_named = path.removesuffix(_DELETED).rpartition("/")[2] in disk.numbers
        if not is_named and _mount_of(process, fd) not in safe:
            return None
        status = os.stat(link)
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    return disk.name_of((os.major(status.st_rdev), os.minor(status.st_rdev)))


@dataclass(slots=True)
class _Mounts:
    """The mounts of all namespaces: the ids of those, and the devices of their file systems, where
    a look at a file waits for nobody, and the others' places. One that was detached is in no list.
    """

    safe: set[str] = field(default_factory=set)
    safe_devices: set[str] = field(default_factory=set)
    places: dict[str, bool] = field(default_factory=dict)

    def may_hang(self, path: str) -> bool:
        """Whether a path is on a mount, in whatever namespace, where a look at it may hang."""
        place = path
        while place not in self.places and place not in ("", "/"):
            place = place.rpartition("/")[0] or "/"
        return self.places.get(place, False)


def _all_mounts(proc: str) -> _Mounts:
    found = _Mounts()
    namespaces: set[str] = set()
    for pid in _pids(proc):
        namespace = _namespace(proc, str(pid))
        if namespace is None or namespace in namespaces:
            continue
        namespaces.add(namespace)
        for words in _mount_lines(f"{proc}/{pid}/mountinfo"):
            behind = words[words.index("-") + 1 :]
            may_hang = bool(_MAY_HANG.fullmatch(behind[0] if behind else ""))
            place = _unescape(words[4])
            found.places[place] = may_hang or found.places.get(place, False)
            if not may_hang:
                found.safe.add(words[0])
                found.safe_devices.add(words[2])
    return found


def _mount_of(process: str, fd: str) -> str:
    """The id of the mount that a descriptor's file is on, without a look at the file."""
    with open(f"{process}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
        for line in info:
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return value.strip()
    return ""


def _pids(proc: str) -> list[int]:
    return sorted(int(entry) for entry in os.listdir(proc) if entry.isdigit())


def _namespace(proc: str, pid: str) -> str | None:
    try:
        return os.readlink(f"{proc}/{pid}/ns/mnt")
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return None


def _process(proc: str, pid: int) -> str:
    try:
        with open(f"{proc}/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f"process {pid} ({file.read().strip()})"
    except OSError:
        return f"process {pid}"


def _mapper_name(user: str, sys_block: str) -> str:
    try:
        with open(os.path.join(sys_block, user, "dm", "name"), encoding="utf-8") as file:
            return f"/dev/mapper/{file.read().strip()}"
    except OSError:
        return f"/dev/{user}"


def _read_number(path: str) -> tuple[int, int] | None:
    try:
        with open(path, encoding="ascii") as file:
            return _number(file.read().strip())
    except OSError as error:
        sysfs.raise_if_lacking(error)
        return None


def _number(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(":")
    if major.isdigit() and minor.isdigit():
        return int(major), int(minor)
    return -1, -1


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found.group(1), 8)), text)
