# SPDX-License-Identifier: Apache-2.0
"""fvdd over a remote base: attached while it is away, paced while it runs, followed by profile."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdd.config import Timeouts
from fvdengine import locking
from fvdengine.create import create_image
from fvdengine.errors import EngineError
from fvdengine.options import CreateOptions
from fvdengine.profile import read_profile
from fvdtest.daemon import Daemon, fvdctl, running_daemon, wait_until
from fvdtest.remote import Nbdkit
from fvdtest.tools import run

BLOCK = 4096
SIZE = 8 << 20

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def content(place: Path) -> bytes:
    data = os.urandom(SIZE)
    (place / "base.raw").write_bytes(data)
    return data


@pytest.fixture(scope="module")
def server(place: Path, content: bytes) -> Iterator[Nbdkit]:
    with Nbdkit(place, "file", place / "base.raw") as running:
        yield running


@pytest.fixture(scope="module")
def fvdd(place: Path) -> Iterator[Daemon]:
    with running_daemon(place) as running:
        yield running


@pytest.fixture
def clone(place: Path, server: Nbdkit, fvdd: Daemon, request: pytest.FixtureRequest) -> Path:
    """An image over the server, for a device that is called like it."""
    path = place / f"{request.node.name.split('[')[0][-40:]}.fvd"
    fvdctl("create", path, "--base", server.uri, "--copy-on-read")
    return path


def attach(fvdd: Daemon, server: Nbdkit, path: Path, *options: object) -> object:
    return fvdd.attach(path, "--allow-uri", server.uri, *options)


def test_rates_policy_pause_and_end_of_a_remote_base(
    fvdd: Daemon, server: Nbdkit, clone: Path, content: bytes
) -> None:
    disk = attach(fvdd, server, clone, "--prefetch-policy", "eager")
    name = clone.stem
    assert fvdd.status(name)["prefetch"]["policy"] == "eager"
    done = fvdd.ctl("prefetch", name, "rate", "--max", "64K", check=False)
    assert "give --min as well" in done.stderr, "the image's minimum is higher"
    fvdd.ctl("prefetch", name, "rate", "--max", "64K", "--min", "0")
    fvdd.ctl("prefetch", name, "policy", "polite")
    fvdd.ctl("prefetch", name, "start")
    wait_until(lambda: fvdd.device(name).local_bytes > 0, "a first piece")
    fvdd.ctl("prefetch", name, "pause")
    wait_until(lambda: fvdd.device(name).prefetch.paused_reason == "manual", "the pause")
    status = fvdd.device(name)
    assert status.prefetch.policy == "polite"
    assert status.base_bytes_left > SIZE // 2, "the rate holds it back"
    fvdd.ctl("prefetch", name, "rate", "--max", "0")
    fvdd.ctl("prefetch", name, "resume")
    lines = fvdd.ctl("prefetch", name, "wait", "--timeout", "60", "--json").stdout
    told = [json.loads(line) for line in lines.splitlines()]
    assert {one["name"] for one in told} == {name}
    assert told[-1]["prefetch"]["state"] == "done"
    assert fvdd.device(name).base_bytes_left == 0
    server.kill()
    assert disk.read(0, SIZE) == content  # type: ignore[attr-defined]
    server.start()
    fvdd.ctl("detach", name)
    said = json.loads(fvdctl("info", clone, "--json").stdout)
    assert said["header"]["prefetch_max_read_throughput"] == 1_000_000_000


@pytest.mark.parametrize(
    "words",
    [
        ("rate",), ("rate", "eager", "--max", "1"), ("policy",), ("policy", "rude"),
        ("pause", "--max", "1"), ("start", "--timeout", "3"), ("rate", "--max", "-5"),
        ("rate", "--max", "2T"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense_are_refused(words: tuple[str, ...]) -> None:
    done = fvdctl("prefetch", "web", *words, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 2, "one sentence and a hint"


def test_attach_while_the_base_is_away_serves_what_is_local(
    fvdd: Daemon, server: Nbdkit, clone: Path, content: bytes
) -> None:
    disk = attach(fvdd, server, clone)
    disk.write(BLOCK, b"x" * BLOCK)  # type: ignore[attr-defined]
    fvdd.ctl("detach", clone.stem)
    server.kill()
    try:
        disk = attach(fvdd, server, clone)
        assert disk.read(BLOCK, BLOCK) == b"x" * BLOCK  # type: ignore[attr-defined]
    finally:
        server.start()
    assert disk.read(0, BLOCK) == content[:BLOCK]  # type: ignore[attr-defined]
    fvdd.ctl("detach", clone.stem)


def servers_of(worker: int) -> list[str]:
    """The programs that a worker has started and that run."""
    found = []
    for task in Path(f"/proc/{worker}/task").iterdir():
        for child in (task / "children").read_text().split():
            found.append(Path(f"/proc/{child}/comm").read_text().strip())
    return found


def test_nothing_is_left_of_the_base_when_all_is_local(
    fvdd: Daemon, place: Path, content: bytes
) -> None:
    """The file is closed and unlocked, and the program that served it has ended."""
    base, image = place / "gone.qcow2", place / "gone.fvd"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / "base.raw", base)
    create_image(image, CreateOptions(base=str(base), base_format="qcow2"))
    disk = fvdd.attach(image)
    worker = fvdd.device("gone").worker_pid
    assert worker
    assert servers_of(worker) == ["qemu-nbd"]
    with base.open("r+b") as file:
        assert not is_free(file.fileno(), base)
        fvdd.ctl("prefetch", "gone", "start")
        wait_until(lambda: fvdd.device("gone").prefetch.state == "done", "prefetch to end")
        wait_until(lambda: not servers_of(worker), "the server of the base to end")
        wait_until(lambda: is_free(file.fileno(), base), "the lock of the base to end")
    base.unlink()
    assert disk.read(0, SIZE) == content  # type: ignore[attr-defined]
    fvdd.ctl("detach", "gone")


def is_free(fd: int, path: Path) -> bool:
    """Whether the file can be locked for writing; then it is."""
    try:
        locking.lock(fd, str(path), exclusive=True)
    except EngineError:
        return False
    return True


def reads(disk: object, offset: int, expected: bytes) -> bool:
    """Whether a read is answered, which must be rightly."""
    try:
        found = disk.read(offset, len(expected))  # type: ignore[attr-defined]
    except OSError:
        return False
    assert found == expected
    return True


def base_up(daemon: Daemon) -> float:
    """The gauge of the only device."""
    found = daemon.metrics().items()
    (number,) = (number for (metric, _), number in found if metric == "fvd_base_up")
    return number


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Daemon]:
    """fvdd that waits for a base a second only."""
    times = Timeouts(resend_timeout=0.5, base_timeout=1.0)
    with running_daemon(tmp_path, timeouts=times) as running:
        yield running


def test_a_base_that_is_away_longer_than_one_waits_is_told_and_comes_back(
    hasty: Daemon, server: Nbdkit, clone: Path, content: bytes
) -> None:
    name = clone.stem
    disk = attach(hasty, server, clone, "--prefetch-delay", "off")
    disk.write(BLOCK, b"x" * BLOCK)  # type: ignore[attr-defined]
    assert disk.read(0, BLOCK) == content[:BLOCK]  # type: ignore[attr-defined]
    server.kill()
    try:
        begin = time.monotonic()
        with pytest.raises(OSError, match="answered with an error"):
            disk.read(SIZE // 2, BLOCK)  # type: ignore[attr-defined]
        assert 0.9 < time.monotonic() - begin < 20
        assert disk.read(BLOCK, BLOCK) == b"x" * BLOCK  # type: ignore[attr-defined]
        disk.write(SIZE // 4, b"y" * BLOCK)  # type: ignore[attr-defined]
        disk.flush()  # type: ignore[attr-defined]
        assert hasty.status(name)["state"] == "attached"
        assert base_up(hasty) == 0
        events = hasty.ctl("events", "--past", "--json", "--count", "4").stdout
        assert server.uri in events, "what failed names the base"
    finally:
        server.start()
    # Nobody has to do anything: it is found again.
    wait_until(lambda: reads(disk, SIZE // 2, content[SIZE // 2 :][:BLOCK]), "the base to be back")
    assert disk.read(SIZE // 4, BLOCK) == b"y" * BLOCK  # type: ignore[attr-defined]
    assert base_up(hasty) == 1
    hasty.ctl("detach", name)


class Site(http.server.ThreadingHTTPServer):
    """Zeros on a web server, until they are gone."""

    is_gone = False

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            data = b"" if self.server.is_gone else bytes(int(last) - int(first) + 1)
            self.send_response(404 if self.server.is_gone else 206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{SIZE}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(("127.0.0.1", 0), Site.RequestHandlerClass) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        yield server
        server.shutdown()
        serving.join()


def test_why_a_web_server_gives_nothing_is_told(
    hasty: Daemon, site: Site, tmp_path: Path
) -> None:
    uri, path = f"http://127.0.0.1:{site.server_port}/golden", tmp_path / "web.fvd"
    fvdctl("create", path, "--base", uri)
    disk = hasty.attach(path, "--allow-uri", uri, "--prefetch-delay", "off", "--wait", "node")
    wait_until(lambda: reads(disk, 0, bytes(BLOCK)), "the child to serve it")
    site.is_gone = True

    def is_told() -> bool:
        """A slow child may not have said anything by the end of a read's time."""
        assert not reads(disk, SIZE // 2, b"?" * BLOCK)
        said = "Input/output error (the server says 404 Not Found)"
        return said in hasty.ctl("status", "web").stdout

    wait_until(is_told, "the reason")
    hasty.ctl("detach", "web")


def test_a_profile_is_recorded_and_followed(
    fvdd: Daemon, server: Nbdkit, clone: Path, place: Path
) -> None:
    profile = place / "boot.profile"
    disk = attach(fvdd, server, clone, "--profile", "record", profile, "--fetch-size", "0")
    for at in (700, 3, 900):
        disk.read(at * BLOCK, BLOCK)  # type: ignore[attr-defined]
    fvdd.ctl("detach", clone.stem)
    noted = [(700 * BLOCK, BLOCK), (3 * BLOCK, BLOCK), (900 * BLOCK, BLOCK)]
    assert [one for one in read_profile(profile) if one in noted] == noted
    second = place / "second.fvd"
    fvdctl(
        "create", second, "--base", server.uri, "--prefetch-max-read", "64",
        "--prefetch-min-read", "0",
    )  # fmt: skip
    attach(fvdd, server, second, "--profile", "replay", profile)
    fvdd.ctl("prefetch", "second", "start")
    wait_until(lambda: fvdd.device("second").local_bytes >= 3 * BLOCK, "the profile's blocks")
    fvdd.ctl("prefetch", "second", "pause")
    fvdd.ctl("detach", "second")
    said = fvdctl("map", second, "--json", "--allow-uri", server.uri).stdout
    base = [one for one in json.loads(said) if one["kind"] == "base"]
    for at, length in noted:
        assert not any(one["start"] < at + length and at < one["start"] + one["length"]
                       for one in base)  # fmt: skip


def test_a_profile_that_is_none_is_refused_before_anything_is_attached(
    fvdd: Daemon, server: Nbdkit, clone: Path, place: Path
) -> None:
    (place / "notes").write_text("dear diary")
    done = fvdd.ctl(
        "attach", clone, "--allow-uri", server.uri, "--profile", "replay", place / "notes",
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "boot profile" in done.stderr
    assert "first line" in done.stderr
