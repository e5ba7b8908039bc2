# SPDX-License-Identifier: Apache-2.0
"""The name of a file may be any bytes: one that is no text hurts no device, and blinds nobody."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from fvdapi.errors import ApiError
from fvdd.app import _error
from fvdtest.daemon import fvdctl, wait_until

NO_TEXT = os.fsdecode(b"w\xe9b")
SHOWN = "w\ufffdb"


def kill_worker(daemon, name="web"):
    old = daemon.device(name).worker_pid
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: daemon.device(name).worker_pid not in (old, None), "a successor")
    wait_until(lambda: daemon.device(name).state == "attached", "it to serve")


@pytest.fixture
def place(tmp_path, base):
    """A folder with a base and an image that names it by its file name alone."""
    made = tmp_path / "place"
    made.mkdir()
    shutil.copy2(base, made / "base.raw")
    fvdctl("create", made / "web.fvd", "--base", made / "base.raw", "--base-format", "raw")
    return made


@pytest.mark.parametrize("what", ["file", "folder"])
def test_image_whose_name_becomes_none(relay, place, what):
    daemon = relay.running
    disk = daemon.attach(place / "web.fvd", "--allow-dir", place.parent)
    disk.write(0, b"acked")
    if what == "file":
        name = place / f"{NO_TEXT}.fvd"
        (place / "web.fvd").rename(name)
    else:
        name = place.rename(place.with_name(NO_TEXT)) / "web.fvd"
    kill_worker(daemon)
    assert disk.read(0, 5) == b"acked"
    shown = str(name).replace(NO_TEXT, SHOWN)
    assert daemon.device("web").image == shown
    assert SHOWN in daemon.ctl("list").stdout
    # A later fvdd knows it, although no process leads to it.
    pid = daemon.device("web").worker_pid
    relay.stop()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    daemon = relay.next()
    assert daemon.device("web").state == "attached", daemon.device("web").reason
    assert daemon.device("web").image == shown
    disk.write(5, b", too")
    daemon.ctl("set-read-only", "web", "on")
    daemon.ctl("set-read-only", "web", "off")
    daemon.ctl("snapshot", "web", place.parent / "next.fvd")
    assert disk.read(0, 10) == b"acked, too"


@pytest.mark.parametrize("restarts", [1])
def test_base_whose_name_is_none_and_is_missing(daemon, tmp_path, base):
    named = Path(shutil.copy2(base, tmp_path / f"{NO_TEXT}.raw"))
    fvdctl("create", tmp_path / "x.fvd", "--base", named, "--base-format", "raw")
    disk = daemon.attach(tmp_path / "x.fvd")
    away = named.rename(tmp_path / "away")
    os.kill(daemon.device("x").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("x").state == "failed", "the tries to end")
    for verb in ("recover", "detach"):
        refused = daemon.ctl(verb, "x", check=False)
        assert refused.returncode
        assert SHOWN in refused.stderr, refused.stderr
    assert SHOWN in daemon.ctl("status", "x").stdout
    away.rename(named)
    daemon.ctl("recover", "x")
    assert disk.read(0, 16) == base.read_bytes()[:16]


def test_who_holds_a_device_is_named_by_any_name():
    answer = _error(ApiError("device_held", f"mounted at /mnt/{NO_TEXT}", hint=NO_TEXT))
    assert SHOWN.encode() in answer.body
