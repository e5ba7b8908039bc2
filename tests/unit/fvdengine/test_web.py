# SPDX-License-Identifier: Apache-2.0
"""Bases on web servers: a real one for Python's client and nbdkit, and what bad ones answer."""

import base64
import contextlib
import http.server
import os
import random
import ssl
import threading

import pytest

from fvdengine import uris, web
from fvdengine.create import create_image
from fvdengine.errors import BaseChanged, BaseUnreachable, ProgramMissing
from fvdengine.header import Header
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions
from fvdtest.certificates import Authority

SIZE = 2 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content with ranges and an ETag; the path chooses a misdeed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        data = self.server.content
        if self.path == "/redirect":
            return self.answer(302, [("Location", "/golden")], b"")
        if self.path == "/absent":
            return self.answer(404, [], b"none")
        if self.path == "/private" and "Authorization" not in self.headers:
            return self.answer(401, [("WWW-Authenticate", 'Basic realm="x"')], b"no")
        if self.path == "/whole":
            return self.answer(200, [], data[:100])
        if self.path == "/nonsense":
            return self.answer(206, [("Content-Range", "bytes 0-0/*")], b"x")
        first, last = 0, len(data) - 1
        asked = self.headers.get("Range")
        if asked is None:
            return self.answer(200, [("Accept-Ranges", "bytes"), ("ETag", self.server.tag)], data)
        first, _, end = asked.removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(end or last), last)
        place = f"bytes {first}-{last}/{len(data)}"
        headers = [("Content-Range", place), ("ETag", self.server.tag)]
        return self.answer(206, headers, data[first : last + 1])

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(scheme, context=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.content, server.tag, server.asked = random.Random(5).randbytes(SIZE), '"one"', []
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.uri = f"{scheme}://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def site():
    with serving("http") as server:
        yield server


@pytest.fixture
def allowed(site):
    return OpenOptions(read_only=True, allow_uris=(site.uri,), base_timeout=20.0)


def test_a_clone_reads_from_a_web_server(site, allowed, tmp_path):
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=f"{site.uri}/golden"))
    header = Header.unpack(clone.read_bytes()[:8192])
    assert header.extension.base_length == SIZE
    with open_plan(clone, allowed) as plan:
        assert plan.warnings == []
        device = open_device(plan)
    assert device.read(0, SIZE) == site.content
    device.close()


def test_a_web_server_is_trusted_by_its_certificate_alone(tmp_path, monkeypatch):
    folder = Authority(tmp_path / "ca").sign("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    clone = tmp_path / "clone.fvd"
    with serving("https", context) as site:
        with pytest.raises(BaseUnreachable, match="certificate"):
            create_image(clone, CreateOptions(base=f"{site.uri}/golden"))
        monkeypatch.setenv("FVD_HTTP_CAINFO", str(folder / "ca-cert.pem"))
        create_image(clone, CreateOptions(base=f"{site.uri}/golden"))
        with open_plan(clone, OpenOptions(read_only=True, allow_uris=(site.uri,))) as plan:
            device = open_device(plan)
        assert device.read(0, SIZE) == site.content
        device.close()


def test_another_etag_is_another_base(site, allowed, tmp_path):
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=f"{site.uri}/golden"))
    site.tag = '"two"'
    with pytest.raises(BaseChanged, match="another version"):
        open_plan(clone, allowed)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/absent", "404"), ("/redirect", "final address"), ("/private", "401"),
        ("/whole", "parts of a file"), ("/nonsense", "parts of a file"),
    ],
)  # fmt: skip
def test_answers_that_are_of_no_use(site, tmp_path, path, reason):
    with pytest.raises(BaseUnreachable, match=reason):
        create_image(tmp_path / "x.fvd", CreateOptions(base=site.uri + path))
    assert not (tmp_path / "x.fvd").exists()


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(BaseUnreachable, match="refused"):
        create_image(tmp_path / "x.fvd", CreateOptions(base="http://127.0.0.1:1/x"))


def test_credentials_come_from_a_file(site, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("pass:word\n")
    monkeypatch.setenv("FVD_HTTP_USER", "me")
    monkeypatch.setenv("FVD_HTTP_PASSWORD_FILE", str(secret))
    answer = web.ask(uris.parse_uri(f"{site.uri}/private"), 5.0)
    assert answer.length == SIZE
    expected = "Basic " + base64.b64encode(b"me:pass:word").decode()
    assert site.asked[-1][2]["Authorization"] == expected
    words = web.nbdkit_argv("/s", uris.parse_uri(f"{site.uri}/private"))
    assert f"password-file={secret}" in words
    assert not any("pass:word" in word or "=me" in word for word in words)


def test_a_query_is_sent_and_not_shown(site, tmp_path):
    with pytest.raises(BaseUnreachable) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base="http://127.0.0.1:1/x?secret=1"))
    assert "secret" not in caught.value.message
    web.ask(uris.parse_uri(f"{site.uri}/golden?a=b"), 5.0)
    assert site.asked[-1][1] == "/golden?a=b"


def test_what_nbdkit_is_told(monkeypatch):
    monkeypatch.setenv("FVD_SSH_IDENTITY", "/keys/id")
    words = web.nbdkit_argv("/s", uris.parse_uri("ssh://me@host:222/a%20b"))
    assert words[-6:] == [
        "ssh", "host=host", "path=/a b", "user=me", "port=222", "identity=/keys/id",
    ]  # fmt: skip
    monkeypatch.setenv("FVD_HTTP_CAINFO", "ca.pem")
    words = web.nbdkit_argv("/s", uris.parse_uri("https://host/x?y=z"), 512, "ab")
    assert words[-5:] == [
        web.SCRIPT, "uri=https://host/x?y=z", "length=512", "identity=ab",
        f"cainfo={os.path.abspath('ca.pem')}",
    ]  # fmt: skip


def test_a_missing_nbdkit_names_its_package(monkeypatch):
    monkeypatch.setattr("fvdengine.children.shutil.which", lambda program: None)
    with pytest.raises(ProgramMissing, match="nbdkit"):
        web.nbdkit_argv("/s", uris.parse_uri("https://host/x"))


def test_a_missing_plugin_names_its_package(monkeypatch, tmp_path):
    plain = tmp_path / "nbdkit"
    plain.write_text("#!/bin/sh\nexit 1\n")
    plain.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing) as missing:
        web.nbdkit_argv("/s", uris.parse_uri("https://host/x"))
    assert "nbdkit-plugin-python" in missing.value.hint


def test_an_ssh_base_that_cannot_be_reached_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("fvdengine.remote.CREATE_SECONDS", 6.0)
    with pytest.raises(BaseUnreachable) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base="ssh://127.0.0.1:1/x"))
    assert "refused" in caught.value.message
    assert os.listdir(tmp_path) == []
