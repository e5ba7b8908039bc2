# SPDX-License-Identifier: Apache-2.0
"""The client against sockets that misbehave: every case is an ApiError with a remedy."""

import os
import socket
import tempfile
import threading

import pytest
import uvicorn

from fvdapi import client
from fvdapi.client import Client, is_image, socket_path
from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, DeviceStatus, Timeouts


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


def test_a_connection_that_fvdd_may_be_closing_is_not_used_again(tmp_path, monkeypatch):
    """fvdd closes what was idle for five seconds: a request that comes just then gets no answer."""
    assert uvicorn.Config(None).timeout_keep_alive > client.KEEP_SECONDS
    monkeypatch.setattr(client, "KEEP_SECONDS", 0.0)
    answer, peers = _http("200 OK", b'{"version":"1","pid":1}'), []

    def serve():
        while len(peers) < 2:
            peers.append(server.accept()[0])
            peers[-1].recv(65536)
            peers[-1].sendall(answer)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        server.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        with Client(str(tmp_path / "s")) as one:
            assert [one.health().pid, one.health().pid] == [1, 1]
        thread.join(10)
    for peer in peers:
        peer.close()


def _error_of(path: str) -> ApiError:
    with Client(path) as one, pytest.raises(ApiError) as caught:
        one.health()
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


@pytest.mark.parametrize("name", ["\u00e9\udce9", "a/b", "\u20ac"])
def test_a_name_may_have_any_bytes(listener, name):
    body = b'{"error":{"code":"device_not_found","message":"m","hint":"h","details":{}}}'
    path = listener(_http("404 Not Found", body))
    with Client(path) as one, pytest.raises(ApiError) as caught:
        one.device(name)
    assert caught.value.code == "device_not_found"


def test_socket_path_prefers_the_argument(monkeypatch):
    monkeypatch.setenv("FVDD_SOCKET", "/env")
    assert socket_path("/arg") == "/arg"
    assert socket_path() == "/env"
    monkeypatch.delenv("FVDD_SOCKET")
    assert socket_path() == "/run/fvd/fvdd.sock"


class Known(Client):
    """Knows these devices, and has no daemon."""

    def __init__(self, *devices: DeviceStatus) -> None:
        self._known = devices

    def device(self, name: str) -> DeviceStatus:
        for status in self._known:
            if status.name == name:
                return status
        raise ApiError("device_not_found", f"no device is called {name}")

    def devices(self) -> tuple[DeviceStatus, ...]:
        return self._known


def attached(name: str, device: str, image: str) -> DeviceStatus:
    return DeviceStatus(
        name=name, device=device, image=image, state=DeviceState.ATTACHED, read_only=False,
        timeouts=Timeouts(resend_timeout=1, base_timeout=1, kernel_timeout=0, dead_timeout=1),
    )  # fmt: skip


@pytest.fixture
def known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "db.fvd").touch()
    return Known(
        attached("web", "/dev/nbd3", str(tmp_path / "web.fvd")),
        attached("db", "/dev/nbd4", str(tmp_path / "db.fvd")),
        attached("nbd4", "/dev/nbd5", str(tmp_path / "other.fvd")),
    )


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("web", "web"), ("db.fvd", "db"), ("./db.fvd", "db"), ("/dev/nbd3", "web"),
        ("nbd3", "web"), ("nbd4", "nbd4"), ("/dev/nbd4", "db"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_name_path_and_image(known, word, name):
    assert known.find(word).name == name


def test_the_file_counts_where_it_is_known(tmp_path):
    image, now = tmp_path / "web.fvd", tmp_path / "moved.fvd"
    now.touch()
    found = now.stat()
    web = attached("web", "/dev/nbd3", str(image))
    web = web.model_copy(update={"image_id": (found.st_dev, found.st_ino)})
    assert is_image(web, str(now))
    assert is_image(web, str(image)), "nothing else has the name"
    image.touch()
    assert not is_image(web, str(image))


@pytest.mark.parametrize("kind", ["touch", "mkdir"])
def test_a_file_of_the_name_of_a_device_does_not_hide_it(known, tmp_path, kind):
    getattr(tmp_path / "web", kind)()
    assert known.find("web").name == "web"


@pytest.mark.parametrize("word", ["nothing", "nbd9", "./web", ".", "", "no such.fvd", "a/b"])
def test_what_is_no_device_is_said_so(known, word):
    with pytest.raises(ApiError) as caught:
        known.find(word)
    assert caught.value.code == "device_not_found"
