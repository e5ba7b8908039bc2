# SPDX-License-Identifier: Apache-2.0
"""A disk is held, or somebody is named, or it is said that neither can be told."""

import errno
import os

import pytest

from fvdd.attach import exclusive, holders, nodes
from fvdd.attach.attachment import AttachError, Holder


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk nbd0; what opening it and looking for holders give can be set."""
    (tmp_path / "nbd0").mkdir()
    (tmp_path / "nbd0/dev").write_text("43:0\n")
    given = {"open": None, "find": [], "opened": []}

    def open_node(name, number, flags):
        assert (name, number, flags & os.O_EXCL) == ("nbd0", (43, 0), os.O_EXCL)
        if given["open"] is not None:
            raise OSError(given["open"], "as asked")
        given["opened"].append(os.open(tmp_path, os.O_RDONLY))
        return given["opened"][-1]

    def find_holders(disk, **more):
        if isinstance(given["find"], OSError):
            raise given["find"]
        return given["find"]

    monkeypatch.setattr(nodes, "open_node", open_node)
    monkeypatch.setattr(holders, "find_holders", find_holders)
    return given


def test_disk_that_nobody_uses_is_held(disk, tmp_path):
    fd, found = exclusive.hold("nbd0", str(tmp_path))
    assert (fd, found) == (disk["opened"][0], [])
    os.close(fd)


def test_disk_that_the_kernel_does_not_have_needs_no_hold(disk, tmp_path):
    assert exclusive.hold("nbd9", str(tmp_path)) == (-1, [])


@pytest.mark.parametrize("failure", [None, errno.EBUSY, errno.ENOENT, errno.ENXIO, errno.EPERM])
def test_users_are_named_whatever_opening_it_gave(disk, tmp_path, failure):
    disk["open"], disk["find"] = failure, [Holder("/dev/nbd0 is mounted on /mnt")]
    assert exclusive.hold("nbd0", str(tmp_path)) == (-1, disk["find"])
    for fd in disk["opened"]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_busy_disk_has_an_unknown_user(disk, tmp_path):
    disk["open"] = errno.EBUSY
    fd, (holder,) = exclusive.hold("nbd0", str(tmp_path))
    assert fd == -1
    assert "does not name" in holder.what


@pytest.mark.parametrize("failure", [errno.ENOENT, errno.ENXIO, errno.EPERM, errno.EMFILE])
def test_disk_that_cannot_be_opened_is_taken_for_used(disk, tmp_path, failure):
    disk["open"] = failure
    with pytest.raises(AttachError, match="cannot be found out") as caught:
        exclusive.hold("nbd0", str(tmp_path))
    assert caught.value.code == "device_held"


def test_look_that_fails_holds_nothing(disk, tmp_path):
    disk["find"] = OSError(errno.EMFILE, "too many")
    with pytest.raises(AttachError, match="too many"):
        exclusive.hold("nbd0", str(tmp_path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(disk["opened"][0])
