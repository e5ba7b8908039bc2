# SPDX-License-Identifier: Apache-2.0
"""`serve` with TLS: the clients that exist can use it, and nobody else gets a byte."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdtest.certificates import Authority
from fvdtest.guest import wait_until
from fvdtest.model import MIB
from fvdtest.serve import FVDCTL, Server, refused

from .conftest import World

KEY = "c0ffee" * 10 + "0102"
GREETING = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
REPLY = struct.Struct(">QIII")
OPTION_MAGIC = 0x49484156454F5054
ACK, ERR_UNSUP, ERR_INVALID, ERR_TLS_REQD = 1, 0x80000001, 0x80000003, 0x80000005
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED = 1, 2, 3, 5, 6, 7, 8


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="session")
def server_files(authority: Authority) -> Path:
    return authority.sign("server")


@pytest.fixture(scope="session")
def client_files(authority: Authority) -> Path:
    return authority.sign("client")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text(f"alice:{KEY}\n")
    path.chmod(0o600)
    return path


def port_of(server: Server) -> int:
    return int(server.uri.rpartition(":")[2].strip("/"))


def program(*words: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=100, check=False
    )
    if status is not None:
        assert done.returncode == status, done.stdout + done.stderr
    return done


# The programs that speak NBD with TLS.


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_libnbd_copies_with_certificates(
    clone: World, server_files: Path, client_files: Path, over: str
) -> None:
    with clone.serve("--tls-certificates", str(server_files), tcp=over == "tcp") as server:
        assert server.uri.startswith("nbds://" if over == "tcp" else "nbds+unix://")
        mark = "&" if "?" in server.uri else "?"
        uri = f"{server.uri}{mark}tls-certificates={client_files}"
        if over == "unix":
            uri = uri.replace("nbds+unix:///", "nbds+unix://localhost/")
        copy = clone.new_file("copy.img")
        program("nbdcopy", uri, copy)
        assert clone.model.difference(copy.read_bytes()[: clone.model.size]) is None
        data = os.urandom(3 * MIB)
        source = clone.new_file("source.img")
        source.write_bytes(data.ljust(clone.model.size, b"z"))
        program("nbdcopy", source, uri)
        clone.model.write(0, source.read_bytes())
        assert str(clone.model.size) in program("nbdinfo", "--size", uri).stdout
        told = program("nbdinfo", "--map", uri).stdout
        assert "data" in told
    with clone.serve("-r") as server:
        clone.expect(server)


def test_libnbd_with_a_pre_shared_key(clone: World, keys: Path) -> None:
    with clone.serve("--tls-psk", str(keys), tcp=True) as server:
        uri = f"nbds://alice@127.0.0.1:{port_of(server)}/?tls-psk-file={keys}"
        copy = clone.new_file("copy.img")
        program("nbdcopy", uri, copy)
        assert clone.model.difference(copy.read_bytes()[: clone.model.size]) is None
        assert "user alice" in server.log
        bob = clone.new_file("bob.psk")
        bob.write_text(f"alice:{'00' * 32}\nbob:{KEY}\n")
        for user in ("alice", "bob"):
            uri = f"nbds://{user}@127.0.0.1:{port_of(server)}/?tls-psk-file={bob}"
            assert program("nbdinfo", uri, status=None).returncode != 0
    assert "connection open" in server.log


def qemu_img(server: Server, credentials: str, target: Path, *, hostname: bool) -> list[str]:
    return [
        "qemu-img", "convert", "--object", credentials, "--image-opts",
        f"driver=nbd,host=127.0.0.1,port={port_of(server)},tls-creds=tls0"
        + (",tls-hostname=localhost" if hostname else ""),
        "-O", "raw", str(target),
    ]  # fmt: skip


def test_qemu_with_certificates(clone: World, server_files: Path, client_files: Path) -> None:
    with clone.serve(
        "--tls-certificates", str(server_files), "--tls-verify-peer", tcp=True
    ) as server:
        credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={client_files}"
        copy = clone.new_file("copy.img")
        program(*qemu_img(server, credentials, copy, hostname=True))
        assert clone.model.difference(copy.read_bytes()) is None


def test_qemu_with_a_pre_shared_key(clone: World, keys: Path) -> None:
    with clone.serve("--tls-psk", str(keys), tcp=True) as server:
        credentials = f"tls-creds-psk,id=tls0,endpoint=client,dir={keys.parent},username=alice"
        copy = clone.new_file("copy.img")
        program(*qemu_img(server, credentials, copy, hostname=False))
        assert clone.model.difference(copy.read_bytes()) is None


def test_our_own_remote_base_over_tls(
    clone: World, tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone whose base is served by another of our servers, over TLS and TCP."""
    folder = tmp_path / "over"
    folder.mkdir()
    with clone.serve("-r", "--tls-psk", str(keys), tcp=True) as server:
        monkeypatch.setenv("FVD_NBD_TLS_PSK_FILE", str(keys))
        monkeypatch.setenv("FVD_NBD_TLS_USERNAME", "alice")
        uri = f"nbds://127.0.0.1:{port_of(server)}/"
        image = folder / "over.fvd"
        allow = ("--allow-uri", "nbds://127.0.0.1")
        program(*FVDCTL, "create", image, "--base", uri, *allow)
        over = World(folder, image, clone.model, clone.rng)
        with over.serve(*allow) as upper:
            over.expect(upper)


