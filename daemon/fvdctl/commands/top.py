# SPDX-License-Identifier: Apache-2.0
"""The verb top: what devices are doing, renewed in place, by keys.

Needs nothing of a terminal but that it can move the cursor; no colours. Where standard output is
no terminal, one picture is printed after one interval, so that it can be piped.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import click

from fvdapi.activity import Activity, DeviceMap
from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import PrefetchRequest, PrefetchState
from fvdctl.commands.online import daemon_options
from fvdctl.output import SecondsParam, emit_json
from fvdctl.view import SORTS, Picture, all_lines, one_lines, sorted_devices

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
UP, DOWN = ("\x1b[A", "\x1bOA", "k"), ("\x1b[B", "\x1bOB", "j")
# An escape sequence of a key, or a character.
KEY = re.compile("\x1b[\\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
BACK = ("\x7f", "\x08", "\x1b")
MAP_SECONDS = 5.0
DAY = 86400.0
# Terminals that cannot move the cursor.
PLAIN = ("", "dumb", "unknown")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Screen:
    """What is shown, and what keys have changed about it."""

    client: Client
    picture: Picture
    sort: str = SORTS[0]
    chosen: str = ""
    alone: bool = False
    note: str = ""
    is_over: bool = False
    strip: DeviceMap | None = None
    strip_at: float = 0.0

    def renew(self) -> None:
        """Look again."""
        try:
            self.picture = Picture(self.client.activity(), self.picture.now)
            self.note = ""
        except ApiError as error:
            self.note = error.message

    def lines(self, width: int, height: int) -> list[str]:
        """The lines of the present view."""
        names = [one.name for one in self._sorted()]
        if self.chosen not in names and not self.alone:
            self.chosen = names[0] if names else ""
        room = height - 1 if self.note else height
        if self.alone:
            lines = one_lines(self.picture, self.chosen, self._strip(width - 2), width, room)
        else:
            lines = all_lines(self.picture, self.sort, self.chosen, width, room)
        return [*lines, self.note[:width]] if self.note else lines

    def press(self, key: str) -> None:
        """Do what a key means; others mean nothing."""
        if key in ("q", "\x03"):
            self.is_over = True
        elif key in ("\r", "\n") and self.chosen:
            self.alone, self.strip_at = True, 0.0
        elif key in BACK:
            self.alone = False
        elif key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "p" and self.chosen:
            self._switch_prefetch()
        elif key in (*UP, *DOWN):
            names = [one.name for one in self._sorted()]
            if self.chosen in names:
                at = names.index(self.chosen) + (1 if key in DOWN else -1)
                self.chosen = names[max(0, min(at, len(names) - 1))]

    def _sorted(self) -> list[Activity]:
        return sorted_devices(self.picture.now.devices, self.picture.figures(), self.sort)

    def _switch_prefetch(self) -> None:
        found = [one for one in self.picture.now.devices if one.name == self.chosen]
        if not found:
            return
        runs = found[0].prefetch in (PrefetchState.RUNNING, PrefetchState.WAITING)
        action = "pause" if runs else "start"
        try:
            self.client.prefetch(self.chosen, PrefetchRequest.model_validate({"action": action}))
            self.renew()
        except ApiError as error:
            self.note = error.message

    def _strip(self, cells: int) -> DeviceMap | None:
        now = time.monotonic()
        if now - self.strip_at >= MAP_SECONDS and cells > 0:
            self.strip_at = now
            with contextlib.suppress(ApiError):
                self.strip = self.client.map(self.chosen, min(cells, 512))
        return self.strip if self.strip is not None and self.strip.name == self.chosen else None


@click.command()
@click.argument("device", metavar="[NAME|DEVICE|IMAGE]", required=False)
@click.option(
    "--interval", type=SecondsParam(min=0.2, max=DAY), default=2.0, show_default=True, metavar="S",
    help="Look again every S seconds.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one picture after one interval, and end.")
@daemon_options
def top(
    device: str | None, interval: float, once: bool, socket: str | None, as_json: bool, quiet: bool
) -> None:
    """Watch what devices are doing: all of them, or one with its map."""
    with Client(socket) as client:
        screen = Screen(client, Picture(client.activity()))
        if device is not None:
            screen.chosen, screen.alone = client.find(device).name, True
        if as_json:
            emit_json(screen.picture.now.model_dump(mode="json"))
        elif once or not _is_screen():
            time.sleep(interval)
            screen.renew()
            _print(screen)
        else:
            _watch(screen, interval)


def _is_screen() -> bool:
    """Whether there is a terminal on which a picture can be renewed in place."""
    both = sys.stdin.isatty() and sys.stdout.isatty()
    return both and os.environ.get("TERM", "") not in PLAIN


def _print(screen: Screen) -> None:
    size = shutil.get_terminal_size()
    count = len(screen.picture.now.devices)
    # All of them: what is printed may be as long as it is, but for the line about keys.
    for line in screen.lines(size.columns, max(size.lines, count + 10))[:-1]:
        click.echo(line.rstrip())


def _watch(screen: Screen, interval: float) -> None:
    """Show, wait for a key or the next look, until told to end."""
    with raw_terminal() as told:
        due = time.monotonic() + interval
        while not screen.is_over and not told:
            _draw(screen)
            for key in keys_of(_typed(max(0.0, due - time.monotonic()))):
                screen.press(key)
            if time.monotonic() >= due:
                screen.renew()
                due = time.monotonic() + interval


def _draw(screen: Screen) -> None:
    size = shutil.get_terminal_size()
    lines = screen.lines(size.columns, size.lines)
    # Cleared before it is written: behind a line as wide as the screen the cursor stands on its
    # last character.
    text = HOME + "".join(f"{CLEAR_LINE}{line}\r\n" for line in lines[:-1])
    sys.stdout.write(text + f"{CLEAR_REST}{lines[-1]}")
    sys.stdout.flush()


def keys_of(typed: str) -> list[str]:
    """The keys, one by one: a slow line brings several at once."""
    return KEY.findall(typed)


def _typed(seconds: float) -> str:
    """What was typed within so many seconds; "q" at the end of the input."""
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 1024).decode(errors="replace") or "q"


@contextlib.contextmanager
def raw_terminal() -> Iterator[list[int]]:
    """Keys one by one and unechoed; the former screen is back afterwards, whatever happens.

    Gives the signals that told the process to end: each raises SystemExit, but where one arrives
    in a destructor the interpreter drops that.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    told: list[int] = []

    def end(number: int, frame: object) -> NoReturn:
        told.append(number)
        raise SystemExit(128 + number)

    for number in ENDING:
        signal.signal(number, end)
    sys.stdout.write(ENTER)
    try:
        tty.setcbreak(descriptor)
        yield told
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
    if told:
        raise SystemExit(128 + told[0])
