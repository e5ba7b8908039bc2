# SPDX-License-Identifier: Apache-2.0
"""`fvdctl top` and `fvdctl events` against a running fvdd: pictures, keys, streams."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import threading

import pytest

from fvdtest.daemon import FVDCTL, Daemon, fvdctl, wait_until

MIB = 1 << 20
MOVED = "device state"


class Terminal:
    """A program on a terminal of 80x24 without colours."""

    def __init__(self, daemon, *words, term="vt100"):
        self.controller, inside = pty.openpty()
        termios.tcsetwinsize(inside, (24, 80))
        environment = {**os.environ, "FVDD_SOCKET": str(daemon.socket), "TERM": term}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*FVDCTL, *words], stdin=inside, stdout=inside, stderr=inside, env=environment
        )
        os.close(inside)
        self.text = ""

    def press(self, key):
        os.write(self.controller, key.encode())

    def until(self, pattern):
        """Wait for a picture that has this."""

        def found():
            while select.select([self.controller], [], [], 0.05)[0]:
                try:
                    self.text += os.read(self.controller, 65536).decode()
                except OSError:
                    break
            return re.search(pattern, self.text.rpartition("\x1b[H")[2], re.S)

        wait_until(found, f"{pattern!r} in\n{self.text[-3000:]}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.controller)


@pytest.fixture
def terminal(daemon):
    made = []

    def make(*words, **options):
        made.append(Terminal(daemon, *words, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_one_picture_of_all_devices(daemon, clone):
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.read(0, MIB)
    done = daemon.ctl("top", "--once", "--interval", "0.2")
    assert re.search(r"^> web +attached", done.stdout, re.M)
    assert "quit" not in done.stdout
    (one,) = json.loads(daemon.ctl("top", "--json").stdout)["devices"]
    assert one["counters"]["io_bytes_read"] == MIB
    assert one["base"].endswith("base.raw")


def test_one_picture_of_one_device_has_its_map(daemon, clone):
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.write(0, b"w" * (4 * MIB))
    picture = daemon.ctl("top", "web", "--once", "--interval", "0.2").stdout
    strip = re.search(r"^\[(.*)\]$", picture, re.M)[1]
    half = len(strip) // 2
    assert set(strip[: half - 1]) == {"#"}
    assert set(strip[half + 1 :]) == {"."}


def test_status_ends_with_the_map(daemon, clone):
    disk = daemon.attach(clone()[0], "--wait", "node")
    disk.write_zeroes(4 * MIB, 4 * MIB)
    assert re.search(r"^map +\[\.+[+]?-+\]$", daemon.ctl("status", "web").stdout, re.M)


def test_the_map_of_an_attached_device_is_that_of_its_image_later(daemon, clone, tmp_path):
    image, _ = clone("web", "--block-size", "4k")
    disk = daemon.attach(image, "--wait", "node")
    disk.write(4096, b"w" * 8192)
    disk.write_zeroes(4 * MIB, MIB)
    socket = ("--socket", daemon.socket)
    found = [
        json.loads(fvdctl("map", word, "--json", *socket).stdout)
        for word in ("web", image, "/dev/nbd0")
    ]
    assert found[0] == found[1] == found[2]
    picture = tmp_path / "map.svg"
    fvdctl("map", "web", "--svg", picture, *socket)
    assert picture.read_text().count("<rect") > 4
    wrong = fvdctl("map", "nothing", *socket, check=False)
    assert wrong.returncode == 4
    assert "neither a device nor a file" in wrong.stderr
    daemon.ctl("detach", "web")

    def kinds(extents):
        return [(one["start"], one["length"], one["kind"]) for one in extents]

    assert kinds(json.loads(fvdctl("map", image, "--json").stdout)) == kinds(found[0])
    assert kinds(found[0])[:3] == [(0, 4096, "base"), (4096, 8192, "data"),
                                   (12288, 4 * MIB - 12288, "base")]  # fmt: skip


def test_keys_on_a_small_terminal_without_colours(daemon, clone, terminal):
    daemon.attach(clone("alpha", "--prefetch-delay", "3600")[0])
    daemon.attach(clone("beta")[0])
    screen = terminal("top", "--interval", "0.3")
    screen.until(r"> alpha .*  beta .*q quit")
    screen.press("j")
    screen.until(r"  alpha .*> beta ")
    screen.press("\x1b[A")
    screen.until(r"> alpha .*waiting.*  beta ")
    screen.press("p")
    screen.until(r"> alpha .*paused")
    screen.press("s")
    screen.until(r"by read")
    screen.press("\r")
    screen.until(r"alpha .*local +0 of 8M.*\[[.]{70,}.*backspace")
    screen.press("\x7f")
    screen.until(r"NAME +STATE.*q quit")
    screen.press("q")
    assert screen.process.wait(20) == 0
    pictures = re.sub(r"\x1b\[([KJ]|\?(1049|25)[hl])", "", screen.text)
    pictures = pictures.replace("\x1b[H", "\r\n")
    assert "\x1b" not in pictures
    assert max(len(line.strip("\r")) for line in pictures.split("\n")) <= 80


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_gives_the_terminal_back(daemon, terminal, number):
    screen = terminal("top", "--interval", "0.2")
    screen.until("0 devices")
    screen.process.send_signal(number)
    assert screen.process.wait(20) == 128 + number
    screen.until(r"\x1b\[\?1049l")


def test_a_terminal_that_cannot_move_the_cursor_gets_one_picture(daemon, terminal):
    screen = terminal("top", "--interval", "0.2", term="dumb")
    assert screen.process.wait(20) == 0
    screen.until("0 devices")
    assert "\x1b" not in screen.text


def test_events_of_a_device_that_is_not_there_are_refused(daemon):
    done = daemon.ctl("events", "nothing", check=False)
    assert done.returncode == 4
    assert "nothing" in done.stderr


def test_events_tell_what_happens_in_its_order(daemon, clone):
    image, _ = clone()
    listening = subprocess.Popen(
        [*FVDCTL, "events", "--socket", str(daemon.socket), "--json", "--count", "6"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(daemon.has_listener, "the listener")
        daemon.attach(image)
        os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
        wait_until(lambda: daemon.device("web").restarts == 1, "a successor")
        daemon.ctl("detach", "web")
        wait_until(lambda: listening.poll() is not None or None, "six events")
        events = [json.loads(line) for line in listening.stdout]
    finally:
        listening.kill()
        listening.wait()
        listening.stdout.close()
    assert all(event["name"] == "web" for event in events)
    states = [event["values"].get("state") for event in events if event["message"] == MOVED]
    assert states[:4] == ["ready", "attached", "recovering", "attached"]
    past = daemon.ctl("events", "--past", "--count", "3", "web").stdout
    assert "web: device state previous=opening state=ready" in past


def test_a_stream_ends_when_fvdd_does(tmp_path, clone):
    daemon = Daemon(tmp_path).start()
    daemon.attach(clone()[0])
    daemon.ctl("detach", "web")
    begun, ended = threading.Event(), threading.Event()

    def listen():
        with daemon.client() as client:
            for _ in client.events(past=True):
                begun.set()
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    assert begun.wait(20)
    daemon.stop()
    thread.join(20)
    assert ended.is_set()
