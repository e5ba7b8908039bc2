# SPDX-License-Identifier: Apache-2.0
"""Reading parts of files from web servers: what counts as an answer, and until when."""

import base64
import contextlib
import http.server
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from fvdcore import EngineFault
from fvdengine import children, remote, uris, web, web_export
from fvdengine.create import create_image
from fvdengine.opening import open_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions
from fvdengine.web_export import File, Site, Unfit
from fvdtest.nbd_client import NbdClient, NbdError
from fvdtest.tools import wait_until

SIZE = 1 << 20
BLOCK = 4096
PACE = 0.05  # between the bytes of a server that drips


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves parts of server.content; server.mode names a misdeed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def setup(self):
        super().setup()
        self.server.connections.append(self)
        self.answers = 0

    def do_GET(self):
        server, mode = self.server, self.server.mode
        server.asked.append(dict(self.headers))
        if mode == "hang up" and self.answers:
            self.close_connection = True
            return
        self.answers += 1
        if mode == "drip head":
            self.wfile.write(b"HTTP/1.1 206 Partial\r\nX: ")
            self.drip(b"a" * 10000)
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = int(first), int(last)
        data, total = server.content[first : last + 1], str(len(server.content))
        status, place = 206, f"bytes {first}-{last}/"
        headers = {"ETag": server.tag, "Last-Modified": server.time}
        if self.headers.get("If-Match", server.tag) != server.tag:
            status, data = 412, b""
        elif mode == "whole":
            status, data = 200, server.content
        elif mode in ("403", "302"):
            status, headers = int(mode), {"Location": "/other"}
        elif mode == "shifted":
            place = f"bytes {first + 512}-{last + 512}/"
        elif mode == "fewer":
            data, place = data[:-1], f"bytes {first}-{last - 1}/"
        elif mode == "unknown total":
            total = "*"
        elif mode == "less":
            data = data[:-1]
        elif mode == "more":
            data += b"x"
        elif mode == "gzip":
            headers["Content-Encoding"] = "gzip"
        headers = {"Content-Range": place + total, **headers}
        self.answer(status, headers, data)

    def answer(self, status, headers, data):
        mode = self.server.mode
        self.send_response(status, "\033[31mPlease")
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if mode == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (data[:100], data[100:]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if part else b"")
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if mode == "drip body":
            self.drip(data)
        elif mode == "break off":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)
        self.close_connection |= mode == "close when idle"

    def drip(self, data):
        self.close_connection = True
        for i in range(len(data)):
            try:
                self.wfile.write(data[i : i + 1])
            except OSError:
                return
            if self.server.ending.wait(PACE):
                return


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *what: None  # readers leave in the middle of bad answers
    server.content, server.tag, server.time = random.Random(5).randbytes(SIZE), '"one"', "today"
    server.mode, server.asked, server.connections = "good", [], []
    server.ending = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.uri = f"http://127.0.0.1:{server.server_port}/golden"
    yield server
    server.ending.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def file(site):
    opened = File(Site(site.uri))
    yield opened
    opened.site.close()


