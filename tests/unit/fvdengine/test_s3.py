# SPDX-License-Identifier: Apache-2.0
"""Bases in S3: a small server that speaks enough of it, boto3 and nbdkit as they are installed."""

import http.server
import os
import random
import threading

import pytest

from fvdengine import s3, uris
from fvdengine.children import start_child
from fvdengine.create import create_image
from fvdengine.errors import BaseChanged, BaseUnreachable, InvalidUri, ProgramMissing
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions
from fvdtest.nbd_client import NbdClient, NbdError
from fvdtest.tools import wait_until

SIZE = 512 << 10
BLOCK = 4096
NAME = "/golden/debian%2012.raw"

pytestmark = pytest.mark.timeout(120)


class Handler(http.server.BaseHTTPRequestHandler):
    """One object, as server.content and server.tag say; no requests without a signature unless
    server.is_public."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        data = self.server.content
        has_signature = "Credential=me/" in self.headers.get("Authorization", "")
        if not (has_signature or self.server.is_public):
            return self.answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
        if self.path != NAME or data is None:
            return self.answer(404, [], b"<Error><Code>NoSuchKey</Code></Error>")
        headers = [("ETag", self.server.tag)]
        if self.headers.get("If-Match", self.server.tag) != self.server.tag:
            return self.answer(412, [], b"<Error><Code>PreconditionFailed</Code></Error>")
        asked = self.headers.get("Range")
        if asked is None:
            return self.answer(200, headers, data)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last), len(data) - 1)
        headers.append(("Content-Range", f"bytes {first}-{last}/{len(data)}"))
        return self.answer(206, headers, data[first : last + 1])

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def store(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.content, server.tag, server.asked = random.Random(5).randbytes(SIZE), '"one"', []
    server.is_public = False
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("FVD_S3_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


URI = f"s3:/{NAME}"
ALLOWED = OpenOptions(read_only=True, allow_uris=("s3://golden",), base_timeout=60.0)


@pytest.mark.proof  # boto3 takes seconds to load
def test_a_clone_reads_an_object_and_knows_it(store, tmp_path):
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=URI))
    with open_plan(clone, ALLOWED) as plan:
        assert plan.warnings == []
        device = open_device(plan)
    assert device.read(0, SIZE) == store.content
    device.close()
    store.tag = '"two"'
    with pytest.raises(BaseChanged, match="another version"):
        open_plan(clone, ALLOWED)


@pytest.mark.proof  # boto3 takes seconds to load
def test_nothing_is_read_of_another_object_nor_zeros_where_it_was_removed(store):
    child = start_child(lambda socket: s3.nbdkit_argv(socket, uris.parse_uri(URI), store.tag))
    try:
        wait_until(lambda: os.path.exists(child.socket), "nbdkit")
        with NbdClient.attach(f"nbd+unix:///?socket={child.socket}") as client:
            content, store.content = store.content, None
            with pytest.raises(NbdError):
                client.read(0, BLOCK)
            store.content, store.tag = bytes(SIZE), '"two"'
            with pytest.raises(NbdError):
                client.read(0, BLOCK)
            store.content, store.tag = content, '"one"'
            assert client.read(0, BLOCK) == content[:BLOCK]
    finally:
        os.close(child.keeper)


@pytest.mark.proof  # boto3 takes seconds to load
def test_a_public_object_needs_no_credentials(store, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store.is_public = True
    assert s3.ask(uris.parse_uri(URI), 5.0).length == SIZE
    assert "Authorization" not in store.asked[-1][2]


@pytest.mark.proof  # boto3 takes seconds to load
def test_an_object_that_is_not_there_leaves_nothing(store, tmp_path):
    with pytest.raises(BaseUnreachable, match="404"):
        create_image(tmp_path / "x.fvd", CreateOptions(base="s3://golden/other"))
    assert not (tmp_path / "x.fvd").exists()


def test_no_secret_is_on_a_command_line(store):
    words = s3.nbdkit_argv("/s", uris.parse_uri(URI), '"one"')
    assert words[-3:] == ["bucket=golden", "key=debian 12.raw", 'tag="one"']
    assert not any("secret" in word for word in words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://bucket", "names no object"), ("s3://bucket/", "names no object"),
        ("s3://bucket:9/x", "no port"), ("s3://me:secret@bucket/x", "password"),
        ("s3://bucket/x?versionId=1", "parameters"), ("s3:///x", "names no host"),
    ],
)  # fmt: skip
def test_bad_names_are_refused(text, reason):
    with pytest.raises(InvalidUri, match=reason):
        uris.parse_uri(text)


def test_what_is_missing_names_its_package(monkeypatch, tmp_path):
    bare = tmp_path / "s3_export.py"
    bare.write_text("import boto9\n")
    monkeypatch.setattr("fvdengine.s3.SCRIPT", str(bare))
    with pytest.raises(ProgramMissing) as missing:
        s3.ask(uris.parse_uri(URI), 1.0)
    assert "python3-boto3" in missing.value.hint
    plain = tmp_path / "nbdkit"
    plain.write_text("#!/bin/sh\nexit 1\n")
    plain.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ProgramMissing) as missing:
        s3.nbdkit_argv("/s", uris.parse_uri(URI), "")
    assert "nbdkit-plugin-python" in missing.value.hint
