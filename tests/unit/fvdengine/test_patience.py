# SPDX-License-Identifier: Apache-2.0
"""Storage is asked in a process of its own, and left alone where it does not answer."""

import os
import threading
import time

import pytest

from fvdengine import patience
from fvdtest.tools import wait_until


@pytest.fixture
def hangs(tmp_path, monkeypatch):
    """Every look hangs; the file holds the process that does."""
    for name in ("stat", "head", "rmdir"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec /bin/sleep 600\n")
        program.chmod(0o755)
    monkeypatch.setattr(patience, "PROGRAMS", (str(tmp_path),))
    return tmp_path / "pid"


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "none", "-n", "dangling"])
def test_what_is_there_or_not_answers(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("elsewhere")
    elif kind != "none":
        path.touch()
    begin = time.monotonic()
    assert patience.answers(str(path), 30)
    assert time.monotonic() - begin < 20


def test_a_file_is_read_and_an_error_is_an_answer(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    with (tmp_path / "file").open("rb") as file:
        assert patience.reads(file.fileno(), 8192, 30)
        assert os.pread(file.fileno(), 200, 0) == b"x" * 100
    folder = os.open(tmp_path, os.O_RDONLY)
    assert patience.reads(folder, 8192, 30)
    os.close(folder)


def test_folder_that_takes_changes_or_none_answers_and_is_not_changed(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty", tmp_path / "none", "/proc"):
        assert patience.changes(str(folder), 30)
    assert os.listdir(tmp_path) == ["empty"]


def test_folder_that_takes_no_change_in_time_is_told(hangs):
    assert not patience.changes("/", 0.5)


@pytest.mark.parametrize("look", ["stat", "head"])
def test_what_hangs_is_left_behind_and_ends_later(hangs, look):
    ask = patience.answers if look == "stat" else patience.reads
    words = ("/", 1.0) if look == "stat" else (0, 1, 1.0)
    before = len(os.listdir("/proc/self/fd"))
    assert not ask(*words)
    assert len(os.listdir("/proc/self/fd")) == before
    pid = int(hangs.read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the program to be gone")
    wait_until(
        lambda: all(one.name != "fvd-patience" for one in threading.enumerate()), "its thread"
    )


def test_without_the_program_nothing_is_known(monkeypatch):
    monkeypatch.setattr(patience, "PROGRAMS", ("/none",))
    assert patience.answers("/")


def test_storage_that_has_just_answered_is_not_asked_again(tmp_path, hangs):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link").symlink_to("elsewhere")
    patience.PROGRAMS = ("/usr/bin", "/bin")  # the fixture puts back what was there
    assert patience.answers(str(folder / "one"), 30)
    patience.PROGRAMS = (str(hangs.parent),)
    assert patience.answers(str(folder / "two"), 0.3)
    assert not patience.answers(str(folder / "link"), 0.3)
    assert not patience.answers(str(tmp_path / "three"), 0.3)