# Who gets nothing.


def test_client_without_a_certificate_is_refused(
    clone: World, server_files: Path, client_files: Path, tmp_path: Path
) -> None:
    without = tmp_path / "without"
    without.mkdir()
    (without / "ca-cert.pem").write_bytes((client_files / "ca-cert.pem").read_bytes())
    other = Authority(tmp_path / "other", "other").sign("client")
    (other / "ca-cert.pem").write_bytes((client_files / "ca-cert.pem").read_bytes())
    with clone.serve(
        "--tls-certificates", str(server_files), "--tls-verify-peer", tcp=True
    ) as server:
        for files in (without, other):
            uri = f"{server.uri}?tls-certificates={files}"
            assert program("nbdinfo", uri, status=None).returncode != 0
        assert "connection open" not in server.log
        program("nbdinfo", f"{server.uri}?tls-certificates={client_files}")


def test_client_notices_a_server_that_is_not_its_own(
    clone: World, server_files: Path, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger", "stranger").sign("client")
    with clone.serve("--tls-certificates", str(server_files), tcp=True) as server:
        uri = f"{server.uri}?tls-certificates={stranger}"
        assert program("nbdinfo", uri, status=None).returncode != 0
        assert "every client may connect" in server.log


class Raw:
    """A client that says what it likes."""

    def __init__(self, server: Server) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port_of(server)), timeout=30)
        GREETING.unpack(self.take(GREETING.size))
        self.sock.sendall(struct.pack(">I", 3))

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def rest(self) -> bytes:
        """What comes until the end, which may be a reset."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.sock.recv(4096):
                data += piece
        self.sock.close()
        return data

    def ask(self, option: int, data: bytes = b"") -> int:
        self.sock.sendall(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        _, _, reply, length = REPLY.unpack(self.take(REPLY.size))
        self.take(length)
        return int(reply)


@pytest.fixture
def secured(clone: World, keys: Path) -> Iterator[Server]:
    with clone.serve("--tls-psk", str(keys), tcp=True) as server:
        yield server


@pytest.mark.parametrize("option", [LIST, INFO, GO, STRUCTURED, 9, 10, 77])
def test_nothing_is_answered_before_tls(secured: Server, option: int) -> None:
    raw = Raw(secured)
    data = struct.pack(">IH", 0, 0) if option in (INFO, GO) else b""
    assert raw.ask(option, data) == ERR_TLS_REQD
    assert raw.ask(ABORT) == ACK
    raw.sock.close()


def test_old_way_in_is_closed(secured: Server) -> None:
    raw = Raw(secured)
    with pytest.raises(EOFError):
        raw.ask(EXPORT_NAME)
    raw.sock.close()


def test_plain_client_is_told_and_programs_fail(secured: Server) -> None:
    done = program("nbdinfo", f"nbd://127.0.0.1:{port_of(secured)}/", status=None)
    assert done.returncode != 0
    assert program("nbdinfo", f"{secured.uri}", status=None).returncode != 0
    assert "connection open" not in secured.log


@pytest.mark.parametrize("said", [b"", b"\0" * 300, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"])
def test_what_is_no_tls_ends_the_connection_and_disturbs_nobody(
    secured: Server, keys: Path, said: bytes
) -> None:
    raw = Raw(secured)
    assert raw.ask(STARTTLS) == ACK
    raw.sock.sendall(said)
    with contextlib.suppress(OSError):  # the server may have reset it already
        raw.sock.shutdown(socket.SHUT_WR)
    raw.rest()
    program("nbdinfo", f"nbds://alice@127.0.0.1:{port_of(secured)}/?tls-psk-file={keys}")
    status = Path(f"/proc/{secured.pid}/status")
    wait_until(lambda: "TLS ended" in secured.log, 20, "the end of the connection")
    assert "Threads:" in status.read_text()


def test_what_is_sent_beyond_starttls_in_clear_is_never_an_option(secured: Server) -> None:
    """Whoever sits between could have put it there."""
    raw = Raw(secured)
    injected = OPTION.pack(OPTION_MAGIC, STRUCTURED, 0)
    raw.sock.sendall(OPTION.pack(OPTION_MAGIC, STARTTLS, 0) + injected)
    _, option, reply, _ = REPLY.unpack(raw.take(REPLY.size))
    assert (option, reply) == (STARTTLS, ACK)
    # An alert of TLS at most.
    assert raw.rest()[:1] in (b"", b"\x15")


def secure(raw: Raw, files: Path) -> Raw:
    """Go on over TLS, with a library that is not the server's."""
    assert raw.ask(STARTTLS) == ACK
    context = ssl.create_default_context(cafile=str(files / "ca-cert.pem"))
    context.load_cert_chain(files / "client-cert.pem", files / "client-key.pem")
    raw.sock = context.wrap_socket(raw.sock, server_hostname="localhost")
    return raw


