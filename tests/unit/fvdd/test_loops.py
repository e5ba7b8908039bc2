# SPDX-License-Identifier: Apache-2.0
"""Loop devices over a disk are found by the numbers of what is below them."""

import errno
import os

import pytest

from fvdd.attach import loops, nodes

NUMBERS = {"nbd0": (43, 0), "nbd0p1": (259, 300)}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Add loop devices: the name that sysfs tells, and what the ioctl gives."""
    answers, opened, asked = {}, {}, []

    def open_node(name, number, flags):
        assert number == (7, int(name[4:]))
        fd = os.open(os.devnull, os.O_RDONLY)
        opened[fd] = name
        return fd

    def ioctl(fd, request, data):
        name = opened[fd]
        asked.append(name)
        assert (request, len(data)) == (0x4C05, 232)
        if isinstance(answers[name], int):
            raise OSError(answers[name], "as asked")
        return bytes(16) + os.makedev(*answers[name]).to_bytes(8, "little") + bytes(208)

    monkeypatch.setattr(nodes, "open_node", open_node)
    monkeypatch.setattr(loops.fcntl, "ioctl", ioctl)

    class Host:
        def __init__(self):
            self.asked = asked

        def loop(self, number, path, answer):
            folder = tmp_path / f"loop{number}"
            (folder / "loop").mkdir(parents=True)
            (folder / "dev").write_text(f"7:{number}\n")
            (folder / "loop/backing_file").write_text(path + "\n")
            answers[folder.name] = answer

        def find(self, may_hang=lambda path: False):
            return list(loops.over(NUMBERS, may_hang, str(tmp_path)))

    return Host()


def test_numbers_tell_whatever_the_name_is(host, tmp_path):
    host.loop(0, "/dev/nbd0", (43, 0))
    host.loop(1, "/dev/nbd0.away", (259, 300))
    host.loop(2, "/dev/nbd0", (43, 16))
    host.loop(3, "/srv/file", (0, 0))
    (tmp_path / "loop4").mkdir()  # without a file below it
    assert host.find() == [("nbd0", "loop0"), ("nbd0p1", "loop1")]


def test_file_that_may_hang_is_not_looked_at_unless_it_has_the_name(host):
    host.loop(0, "/far/file", (43, 0))
    host.loop(1, "/far/nbd0p1 (deleted)", (259, 300))
    assert host.find(lambda path: path.startswith("/far/")) == [("nbd0p1", "loop1")]
    assert host.asked == ["loop1"]


def test_name_is_believed_where_nothing_else_can_be_had(host):
    host.loop(0, "/dev/nbd0", errno.EPERM)
    host.loop(1, "/dev/sda", errno.EPERM)
    host.loop(2, "/dev/nbd0", errno.ENXIO)
    assert host.find() == [("nbd0", "loop0")]


def test_want_of_descriptors_is_no_answer(host):
    host.loop(0, "/dev/nbd0", errno.EMFILE)
    with pytest.raises(OSError, match="as asked"):
        host.find()
