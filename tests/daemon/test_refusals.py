# SPDX-License-Identifier: Apache-2.0
"""What cannot be done: one sentence, a remedy, a status for scripts, and nothing changed."""

import errno
import json
import os
import re
import socket
import subprocess
import sys

import httpx
import pytest

from fvdapi.errors import ApiError
from fvdd.devices.registry import StateDirectory
from fvdtest.daemon import FVDCTL, Program, fvdctl

HAS_NBD = os.path.isdir("/sys/module/nbd")


def refusal(done: subprocess.CompletedProcess[str], status: int) -> str:
    """Check the form of a refusal and return its sentence."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("fvdctl: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert "Traceback" not in done.stderr
    return lines[0]


ONLINE = (
    ["attach", "/tmp/none.fvd"], ["detach", "web"], ["list"], ["status"], ["status", "web"],
    ["prefetch", "web", "wait"], ["metrics"],
)  # fmt: skip


@pytest.mark.parametrize("words", ONLINE, ids=lambda words: words[0] + str(len(words)))
def test_without_a_daemon(tmp_path, words):
    sentence = refusal(fvdctl(*words, socket=tmp_path / "none", check=False), 7)
    assert "fvdd is not running" in sentence


def test_doctor_works_without_a_daemon(tmp_path):
    done = fvdctl("doctor", "--json", socket=tmp_path / "none", check=False)
    report = json.loads(done.stdout)
    by_topic = {finding["topic"]: finding for finding in report["findings"]}
    assert by_topic["fvdd"]["level"] == "warning"
    assert "nbd" in by_topic
    assert all(f["remedy"] for f in report["findings"] if f["level"] != "ok")
    assert done.returncode == (6 if report["problems"] else 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_without_permission(program, tmp_path):
    # The socket's own mode is what refuses: every folder above is made passable.
    folder = tmp_path
    while folder != folder.parent:
        if folder.stat().st_mode & 0o001 == 0:
            os.chmod(folder, folder.stat().st_mode | 0o011)
        folder = folder.parent
    script = (
        "import os,sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "from fvdctl.main import main; sys.exit(main(['list']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "FVDD_SOCKET": str(program.socket)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "no permission" in refusal(done, 7)


@pytest.mark.skipif(HAS_NBD, reason="this kernel has nbd")
def test_attach_says_what_is_missing_without_nbd(program, clone):
    image, _ = clone()
    before = image.read_bytes()
    sentence = refusal(program.ctl("attach", image, check=False), 6)
    assert "nbd" in sentence
    assert image.read_bytes() == before
    assert not list((program.state / "devices").iterdir())
    report = json.loads(program.ctl("doctor", "--json", check=False).stdout)
    (finding,) = [entry for entry in report["findings"] if entry["topic"] == "nbd"]
    assert finding["level"] == "problem"
    assert finding["code"] == "nbd_module_missing"
    assert finding["message"] in sentence


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "image_not_found"), (b"", "not_an_image"), (b"\x07" * 65536, "not_an_image")],
    ids=["missing", "empty", "foreign"],
)
def test_what_is_no_image(daemon, tmp_path, content, code):
    path = tmp_path / "thing.fvd"
    if content is not None:
        path.write_bytes(content)
    done = daemon.ctl("attach", path, check=False)
    assert str(path) in refusal(done, 4 if code == "image_not_found" else 1)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.socket))) as http:
        answer = http.post("http://fvdd/v1/devices", json={"image": str(path)})
    assert answer.json()["error"]["code"] == code
    assert not list((daemon.state / "devices").iterdir())
    if content is not None:
        assert path.read_bytes() == content


def test_base_is_missing(daemon, clone):
    image, _ = clone()
    before = image.read_bytes()
    (image.parent / "base.raw").unlink()
    assert "base" in refusal(daemon.ctl("attach", image, check=False), 1)
    assert image.read_bytes() == before
    assert daemon.transport.disks == {}


def test_image_is_served_elsewhere(daemon, clone, tmp_path):
    image, _ = clone()
    server = subprocess.Popen(
        [*FVDCTL, "serve", str(image), "--socket", str(tmp_path / "nbd.sock")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline()
        sentence = refusal(daemon.ctl("attach", image, check=False), 5)
        assert f"process {server.pid}" in sentence
    finally:
        server.terminate()
        server.wait(30)
        assert server.stdout is not None
        server.stdout.close()


def test_image_is_attached_already(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    sentence = refusal(daemon.ctl("attach", image, "--name", "again", check=False), 5)
    assert "attached already as web (/dev/nbd0)" in sentence


def test_name_and_device_are_taken(daemon, clone):
    daemon.attach(clone("one")[0], "--device", "/dev/nbd4")
    image, _ = clone("two")
    refusal(daemon.ctl("attach", image, "--name", "one", check=False), 5)
    sentence = refusal(daemon.ctl("attach", image, "--device", "/dev/nbd4", check=False), 5)
    assert "/dev/nbd4 is in use" in sentence
    # The failed attaches left nothing behind.
    daemon.attach(image)
    assert [entry.name for entry in (daemon.state / "devices").iterdir()] != []


def test_name_of_another_devices_partition_is_refused(daemon, clone):
    image, _ = clone("disk-part1")
    sentence = refusal(daemon.ctl("attach", image, "--name", "disk-part1", check=False), 1)
    assert "so partition 1 of a device 'disk' is called in /dev/fvd" in sentence
    daemon.attach(image)
    assert daemon.device("disk_part1").image == str(image)


def test_size_that_does_not_fit_the_sectors(daemon, tmp_path):
    image = tmp_path / "odd.fvd"
    fvdctl("create", image, str((1 << 20) + 512))
    sentence = refusal(daemon.ctl("attach", image, "--sector-size", "4096", check=False), 1)
    assert "not a multiple of the sector size 4096" in sentence
    assert daemon.attach(image).spec.size_bytes == (1 << 20) + 512


@pytest.mark.parametrize("words", [["detach", "nobody"], ["status", "nobody"], ["status", "/x"]])
def test_unknown_device(daemon, words):
    refusal(daemon.ctl(*words, check=False), 4)


@pytest.mark.parametrize(
    "words",
    [
        ["attach", "/x", "--connections", "0"],
        ["attach", "/x", "--sector-size", "1000"],
        ["attach", "/x", "--device", "/dev/sda"],
        ["attach", "/x", "--name", "a/b"],
        ["attach", "/x", "--prefetch-delay", "soon"],
        ["prefetch", "web", "stop"],
        ["prefetch", "web", "start", "--timeout", "3"],
    ],
    ids=lambda words: words[-2].lstrip("-"),
)
def test_wrong_usage(tmp_path, words):
    done = fvdctl(*words, socket=tmp_path / "none", check=False)
    assert done.returncode == 1
    assert "fvdctl: " in done.stderr
    assert "not running" not in done.stderr


# The API itself


@pytest.fixture
def http(daemon):
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(daemon.socket)), base_url="http://fvdd", timeout=30
    ) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "address", "options", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("PUT", "/v1/devices", {}, 405, "method_not_allowed"),
        ("POST", "/v1/devices", {"content": b"{"}, 422, "invalid_request"),
        ("POST", "/v1/devices", {"json": []}, 422, "invalid_request"),
        ("POST", "/v1/devices", {"json": {"image": "rel"}}, 422, "invalid_request"),
        ("POST", "/v1/devices", {"json": {"image": "/a", "x": 1}}, 422, "invalid_request"),
        ("POST", "/v1/devices/web/prefetch", {"json": {"action": "go"}}, 422, "invalid_request"),
        (
            "POST",
            "/v1/devices/web/prefetch",
            {"json": {"action": "start"}},
            404,
            "device_not_found",
        ),
        ("GET", "/v1/devices/..%2Fetc", {}, 404, "not_found"),
        ("DELETE", "/v1/devices/%00", {}, 404, "device_not_found"),
    ],
)
def test_wrong_calls_get_the_form_of_errors(http, method, address, options, status, code):
    answer = http.request(method, address, **options)
    assert answer.status_code == status
    body = answer.json()
    assert list(body) == ["error"]
    assert body["error"]["code"] == code
    assert body["error"]["message"]


@pytest.mark.parametrize("is_told", [True, False])
def test_endless_body_is_refused_and_not_kept(daemon, is_told):
    length = 8 << 20
    body = bytes(length) if is_told else (bytes(1 << 20) for _ in range(length >> 20))
    transport = httpx.HTTPTransport(uds=str(daemon.socket))
    with httpx.Client(transport=transport, base_url="http://fvdd", timeout=30) as http:
        answer = http.post("/v1/devices", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert http.get("/healthz").status_code == 200


def test_garbage_on_the_socket_disturbs_nobody(daemon):
    for data in (b"\x00" * 100, b"GET\r\n\r\n", b"POST /v1/devices HTTP/1.1\r\nContent-Length: 5"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(daemon.socket))
            sock.sendall(data)
    assert daemon.ctl("list", "--json").stdout


def test_openapi_document_describes_the_calls(http):
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) >= {
        "/v1/devices", "/v1/devices/{name}", "/v1/devices/{name}/prefetch", "/v1/doctor",
        "/metrics", "/healthz",
    }  # fmt: skip
    assert "ErrorAnswer" in document["components"]["schemas"]


def test_request_that_is_too_long_for_a_worker_leaves_nothing(daemon, http, clone):
    image, _ = clone()
    before = image.read_bytes()
    folders = [f"/{number}/" + "x" * 4000 for number in range(64)]
    answer = http.post("/v1/devices", json={"image": str(image), "allow_dirs": folders})
    assert answer.status_code >= 400
    assert "too long" in answer.json()["error"]["message"]
    assert not list((daemon.state / "devices").iterdir())
    assert image.read_bytes() == before
    daemon.attach(image)


# The program fvdd


def test_log_says_who_asked_for_a_change(program):
    program.ctl("doctor", "--reclaim", check=False)
    program.ctl("list")
    (line,) = [line for line in program.log.splitlines() if "message=request" in line]
    found = re.search(r'action=reclaim caller="pid=(\d+),uid=(\d+),gid=(\d+)"', line)
    assert found is not None, line
    assert [int(found[2]), int(found[3])] == [os.getuid(), os.getgid()]
    # Of a process that is neither fvdd nor this one: the kernel says so, not the caller.
    assert int(found[1]) not in (program.process.pid, os.getpid())


def test_second_daemon_on_the_same_state_is_refused(program, tmp_path):
    second = Program(tmp_path, "--socket", str(tmp_path / "other.sock"), expect_ready=False)
    assert second.wait() == 5
    assert f"process {program.process.pid}" in second.log
    assert second.log.count("\n") == 2
    assert program.ctl("list", "--json").returncode == 0


def test_socket_of_a_living_daemon_is_not_taken(program, tmp_path):
    second = Program(tmp_path, "--state-dir", str(tmp_path / "other"), expect_ready=False)
    assert second.wait() == 5
    assert "fvdd: cannot listen on" in second.log
    assert program.ctl("list", "--json").returncode == 0


def test_socket_of_a_dead_daemon_is_replaced(tmp_path):
    with Program(tmp_path) as first:
        first.process.kill()
        first.wait()
        assert first.socket.exists()
    with Program(tmp_path) as second:
        assert second.ctl("list", "--json").returncode == 0
        assert second.stop() == 0
        assert not second.socket.exists()


def test_file_in_the_place_of_the_socket_is_kept(tmp_path):
    (tmp_path / "fvdd.sock").write_text("mine")
    refused = Program(tmp_path, expect_ready=False)
    assert refused.wait() == 1
    assert (tmp_path / "fvdd.sock").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[daemon]\nsokket = '/x'\n", "unknown key 'daemon.sokket'"),
        ("[timeouts]\nresend_timeout = 70\n", "must be below timeouts.base_timeout"),
        ("[timeouts\n", "is not TOML"),
        (None, "there is no configuration file"),
    ],
)
def test_wrong_configuration(tmp_path, text, words):
    path = tmp_path / "fvdd.toml"
    if text is not None:
        path.write_text(text)
    refused = Program(tmp_path, "--config", str(path), expect_ready=False)
    assert refused.wait() == 1
    lines = refused.log.splitlines()
    assert lines[0].startswith("fvdd: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert not refused.socket.exists()


def test_metrics_address_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = Program(tmp_path, "--metrics", address, expect_ready=False)
        assert refused.wait() == 1
    assert "--metrics off" in refused.log


def test_state_directory_in_which_nothing_can_be_made_is_named(daemon, clone, monkeypatch):
    image, _ = clone()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    sentence = refusal(daemon.ctl("attach", image, check=False), 1)
    monkeypatch.undo()
    assert f"no space left for {daemon.state}/devices/web" in sentence
    assert os.listdir(daemon.state / "devices") == []
    daemon.attach(image)


def test_full_state_directory_is_no_reason_not_to_start(tmp_path, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    state = StateDirectory(str(tmp_path / "run"))
    state.acquire()
    with pytest.raises(ApiError, match="another fvdd"):
        StateDirectory(str(tmp_path / "run")).acquire()
    state.release()
