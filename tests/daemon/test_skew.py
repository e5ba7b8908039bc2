# SPDX-License-Identifier: Apache-2.0
"""Versions that meet in an upgrade: each works with the other, or says what has to be restarted.

fvdctl is always the installed version; fvdd and workers may be older, until they are restarted and
upgraded. What the first version said and understood is recorded in tests/fixtures/skew. Here the
first fvdd answers today's fvdctl, the first fvdctl asks today's fvdd, and so do fvdd and workers.
"""

import asyncio
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler

import httpx
import pytest

from fvdapi.errors import ApiError
from fvdd.devices.supervise import as_api_error
from fvdd.worker.channel import Channel
from fvdd.worker.client import WorkerError, WorkerProcess
from fvdtest import tree
from fvdtest.daemon import fvdctl

RECORDED = tree.ROOT / "tests/fixtures/skew"
API = json.loads((RECORDED / "first_api.json").read_text())
WORKER = json.loads((RECORDED / "first_worker.json").read_text())
LIMIT = 30.0


# The first fvdd, today's fvdctl.


class _FirstDaemon(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"null")
        status, answer = API["answers"].get(f"{self.command} {self.path}", (404, None))
        unknown = set(body or ()) - set(self.server.fields.get(self.path, body or ()))
        if unknown:
            text = f"the request is not valid: {unknown.pop()}: Extra inputs are not permitted"
            status, answer = 422, _refusal("invalid_request", text)
        elif answer is None:
            answer = _refusal("not_found", f"{self.command} {self.path}: no such address")
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _answer

    def address_string(self):
        return "client"

    def log_message(self, *arguments):
        pass


def _refusal(code, message):
    return {"error": {"code": code, "message": message, "hint": "", "details": {}}}


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def first_daemon(tmp_path):
    path = tmp_path / "fvdd.sock"
    server = _Server(str(path), _FirstDaemon)
    fields = API["asked_fields"]
    server.fields = {"/v1/devices": fields["attach"], "/v1/devices/web/prefetch": ["action"]}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], "/dev/nbd0"),
        (["status", "web"], "/srv/web.fvd"),
        (["status", "web", "--json"], '"name": "web"'),
        (["detach", "web"], ""),
        (["prefetch", "web", "pause"], ""),
        (["doctor"], "nbd"),
        (["attach", "IMAGE", "--name", "web", "--connections", "2"], "/dev/nbd0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_the_first_daemon_knows_works(first_daemon, tmp_path, words, said):
    (tmp_path / "web.fvd").touch()
    words = [str(tmp_path / "web.fvd") if word == "IMAGE" else word for word in words]
    assert said in fvdctl(*words, socket=first_daemon).stdout


@pytest.mark.parametrize(
    "words",
    [
        ["upgrade", "web"], ["recover", "web"], ["snapshot", "web", "/srv/new.fvd"],
        ["resize", "web", "2G"], ["doctor", "--reclaim"],
        ["attach", "IMAGE", "--allow-uri", "nbd://golden.example.org"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_it_does_not_know_says_what_to_restart(first_daemon, tmp_path, words):
    (tmp_path / "web.fvd").touch()
    words = [str(tmp_path / "web.fvd") if word == "IMAGE" else word for word in words]
    done = fvdctl(*words, socket=first_daemon, check=False)
    assert done.returncode == 7
    lines = done.stderr.splitlines()
    assert lines[0].startswith("fvdctl: fvdd is older than fvdctl")
    assert "systemctl restart fvdd" in lines[1]
    assert len(lines) == 2


# Today's fvdd, the first fvdctl.


def test_what_the_first_fvdctl_asks_is_answered_with_all_it_needs(daemon, clone):
    image, _ = clone()
    transport = httpx.HTTPTransport(uds=str(daemon.socket))
    with httpx.Client(transport=transport, base_url="http://fvdd", timeout=LIMIT) as http:
        for method, address, body, status, name in API["requests"]:
            if body is not None and "image" in body:
                body = {**body, "image": str(image)}
            answer = http.request(method, address, json=body)
            assert answer.status_code == status, answer.text
            given = answer.json()
            assert set(API["required"][name]) <= set(given)
            if name == "DeviceList":
                assert set(API["required"]["DeviceStatus"]) <= set(given["devices"][0])
            if name == "DeviceStatus":
                # It showed more than it needed, and a field that is gone would be shown as 0.
                assert set(API["fields"][name]) <= set(given)


# Today's worker, the first fvdd.


def test_what_the_first_daemon_says_to_its_workers_is_understood(clone, tmp_path):
    image, _ = clone()
    directory = tmp_path / "device"
    directory.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = {"FD": str(theirs.fileno()), "DIR": str(directory), "IMAGE": str(image)}
    words = [names.get(word, word) for word in WORKER["spawned_with"]]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fvdd.worker", *words], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    ours.settimeout(LIMIT)
    try:
        for number, (op, arguments, read) in enumerate(WORKER["asked"]):
            filled = {k: names.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
            ours.send(json.dumps({"id": number, "op": op, **filled}).encode())
            answer = {}
            while answer.get("id") != number:  # events come in between
                answer = json.loads(ours.recv(1 << 17))
            assert answer["ok"], answer
            assert set(read) <= set(answer)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
        ours.close()


# Today's fvdd, the first worker.


async def _first_worker(listener):
    """Answer as that version did: ping, and for what it did not know, that it did not know it."""
    loop = asyncio.get_running_loop()
    sock, _ = await loop.sock_accept(listener)
    channel = Channel(sock)
    while (packet := await channel.receive()) is not None:
        message, _ = packet
        answer = {"id": message["id"], "ok": True, "pid": os.getpid(), **WORKER["pinged"]}
        if message["op"] not in WORKER["knew"]:
            told = WORKER["refused"]["message"].replace("OP", str(message["op"]))
            error = WORKER["refused"] | {"message": told}
            answer = {"id": message["id"], "ok": False, "error": error}
        await channel.send(answer)
    channel.close()


@pytest.mark.parametrize("op", ["resize", "hand_over", "map", "resume"])
def test_what_the_first_worker_does_not_know_says_what_to_replace(tmp_path, op):
    async def scenario() -> ApiError:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        listener.setblocking(False)
        serving = asyncio.create_task(_first_worker(listener))
        worker = await WorkerProcess.connect(str(tmp_path / "control.sock"))
        try:
            # Unknown arguments were, and are, passed over.
            assert (await worker.request("ping", timeout=LIMIT, news=True))["open"] is True
            with pytest.raises(WorkerError) as caught:
                await worker.request(op, timeout=LIMIT)
            return as_api_error(caught.value)
        finally:
            await worker.close()
            await serving
            listener.close()

    error = asyncio.run(scenario())
    assert error.code == "worker_outdated"
    assert "older than fvdd" in error.message
    assert "fvdctl upgrade" in error.hint
