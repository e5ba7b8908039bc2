# SPDX-License-Identifier: Apache-2.0
"""The program that makes storage longer: which one it is, what it is told, and that it may fail."""

import asyncio
import time

import pytest

from fvdd.worker import growth
from fvdd.worker.growth import BUILTIN_LVEXTEND, Grower, choose_program, command, run_program

HOSTILE = (
    "touch {marker} #",
    "/bin/sh -c 'touch {marker}'",
    "builtin:lvextend; touch {marker}",
    "builtin:lvextend\ntouch {marker}",
    " builtin:lvextend",
    "BUILTIN:LVEXTEND",
    "$(touch {marker})",
    "{marker}.sh",
)


@pytest.fixture
def program(tmp_path):
    """Make a program: program(shell text) is its path; what it was told is in its record."""

    def make(text, name="script"):
        path = tmp_path / name
        path.write_text(
            f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done >>{tmp_path}/record\n{text}\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def record(tmp_path):
    return lambda: (tmp_path / "record").read_text().splitlines()


def test_the_configuration_names_the_program_whatever_the_image_says():
    assert choose_program("/sbin/grow", "anything", allow_builtin=True) == "/sbin/grow"
    assert choose_program("/sbin/grow", BUILTIN_LVEXTEND, allow_builtin=False) == "/sbin/grow"
    assert choose_program("", BUILTIN_LVEXTEND, allow_builtin=True) == BUILTIN_LVEXTEND
    assert choose_program("", BUILTIN_LVEXTEND, allow_builtin=False) == ""


@pytest.mark.parametrize("stored", HOSTILE)
@pytest.mark.parametrize("allowed", [False, True])
def test_hostile_command_of_an_image_is_never_run(tmp_path, stored, allowed):
    """S1: it chooses nothing, so there is nothing that could be run."""
    text = stored.format(marker=tmp_path / "marker")
    assert choose_program("", text, allow_builtin=allowed) == ""


def test_words_are_passed_as_they_are():
    path = "/dev/vg0/a b;$(c)"
    assert command("/sbin/grow", 4096, path) == ["/sbin/grow", "4096", path]
    words = command(BUILTIN_LVEXTEND, 8 << 20, path)
    assert (words[0], words[-3:]) == ("lvextend", ["-L", "+8388608b", path])


def test_lvextend_does_not_read_the_device_that_waits_for_it():
    words = command(BUILTIN_LVEXTEND, 8 << 20, "/dev/vg0/clone")
    assert words[1:3] == ["--config", 'devices/filter=["r|^/dev/nbd|"]']


def test_program_gets_bytes_and_path(program, record):
    path = "/dev/vg0/a b;$(touch c)"
    assert asyncio.run(run_program(program("exit 0"), 12345, path)) is True
    assert record() == ["12345", path]


def test_builtin_runs_lvextend_from_the_search_path(program, record, tmp_path, monkeypatch):
    program("exit 0", "lvextend")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert asyncio.run(run_program(BUILTIN_LVEXTEND, 1 << 30, "/dev/vg0/clone")) is True
    assert record()[-3:] == ["-L", "+1073741824b", "/dev/vg0/clone"]


@pytest.mark.parametrize("text", ["exit 3", "kill -9 $$"], ids=["status", "signal"])
def test_program_that_fails_is_a_failure_and_what_it_says_is_logged(program, caplog, text):
    script = program(f"echo no space in the group >&2\n{text}")
    assert asyncio.run(run_program(script, 1, "/dev/x")) is False
    assert "no space in the group" in caplog.text or any(
        "no space in the group" in str(vars(entry)) for entry in caplog.records
    )


def test_program_that_is_not_there_is_a_failure(tmp_path):
    assert asyncio.run(run_program(str(tmp_path / "none"), 1, "/dev/x")) is False
    (tmp_path / "plain").write_text("no program")
    assert asyncio.run(run_program(str(tmp_path / "plain"), 1, "/dev/x")) is False


def test_program_that_hangs_is_killed_with_its_children(program):
    script = program("sleep 1000 &\nsleep 1000")
    begin = time.monotonic()
    assert asyncio.run(run_program(script, 1, "/dev/x", seconds=0.2)) is False
    assert time.monotonic() - begin < 10


def test_program_may_leave_a_child_that_holds_its_output(program):
    script = program("sleep 3 &\nexit 0")
    begin = time.monotonic()
    assert asyncio.run(run_program(script, 1, "/dev/x")) is True
    assert time.monotonic() - begin < 3


class Told:
    def __init__(self, closed=False):
        self.answers = []
        self.closed = closed

    def storage_grown(self, ok):
        self.answers.append(ok)
        if self.closed:
            raise ValueError("the device is closed")


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("text", "ok"), [("exit 0", True), ("exit 1", False)])
def test_engine_is_told_how_it_went(program, text, ok, closed):
    told = Told(closed)

    async def ask():
        grower = Grower(told, program(text), "/dev/x")
        grower.take_event({"event": "parked", "requests": 1})
        grower.take_event({"event": "grow", "bytes": 512})
        while not told.answers:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 10))
    assert told.answers == [ok]


def test_only_block_devices_have_to_be_made_longer(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        assert growth.is_block_device(file.fileno()) is False
    assert growth.is_block_device(-1) is False
