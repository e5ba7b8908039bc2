# SPDX-License-Identifier: Apache-2.0
"""A device is opened by its number, whatever its usual node is. Nodes themselves are for root, and
tried with the kernel's driver: tests/kernel/test_hidden_users.py."""

import os
import stat

import pytest

from fvdd.attach import nodes

NUMBER = (43, 32)


@pytest.fixture
def made(monkeypatch):
    """The nodes that are made, each with its number; plain files stand for them."""
    numbers = {}

    def mknod(path, mode, device):
        assert mode == stat.S_IFBLK | 0o600
        with open(path, "x"):
            numbers[os.stat(path).st_ino] = device

    def as_node(status):
        device = numbers.get(status.st_ino, 0)
        return os.stat_result([stat.S_IFBLK, *[0] * 9], {"st_rdev": device})

    monkeypatch.setattr(nodes.os, "mknod", mknod)
    real = nodes._block_number
    monkeypatch.setattr(nodes, "_block_number", lambda status: real(as_node(status)))
    return numbers


def test_usual_node_is_taken_where_it_is_the_devices(made, tmp_path):
    (tmp_path / "nbd2").touch()
    made[(tmp_path / "nbd2").stat().st_ino] = os.makedev(*NUMBER)
    os.close(nodes.open_node("nbd2", NUMBER, os.O_RDONLY, str(tmp_path)))
    assert len(made) == 1


@pytest.mark.parametrize("usual", ["missing", "another's"])
def test_else_a_node_is_made_and_removed(made, tmp_path, usual):
    if usual == "another's":
        (tmp_path / "nbd2").touch()
    before = os.listdir(tmp_path)
    fd = nodes.open_node("nbd2", NUMBER, os.O_RDONLY, str(tmp_path))
    assert list(made.values()) == [os.makedev(*NUMBER)]
    assert os.fstat(fd).st_ino in made
    os.close(fd)
    assert os.listdir(tmp_path) == before


def test_node_that_was_exchanged_is_not_taken(made, tmp_path, monkeypatch):
    (tmp_path / "nbd2").touch()
    monkeypatch.setattr(nodes, "number_of", lambda path: NUMBER)
    with pytest.raises(OSError, match="exchanged"):
        nodes.open_node("nbd2", NUMBER, os.O_RDONLY, str(tmp_path))


def test_files_and_nothing_have_no_number(tmp_path):
    assert nodes.number_of(str(tmp_path)) is None
    assert nodes.number_of(str(tmp_path / "none")) is None