def read(file, offset=SIZE // 2, length=BLOCK):
    buffer = bytearray(length)
    file.read(memoryview(buffer), offset)
    return bytes(buffer)


def test_parts_come_over_one_connection(site, file):
    for offset in (0, 512, SIZE // 2, SIZE - BLOCK):
        assert read(file, offset) == site.content[offset : offset + BLOCK]
    assert read(file, 0, SIZE) == site.content
    assert len(site.connections) == 1
    assert site.asked[-1]["Accept-Encoding"] == "identity"
    assert site.asked[-1]["If-Match"] == '"one"'


def test_an_answer_in_chunks_is_one(site, file):
    site.mode = "chunks"
    for offset in (0, 512):
        assert read(file, offset) == site.content[offset : offset + BLOCK]
    assert len(site.connections) == 1


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("whole", "answers 200 with all of it"), ("403", r"says 403 \?\[31mPlease"),
        ("302", r"redirects \(302\)"), ("shifted", "bytes 524800-528895/1048576 to bytes 524288"),
        ("fewer", "as they are asked for"), ("unknown total", "as they are asked for"),
        ("less", "4095 bytes of 4096"), ("more", "4097 bytes of 4096"),
        ("break off", "ends after 2048 bytes of 4096"), ("gzip", "encodes the file: gzip"),
    ],
)  # fmt: skip
def test_what_is_no_answer(site, file, mode, problem):
    site.mode = mode
    with pytest.raises(Unfit, match=problem):
        read(file)
    site.mode = "good"
    assert read(file) == site.content[SIZE // 2 :][:BLOCK]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tag": '"two"'}, "412"), ({"tag": "", "time": "tomorrow"}, "412"),
        ({"content": bytes(SIZE + 512)}, "1049088 bytes, it had 1048576"),
    ],
)  # fmt: skip
def test_another_file_is_none(site, file, change, problem):
    for name, value in change.items():
        setattr(site, name, value)
    with pytest.raises(Unfit, match=f"replaced: .*{problem}"):
        read(file)


@pytest.mark.parametrize("tag", ['W/"one"', ""])
def test_a_tag_that_the_server_cannot_be_asked_for_is_compared(site, tag):
    site.tag = tag
    file = File(Site(site.uri))
    assert read(file) == site.content[SIZE // 2 :][:BLOCK]
    assert "If-Match" not in site.asked[-1]
    site.tag, site.time = tag and 'W/"two"', "tomorrow"
    with pytest.raises(Unfit, match="replaced: its tag is"):
        read(file)
    file.site.close()


def test_a_file_is_opened_only_as_the_one_it_was(site):
    wanted = remote.identity('"one"', SIZE).hex()
    assert web_export.identity('"one"', SIZE) == wanted
    File(Site(site.uri), SIZE, wanted).site.close()
    with pytest.raises(Unfit, match="it has 1048576 bytes, it had 512"):
        File(Site(site.uri), 512)
    site.tag = '"two"'
    with pytest.raises(Unfit, match="replaced: its tag is"):
        File(Site(site.uri), SIZE, wanted)


@pytest.mark.parametrize("mode", ["close when idle", "hang up"])
def test_a_connection_that_was_idle_is_made_anew_once(site, file, mode):
    site.mode = mode
    for _ in range(3):
        assert read(file) == site.content[SIZE // 2 :][:BLOCK]
    assert len(site.connections) >= 3


def test_a_server_that_has_gone_is_an_error(site, file):
    site.shutdown()
    site.server_close()
    for handler in site.connections:
        handler.connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConnectionRefusedError):
        read(file)


@pytest.mark.parametrize("mode", ["drip head", "drip body"])
def test_a_server_that_drips_is_bounded(site, file, mode, monkeypatch):
    monkeypatch.setattr(web_export, "SECONDS", 0.2)
    site.mode = mode
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="in time"):
        read(file)
    assert time.monotonic() - begin < 0.2 + BLOCK / web_export.SLOWEST + 2


def test_asking_is_bounded(site):
    site.mode = "drip head"
    begin = time.monotonic()
    assert "in time" in web.ask(uris.parse_uri(site.uri), 0.3).problem
    assert time.monotonic() - begin < 2.3


def test_a_name_that_nobody_resolves_is_bounded(monkeypatch):
    ending = threading.Event()
    real = socket.getaddrinfo

    def hang(*words, **more):
        if more.get("flags"):
            return real(*words, **more)
        ending.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert "address of far.example" in web.ask(uris.parse_uri("http://far.example/x"), 0.2).problem
    ending.set()