def test_tls_begins_once_and_forgets_what_came_before(
    clone: World, server_files: Path, client_files: Path
) -> None:
    options = ("--tls-certificates", str(server_files), "--tls-verify-peer")
    with clone.serve(*options, tcp=True) as server:
        raw = secure(Raw(server), client_files)
        assert raw.ask(STARTTLS) == ERR_INVALID
        # Meta contexts need structured replies, which nobody has asked for on this side.
        assert raw.ask(10, struct.pack(">II", 0, 0)) == ERR_INVALID
        assert raw.ask(STRUCTURED) == ACK
        assert raw.ask(10, struct.pack(">II", 0, 0)) == ACK
        raw.sock.close()
        wait_until(lambda: server.log.count("handshake failed") == 1, 20, "the end")


def held(server: Server) -> tuple[int, int]:
    """How many descriptors and threads a server has."""
    folder = Path(f"/proc/{server.pid}")
    return len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))


def test_connections_that_break_off_leave_nothing(clone: World, keys: Path) -> None:
    """Clients that are killed with answers on the way."""
    with clone.serve("--tls-psk", str(keys), tcp=True) as server:
        uri = f"nbds://alice@127.0.0.1:{port_of(server)}/?tls-psk-file={keys}"
        program("nbdinfo", uri)
        wait_until(lambda: "connection_closed" in server.log, 20, "the end of the first client")
        before = held(server)
        for _ in range(3):
            client = subprocess.Popen(
                ["nbdcopy", "--connections=2", uri, "-"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert client.stdout is not None
            client.stdout.read(1000)
            client.kill()
            client.wait()
            client.stdout.close()
        wait_until(
            lambda: all(now <= then for now, then in zip(held(server), before, strict=True)),
            30, "descriptors and threads that are gone",
        )  # fmt: skip
        program("nbdinfo", uri)


def test_silent_client_is_dropped(secured: Server) -> None:
    raw = Raw(secured)
    assert raw.ask(STARTTLS) == ACK
    assert raw.rest() == b""


def test_without_credentials_tls_is_not_offered(clone: World) -> None:
    with clone.serve(tcp=True) as server:
        raw = Raw(server)
        assert raw.ask(STARTTLS) == ERR_UNSUP
        raw.sock.close()


# What cannot be served.


def test_other_hosts_are_served_with_tls_alone(clone: World, keys: Path) -> None:
    said = refused(clone.image, "--tcp", "0.0.0.0:0")
    assert "without TLS only loopback addresses are safe" in said
    assert "--tls-psk" in said
    with Server(
        clone.image, "--tls-psk", str(keys), directory=clone.directory, tcp_host="0.0.0.0"
    ) as server:
        program("nbdinfo", f"nbds://alice@127.0.0.1:{port_of(server)}/?tls-psk-file={keys}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("no directory", "server-cert.pem cannot be read"),
        ("no key", "server-key.pem cannot be read"),
        ("garbage", "server-cert.pem"),
        ("other key", "server-key.pem"),
        ("no authority", "ca-cert.pem cannot be read"),
        ("empty authority", "holds no certificate"),
    ],
)
def test_bad_certificates_are_refused(
    clone: World, server_files: Path, client_files: Path, tmp_path: Path, spoil: str, said: str
) -> None:
    folder = tmp_path / "files"
    before = clone.image.read_bytes()
    if spoil != "no directory":
        folder.mkdir()
        for path in server_files.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    match spoil:
        case "no key":
            (folder / "server-key.pem").unlink()
        case "garbage":
            (folder / "server-cert.pem").write_bytes(os.urandom(500))
        case "other key":
            other = (client_files / "client-key.pem").read_bytes()
            (folder / "server-key.pem").write_bytes(other)
        case "no authority":
            (folder / "ca-cert.pem").unlink()
        case "empty authority":
            (folder / "ca-cert.pem").write_bytes(b"")
    options = ("--tls-certificates", str(folder), "--tls-verify-peer")
    answer = refused(clone.image, "--tcp", "127.0.0.1:0", *options)
    assert said in answer
    assert "hint: " in answer
    assert clone.image.read_bytes() == before


@pytest.mark.parametrize("text", ["", "alice\n", "alice:xyz\n", ":" + KEY, "alice:0011\n"])
def test_bad_keys_are_refused(clone: World, tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    answer = refused(clone.image, "--tcp", "127.0.0.1:0", "--tls-psk", str(path))
    assert str(path) in answer
    assert "hint: " in answer


@pytest.mark.parametrize(
    "options",
    [("--tls-verify-peer",), ("--tls-psk", "x", "--tls-certificates", "y")],
    ids=["verify", "both"],
)
def test_options_that_make_no_sense(clone: World, options: tuple[str, ...]) -> None:
    assert "--tls-certificates" in refused(clone.image, "--tcp", "127.0.0.1:0", *options)
