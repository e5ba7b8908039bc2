# SPDX-License-Identifier: Apache-2.0
"""File systems by name."""

import os

import pytest

from fvdengine import stores
from fvdengine.stores import Verdict


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("ext4", Verdict.SUPPORTED), ("xfs", Verdict.SUPPORTED), ("btrfs", Verdict.SUPPORTED),
        ("tmpfs", Verdict.SUPPORTED), ("hostfs", Verdict.SUPPORTED), ("nfs4", Verdict.REFUSED),
        ("fuse.sshfs", Verdict.REFUSED), ("fuse", Verdict.REFUSED), ("cifs", Verdict.REFUSED),
        ("overlay", Verdict.UNTESTED), ("zfs", Verdict.UNTESTED), ("", Verdict.UNTESTED),
        ("fuseblk", Verdict.UNTESTED),
    ],
)  # fmt: skip
def test_store_is_judged_by_its_name(name, verdict):
    assert stores.judge(name) is verdict


def test_name_is_that_of_the_mount():
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        types = {line.rpartition(" - ")[2].split()[0] for line in mounts}
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        assert stores.store_name(fd) == "proc"
        assert "proc" in types
    finally:
        os.close(fd)


def test_unknown_descriptor_has_no_name():
    assert stores.store_name(1 << 20) == ""
