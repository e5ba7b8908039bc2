# SPDX-License-Identifier: Apache-2.0
"""The verb trace: write what a device does to a file that Perfetto shows."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import click

from fvdapi.client import Client
from fvdapi.tracing import TraceReader
from fvdctl import output
from fvdctl.chrome_trace import BEGIN, ChromeTrace
from fvdctl.commands.online import daemon_options
from fvdctl.output import SecondsParam

SECONDS_MAX = 3600
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("file", type=click.Path(dir_okay=False, readable=False))
@click.option(
    "--seconds", type=SecondsParam(min=0, max=SECONDS_MAX, min_open=True), default=5.0,
    metavar="N", show_default=True, help="How long to watch; an interrupt ends it earlier.",
)  # fmt: skip
@daemon_options
def trace(
    device: str, file: str, seconds: float, socket: str | None, as_json: bool, quiet: bool
) -> None:
    """Write what a device does to FILE: requests, reads of the base, commits, checkpoints,
    prefetch, copies. Open FILE with https://ui.perfetto.dev or about:tracing."""
    # Signals first: from then on none leaves a file behind.
    with _until_told() as is_over, Client(socket) as client, _in_place_of(file) as temporary:
        name = client.find(device).name
        with (
            client.trace(name, seconds) as chunks,
            open(temporary, "w", encoding="utf-8") as text,
        ):
            reader = TraceReader(chunks)
            made = ChromeTrace(text, name, reader.about)
            write_all(reader, made, is_over)
    facts = {
        "file": file,
        "events": made.events,
        "requests": made.requests,
        "lost_events": reader.lost,
        "cut_off": not reader.is_whole,
    }
    if as_json:
        output.emit_json(facts)
    elif not quiet:
        click.echo(f"{file}: {made.requests} requests, {made.events} events", err=True)
        if reader.lost:
            click.echo(f"{reader.lost} events came too fast and are not in it", err=True)
        if not reader.is_whole:
            click.echo("it ends before its time", err=True)


def write_all(reader: TraceReader, made: ChromeTrace, is_over: Callable[[], bool]) -> None:
    """To the end of the stream, or until it is over; the file is whole in any case."""
    for events in reader.frames():
        made.add(events)
        if not events:
            made.flush()
        if is_over():
            break
    made.finish(lost=reader.lost, is_whole=reader.is_whole)


@contextlib.contextmanager
def _until_told() -> Iterator[Callable[[], bool]]:
    """Has there been a signal? It only asks for an end, so that the file gets its own; a second one
    is a KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in ENDING}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _in_place_of(path: str) -> Iterator[str]:
    """A new file beside `path` that takes its place when all went well; ClickException before
    anything where that cannot be made, or where `path` is anything but an earlier trace."""
    if os.path.lexists(path) and not output.is_file_of_ours(path, BEGIN.encode()):
        raise click.ClickException(
            f"{path} exists and is no trace: name a file that is not there yet"
        )
    temporary = f"{path}.{os.getpid()}"
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that is there "
            "and may be written"
        ) from error
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
