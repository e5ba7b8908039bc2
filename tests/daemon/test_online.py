# SPDX-License-Identifier: Apache-2.0
"""How fvdctl shows devices: texts, percentages, and the progress bar on a terminal."""

import os
import pty
import subprocess
from types import SimpleNamespace

import pytest

from fvdapi.models import (
    DeviceState,
    DeviceStatus,
    PrefetchRequest,
    PrefetchState,
    PrefetchStatus,
    Timeouts,
)
from fvdctl.commands.online import duration_text, percent_text, prefetch_text
from fvdctl.commands.prefetch import wait
from fvdtest.daemon import FVDCTL

STATUS = DeviceStatus(
    name="web",
    device="/dev/nbd0",
    image="/web.fvd",
    state=DeviceState.ATTACHED,
    read_only=False,
    timeouts=Timeouts(resend_timeout=2, base_timeout=60, kernel_timeout=0, dead_timeout=3600),
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (-1, "-"), (0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"),
        (3600, "1h00m"), (90000, "1d"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("local", "left", "text"),
    [(0, 0, "100%"), (0, 10, "0.0%"), (999_999, 1, "99.9%"), (10, 0, "100%"), (1, 1, "50.0%")],
)
def test_percentage_is_full_only_when_nothing_is_left(local, left, text):
    status = STATUS.model_copy(update={"local_bytes": local, "base_bytes_left": left})
    assert percent_text(status) == text


def test_prefetch_in_words():
    running = PrefetchStatus.model_validate(
        {"state": "running", "rate_bytes_per_second": 5 << 20, "eta_seconds": 65}
    )
    assert prefetch_text(running) == "running, 5M/s, 1m05s left"
    stuck = PrefetchStatus.model_validate({"state": "running", "rate_bytes_per_second": 0})
    assert prefetch_text(stuck) == "running, 0/s"
    paused = PrefetchStatus.model_validate({"state": "paused", "paused_reason": "manual"})
    assert prefetch_text(paused) == "paused (manual)"


def test_waiting_ends_when_the_prefetch_has_finished_not_when_all_is_local():
    def status(state):
        prefetch = PrefetchStatus(state=state)
        return STATUS.model_copy(update={"prefetch": prefetch, "base_bytes_left": 0})

    answers = [status(PrefetchState.RUNNING), status(PrefetchState.DONE)]
    client = SimpleNamespace(device=lambda name: answers.pop(0))
    ended = wait(client, status(PrefetchState.RUNNING), 30, quiet=True)
    assert ended.prefetch.state is PrefetchState.DONE
    assert not answers


def test_waiting_on_a_terminal_shows_percent_rate_and_time(daemon, clone):
    image, _ = clone("web", "--prefetch-delay", "3600")
    daemon.attach(image)
    controller, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [*FVDCTL, "prefetch", "web", "wait", "--timeout", "60"],
            env={
                **os.environ,
                "FVDD_SOCKET": str(daemon.socket),
                "TERM": "xterm",
                "COLUMNS": "100",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
        )
        os.close(terminal)
        shown = b""
        started = False
        while True:
            if b"%" in shown and not started:
                # The bar is there; now let something happen.
                with daemon.client() as client:
                    client.prefetch("web", PrefetchRequest(action="start"))
                started = True
            try:
                piece = os.read(controller, 65536)
            except OSError:  # the other side has closed the terminal
                break
            if not piece:
                break
            shown += piece
        assert process.wait(60) == 0
    finally:
        os.close(controller)
    for word in (b"web", b"%", b"/s", b"left", b"prefetch is done"):
        assert word in shown


def test_boot_attaches_as_the_table_says_and_is_content_when_that_is_so(daemon, clone, tmp_path):
    image, _ = clone()
    other, _ = clone("other")
    table = tmp_path / "fvdtab"
    table.write_text(f"disk {image} connections=2\n")
    assert daemon.ctl("boot", "disk", "--file", table).stdout == "/dev/nbd0\n"
    assert daemon.status("disk")["connections"] == 2
    table.write_text(f"disk {image} connections=2\nbad {other} connections=0\n")
    again = daemon.ctl("boot", "disk", "--file", table)
    assert (again.returncode, again.stdout) == (0, "/dev/nbd0\n")
    assert "warning" in again.stderr
    assert "line 2: connections=0 cannot be" in again.stderr
    assert daemon.ctl("boot", "bad", "--file", table, check=False).returncode == 1
    assert daemon.ctl("boot", "disk", "--file", table, "-q").stdout == ""
    table.write_text(f"disk {other} -\n")
    refused = daemon.ctl("boot", "disk", "--file", table, check=False)
    assert refused.returncode == 5
    assert f"disk is attached already, with {image}; {table} has it on {other}" in refused.stderr


def test_boot_says_where_the_image_is_attached_under_another_name(daemon, clone, tmp_path):
    image, _ = clone()
    daemon.attach(image)
    table = tmp_path / "fvdtab"
    table.write_text(f"web2 {image} -\n")
    refused = daemon.ctl("boot", "web2", "--file", table, check=False)
    assert refused.returncode == 5
    assert f"{image} is attached already as web (/dev/nbd0)" in refused.stderr


@pytest.mark.parametrize(("option", "mode"), [("read-only", "on"), ("-", "off")])
def test_boot_is_not_content_with_another_mode(daemon, clone, tmp_path, option, mode):
    image, _ = clone()
    daemon.attach(image)
    if mode == "off":
        daemon.ctl("set-read-only", "web", "on")
    table = tmp_path / "fvdtab"
    table.write_text(f"web {image} {option}\n")
    refused = daemon.ctl("boot", "web", "--file", table, check=False)
    own, other = ("writable", "read-only") if mode == "on" else ("read-only", "writable")
    assert refused.returncode == 5
    assert f"device web is attached already, {own}; {table} has it {other}" in refused.stderr
    assert f"hint: fvdctl set-read-only web {mode}\n" in refused.stderr
    daemon.ctl("set-read-only", "web", mode)
    assert daemon.ctl("boot", "web", "--file", table).stdout == "/dev/nbd0\n"
