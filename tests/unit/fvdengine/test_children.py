# SPDX-License-Identifier: Apache-2.0
"""Servers as children: started, started again, ended with their keeper, gone with their parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fvdcore import export_length
from fvdengine import children
from fvdengine.errors import ProgramMissing

SIZE = 1 << 20


def wait_until(claim, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)  # the interval of polling, never the whole wait
    return value


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The directory in which children get theirs."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(children, "_parent_directory", lambda: str(folder))
    return folder


@pytest.fixture
def started(runtime):
    """Start children that are ended at the end."""
    made = []

    def start(*words):
        made.append(
            children.start_child(lambda socket: ["nbdkit", "-f", "-r", "-U", socket, *words])
        )
        return made[-1]

    yield start
    for child in made:
        try:
            os.close(child.keeper)
        except OSError:
            continue
    wait_until(lambda: not os.listdir(runtime), "the directories to go")


def test_a_child_serves_in_a_private_directory(started, runtime):
    child = started("memory", str(SIZE))
    assert export_length(child.uri, 10.0) == SIZE
    assert os.stat(child.directory).st_mode & 0o777 == 0o700
    assert os.path.dirname(child.directory) == str(runtime)


def test_a_child_that_dies_is_started_again(started):
    child = started("memory", str(SIZE))
    assert export_length(child.uri, 10.0) == SIZE
    first = child.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: child.pid != first, "a new child")
    assert export_length(child.uri, 10.0) == SIZE
    assert child.exits == 1


def test_a_child_that_cannot_run_tells_why(started):
    child = started("file", "/nonexistent/file")
    wait_until(lambda: child.exits, "the failure")
    assert "No such file" in child.last_words()


def test_the_last_duplicate_of_the_keeper_ends_the_child(started):
    child = started("memory", str(SIZE))
    assert export_length(child.uri, 10.0) == SIZE
    copy = os.dup(child.keeper)
    os.close(child.keeper)
    assert export_length(child.uri, 10.0) == SIZE
    assert is_alive(child.pid)
    os.close(copy)
    wait_until(lambda: not is_alive(child.pid), "the child to end")
    wait_until(lambda: not os.path.exists(child.directory), "its directory to go")


def test_the_child_dies_with_its_parent(tmp_path):
    """By SIGKILL too, which nobody can answer."""
    script = (
        "import sys, time\n"
        "from fvdcore import export_length\n"
        "from fvdengine import children\n"
        f"children._parent_directory = lambda: {str(tmp_path)!r}\n"
        "child = children.start_child(lambda s: ['nbdkit', '-f', '-U', s, 'memory', '1M'])\n"
        "export_length(child.uri, 20.0)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    wait_until(lambda: not is_alive(pid), "the child to die")


def test_what_killed_processes_left_is_removed(started, runtime):
    left = runtime / "fvd-base-4194399-abc_def"
    left.mkdir()
    (left / "nbd.sock").touch()
    other = runtime / "fvd-base-x"
    other.mkdir()
    started("memory", str(SIZE))
    assert not left.exists()
    assert other.exists()
    other.rmdir()


def test_a_missing_program_names_its_package():
    with pytest.raises(ProgramMissing) as caught:
        children.need_program("no-such-program", "the-package", "tests")
    assert "apt install the-package" in caught.value.hint
    assert "no-such-program" in caught.value.message


def test_a_program_that_is_missing_leaves_nothing(runtime):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ProgramMissing):
        children.start_child(lambda socket: [children.need_program("fvd-none", "none", "tests")])
    assert list(runtime.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_last_words_are_of_the_base_and_not_of_a_client_that_left(tmp_path):
    child = children.Child(str(tmp_path), -1)
    (tmp_path / "log").write_text(
        "nbdkit: ssh[5]: error: failed to connect: Connection refused\n"
        "Try using: nbdkit --help\n"
        "nbdkit: ssh[6]: error: write: sending newstyle handshake: Broken pipe\n"
        "nbdkit: ssh[7]: error: write: NBD_OPT_GO: Broken pipe\n"
        "nbdkit: ssh[8]: error: write reply: NBD_CMD_READ: Broken pipe\n"
    )
    assert child.last_words() == "failed to connect: Connection refused"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nbdkit: python.1: error: /x/web_export.py: pread: error: Unfit: the server says 404",
         "the server says 404"),
        (" Unfit: the server says 404\n", "the server says 404"),
        ("""qemu-nbd: Failed to blk_new_open 'json:{"driver": "q'w"}': Unsupported feature(s)""",
         "Unsupported feature(s)"),
        ("nbdkit: error: \x1b[1m" + "x" * 999, "?[1m" + "x" * 296),
        ("nbdkit: error:", "error:"),
    ],
)  # fmt: skip
def test_last_words_are_one_short_line_of_what_matters(tmp_path, line, words):
    (tmp_path / "log").write_text(f"before\n{line}\n")
    assert children.Child(str(tmp_path), -1).last_words() == words


def test_last_words_outlive_the_next_start(started):
    child = started("file", "/nonexistent/file")
    wait_until(lambda: child.exits > 1, "the second failure")
    for _ in range(50):
        assert "No such file" in child.last_words()


def test_what_a_child_said_lately_is_known_by_its_uri(tmp_path):
    directory = tmp_path / f"fvd-base-{os.getpid()}-abc"
    directory.mkdir()
    uri = f"nbd+unix:///?socket={directory}/nbd.sock"
    assert children.said_lately(uri) == ""
    (directory / "log").write_text("nbdkit: ssh[1]: error: no such key\n")
    assert children.said_lately(uri) == "no such key"
    os.utime(directory / "log", (1, 1))
    assert children.said_lately(uri) == ""
    (tmp_path / "log").write_text("secret\n")
    for other in (f"nbd+unix:///?socket={tmp_path}/nbd.sock", "nbd://host/x"):
        assert children.said_lately(other) == "", "only of our own children"
