# SPDX-License-Identifier: Apache-2.0
"""The client against sockets that misbehave: every case is an ApiError with a remedy."""

import os
import socket
import tempfile
import threading

import pytest

from fvdapi.client import Client, socket_path
from fvdapi.errors import ApiError


@pytest.fixture
def listener(tmp_path):
    """A function that answers the next connection with fixed bytes; gives the socket's path."""
    path = str(tmp_path / "s")
    threads = []
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    server.listen()

    def answer_with(data: bytes) -> str:
        def body():
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(data)

        threads.append(threading.Thread(target=body))
        threads[-1].start()
        return path

    yield answer_with
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    server.close()


def _http(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def _error_of(path: str) -> ApiError:
    with Client(path) as client, pytest.raises(ApiError) as caught:
        client.health()
    return caught.value


def test_no_socket_means_not_running(tmp_path):
    error = _error_of(str(tmp_path / "none"))
    assert (error.code, error.exit_status) == ("daemon_not_running", 7)
    assert "systemctl start fvdd" in error.hint


def test_dead_socket_means_not_running(tmp_path):
    path = str(tmp_path / "dead")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
    error = _error_of(path)
    assert error.code == "daemon_not_running"
    assert "nobody listens" in error.message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_socket_of_others_means_no_permission():
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock,
    ):
        os.chmod(folder, 0o755)
        path = f"{folder}/s"
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen()
        os.seteuid(65534)
        try:
            error = _error_of(path)
        finally:
            os.seteuid(0)
    assert (error.code, error.exit_status) == ("daemon_no_permission", 7)
    assert "root" in error.hint


@pytest.mark.parametrize(
    "data",
    [b"", b"220 mail.example ESMTP\r\n", _http("200 OK", b"hello"), _http("500 Oops", b"<html>")],
    ids=["nothing", "another protocol", "not json", "foreign error"],
)
def test_foreign_answer_is_named(listener, data):
    error = _error_of(listener(data))
    assert error.code == "daemon_protocol"
    assert error.hint


def test_error_of_the_daemon_is_raised_again(listener):
    body = b'{"error":{"code":"device_held","message":"m","hint":"h","details":{"a":1}}}'
    error = _error_of(listener(_http("409 Conflict", body)))
    assert (error.code, error.message, error.hint) == ("device_held", "m", "h")
    assert (error.details, error.exit_status) == ({"a": 1}, 5)


def test_socket_path_prefers_the_argument(monkeypatch):
    monkeypatch.setenv("FVDD_SOCKET", "/env")
    assert socket_path("/arg") == "/arg"
    assert socket_path() == "/env"
    monkeypatch.delenv("FVDD_SOCKET")
    assert socket_path() == "/run/fvd/fvdd.sock"