def test_credentials_are_sent_with_each_request(site, tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("pass:word\n")
    monkeypatch.setenv("FVD_HTTP_USER", "me")
    file = File(Site(site.uri, password_file=str(secret)))
    read(file)
    file.site.close()
    wanted = "Basic " + base64.b64encode(b"me:pass:word").decode()
    assert [asked["Authorization"] for asked in site.asked] == [wanted] * 2


def test_parallel_readers_share_few_connections(site, file):
    wrong = []

    def reader(seed):
        rng = random.Random(seed)
        for _ in range(10):
            offset = rng.randrange(SIZE - BLOCK)
            if read(file, offset) != site.content[offset : offset + BLOCK]:
                wrong.append(offset)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(site.connections) <= web_export.CONNECTIONS


# -- through nbdkit --------------------------------------------------------------------------------


def test_the_export_says_in_its_log_why_a_read_fails(site):
    child = children.start_child(lambda name: web.nbdkit_argv(name, uris.parse_uri(site.uri)))
    try:
        wait_until(lambda: os.path.exists(child.socket), "nbdkit")
        with NbdClient.attach(child.uri) as client:
            assert client.read(BLOCK, BLOCK) == site.content[BLOCK : 2 * BLOCK]
            site.mode = "whole"
            with pytest.raises(NbdError):
                client.read(BLOCK, BLOCK)
            assert "answers 200 with all of it" in child.last_words()
            site.mode = "good"
            assert client.read(BLOCK, BLOCK) == site.content[BLOCK : 2 * BLOCK]
    finally:
        os.close(child.keeper)


def nbdkit_of(site):
    """The process that reads this site, 0 if there is none."""
    wanted = f"\0uri={site.uri}\0".encode()
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if wanted in words.read_bytes():
                return int(words.parent.name)
    return 0


def wait_for(device, length):
    """Read from the beginning as soon as the engine has reached the server again."""
    found = []

    def succeeds():
        try:
            found.append(device.read(0, length))
        except EngineFault:
            return False
        return True

    wait_until(succeeds, "the base")
    return found[0]


def test_a_clone_takes_no_wrong_data(site, tmp_path):
    """A server that begins to answer with all of the file, and one that replaces it."""
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=site.uri, copy_on_read=True))
    allowed = OpenOptions(allow_uris=(site.uri,), base_timeout=0.5)
    with open_plan(clone, allowed) as plan:
        assert plan.warnings == []
        device = open_device(plan)
    truth = site.content
    assert wait_for(device, BLOCK) == truth[:BLOCK]
    site.mode = "whole"
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(SIZE // 2, BLOCK)
    site.mode, site.tag, site.content = "good", '"two"', bytes(SIZE)
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(SIZE // 2, BLOCK)
    asked = len(site.asked)
    os.kill(nbdkit_of(site), signal.SIGKILL)
    wait_until(lambda: len(site.asked) > asked, "another nbdkit")
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(SIZE // 2, BLOCK)
    site.tag, site.content = '"one"', truth
    assert wait_for(device, SIZE) == truth
    device.close()
    wait_until(lambda: not nbdkit_of(site), "nbdkit's end")


def test_a_base_that_could_not_be_asked_must_be_the_one_it_was(site, tmp_path, monkeypatch):
    clone = tmp_path / "clone.fvd"
    create_image(clone, CreateOptions(base=site.uri))
    allowed = OpenOptions(read_only=True, allow_uris=(site.uri,), base_timeout=0.5)
    with monkeypatch.context() as away:
        away.setattr(web, "ask", lambda uri, seconds: web.Answer(problem="away"))
        with open_plan(clone, allowed) as plan:
            device = open_device(plan)
    truth, asked = site.content, len(site.asked)
    site.tag, site.content = '"two"', bytes(SIZE)
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(0, BLOCK)
    wait_until(lambda: len(site.asked) > asked, "nbdkit")
    with pytest.raises(EngineFault, match="Input/output error"):
        device.read(0, BLOCK)
    site.tag, site.content = '"one"', truth
    assert wait_for(device, BLOCK) == truth[:BLOCK]
    device.close()
    wait_until(lambda: not nbdkit_of(site), "nbdkit's end")
