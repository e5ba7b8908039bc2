# SPDX-License-Identifier: Apache-2.0
"""Which file systems an image may lie on, judged by the name of the file system.

A writable image needs honest flushes, OFD locks that every user of the file sees, and a page
cache that outlives our processes. Network file systems and FUSE promise none of these, so they
are refused for writing. Bases are only read: anything goes, with a warning at most.
"""

import enum
import os
import stat


class Verdict(enum.Enum):
    """What is known about a file system as the place of a writable image."""

    SUPPORTED = "supported"
    UNTESTED = "untested"
    REFUSED = "refused"


_SUPPORTED = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "rootfs", "hostfs", "devtmpfs"}
)
_REFUSED = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "ceph", "gfs2", "ocfs2",
     "lustre", "glusterfs", "ncpfs", "coda", "orangefs", "vboxsf"}
)  # fmt: skip
# What the kernel shows of itself as files: reading one may act, and no two reads are the same.
MADE_UP = frozenset(
    {"proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "cgroup", "cgroup2", "bpf",
     "efivarfs", "pstore", "selinuxfs", "binfmt_misc", "mqueue", "devpts", "nsfs"}
)  # fmt: skip


def store_name(fd: int) -> str:
    """Return the name of the file system that `fd` lies on, "" if /proc does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
            mount_id = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                mount, _, source = line.partition(" - ")
                if mount.split(" ", 1)[0] == mount_id:
                    return source.split(" ", 1)[0]
    except (OSError, StopIteration):
        pass
    return ""


def judge(name: str) -> Verdict:
    """Return what is known about writable images on the file system `name`."""
    if name in _SUPPORTED:
        return Verdict.SUPPORTED
    if name in _REFUSED or name == "fuse" or name.startswith("fuse."):
        return Verdict.REFUSED
    return Verdict.UNTESTED


def is_device(fd: int) -> bool:
    """Whether `fd` is a block device: what was never written to it may be anything."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def judge_store(fd: int) -> tuple[Verdict, str]:
    """Return the verdict on the store of `fd` and its name; a block device is its own store."""
    if is_device(fd):
        return Verdict.SUPPORTED, "block device"
    name = store_name(fd)
    return judge(name), name or "an unknown file system"
