# SPDX-License-Identifier: Apache-2.0
"""Notifications to the service manager: what is sent, and that its absence changes nothing."""

import os
import socket

import pytest

from fvdd import notify


@pytest.fixture
def manager(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def test_states_arrive(manager):
    notifier = notify.Notifier(manager.getsockname())
    notifier.ready("serving")
    assert manager.recv(4096).decode().split("\n")[:2] == ["READY=1", "STATUS=serving"]
    notifier.status("busy")
    assert manager.recv(4096) == b"STATUS=busy"
    notifier.stopping("bye")
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=bye"


def test_nothing_happens_without_a_manager(tmp_path):
    notify.Notifier("").ready("x")
    notify.Notifier(str(tmp_path / "gone")).ready("x")


@pytest.mark.parametrize(
    ("pid", "text", "expected"),
    [
        ("own", "30000000", 30.0),
        ("other", "30000000", None),
        ("own", "0", None),
        ("own", "soon", None),
    ],
)
def test_watchdog_is_for_the_process_named(monkeypatch, pid, text, expected):
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else "1")
    monkeypatch.setenv("WATCHDOG_USEC", text)
    assert notify.watchdog_seconds() == expected


def test_sockets_of_another_process_are_not_taken(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert notify.passed_sockets() == []
