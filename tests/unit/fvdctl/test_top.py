# SPDX-License-Identifier: Apache-2.0
"""What was typed at once is several keys; what is drawn keeps its last column."""

import os
import pty
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest

from fvdctl.commands.top import DOWN, ENDING, UP, _draw, keys_of, raw_terminal


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ("", []), ("q", ["q"]), ("kkk", ["k", "k", "k"]), ("\r\n", ["\r", "\n"]),
        (UP[0] + UP[1] + "s" + DOWN[0], [UP[0], UP[1], "s", DOWN[0]]),
        ("\x1b", ["\x1b"]), ("\x1b[3~p", ["\x1b[3~", "p"]), ("\x1b\x1b", ["\x1b", "\x1b"]),
    ],
)  # fmt: skip
def test_keys_come_one_by_one(typed, keys):
    assert keys_of(typed) == keys


def test_nothing_is_cleared_behind_a_line_as_wide_as_the_screen(monkeypatch, capsys):
    """The cursor stands on its last character then: xterm and the console would erase that."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 3)))
    _draw(SimpleNamespace(lines=lambda width, height: ["x" * width] * height))
    drawn = capsys.readouterr().out
    assert drawn.count("x" * 80) == 3
    assert not re.search(r"x\x1b\[[KJ]", drawn)
    assert len(re.findall(r"\x1b\[[KJ]x", drawn)) == 3


@pytest.fixture
def screen(monkeypatch):
    """A terminal for standard input; the handlers of signals are as before afterwards."""
    master, slave = pty.openpty()
    handlers = [(number, signal.getsignal(number)) for number in ENDING]
    with os.fdopen(slave) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield
    for number, handler in handlers:
        signal.signal(number, handler)
    os.close(master)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_that_arrives_in_a_destructor_ends_it_too(screen, number):
    """The interpreter drops what a destructor raises."""

    class Told:
        def __del__(self):
            signal.raise_signal(number)

    rounds = []

    def watch():
        with raw_terminal() as told:
            while not told and len(rounds) < 10:
                rounds.append(Told)
                Told()

    with pytest.raises(SystemExit) as ended:
        watch()
    assert ended.value.code == 128 + number
    assert len(rounds) == 1
