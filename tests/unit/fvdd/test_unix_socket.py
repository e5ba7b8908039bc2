# SPDX-License-Identifier: Apache-2.0
"""Sockets in the file system: a path that exists is a server that listens."""

import errno
import os
import socket
import stat

import pytest

from fvdd.attach.unix_socket import ADDRESS_LENGTH_MAX, listen_at, short_path


def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_path_appears_only_when_it_listens(tmp_path, monkeypatch):
    path = tmp_path / "s"
    seen = []

    class Watched(socket.socket):
        def listen(self, backlog):
            seen.append(path.exists())
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    with listen_at(str(path), 1):
        assert seen == [False]
        connect(path)
        assert os.listdir(tmp_path) == ["s"]


def test_mode_is_set_before_it_can_be_reached(tmp_path):
    path = tmp_path / "s"
    with listen_at(str(path), 1, mode=0o640, group=os.getgid()):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_gid == os.getgid()


def test_stale_socket_is_replaced_and_a_living_one_kept(tmp_path):
    path = str(tmp_path / "s")
    listen_at(path, 1).close()
    with listen_at(path, 1):
        with pytest.raises(OSError, match="somebody listens there") as caught:
            listen_at(path, 1)
        assert caught.value.errno == errno.EADDRINUSE
        connect(path)
    assert os.listdir(tmp_path) == ["s"]


def test_of_two_that_begin_at_once_the_first_wins(tmp_path, monkeypatch):
    path = str(tmp_path / "s")
    real = os.chmod
    first = []

    def overtaken(name, mode):
        monkeypatch.setattr(os, "chmod", real)
        first.append(listen_at(path, 1))
        real(name, mode)

    monkeypatch.setattr(os, "chmod", overtaken)
    with pytest.raises(OSError, match="somebody listens there"):
        listen_at(path, 1)
    with first[0]:
        connect(path)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.mkdir()])
def test_other_files_are_left_alone(tmp_path, make):
    make(tmp_path / "s")
    with pytest.raises(FileExistsError):
        listen_at(str(tmp_path / "s"), 1)
    assert os.listdir(tmp_path) == ["s"]


def test_longest_path_that_clients_can_give_is_listened_on(tmp_path):
    room = ADDRESS_LENGTH_MAX - len(str(tmp_path)) - 1
    path = tmp_path / ("x" * room)
    with listen_at(str(path), 1):
        connect(path)
    with pytest.raises(OSError, match="too long"):
        listen_at(f"{path}x", 1)
    assert os.listdir(tmp_path) == [path.name]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def refuse(name, mode):
        raise OSError(errno.EROFS, "no")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(OSError, match="no"):
        listen_at(str(tmp_path / "s"), 1)
    assert os.listdir(tmp_path) == []


def test_socket_with_a_long_path_can_be_bound_and_reached(tmp_path):
    folder = tmp_path / ("x" * 150)
    folder.mkdir()
    path = folder / "control.sock"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        with short_path(path) as name:
            listening.bind(name)
        listening.listen()
        with short_path(path) as name:
            client.connect(name)
    assert path.is_socket()
    with pytest.raises(FileNotFoundError), short_path(tmp_path / "none" / "control.sock"):
        pass
