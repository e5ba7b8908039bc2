# SPDX-License-Identifier: Apache-2.0
"""The verb events: what happens to devices, a line each, until interrupted or fvdd ends."""

from __future__ import annotations

import datetime

import click

from fvdapi.client import Client
from fvdapi.models import Event
from fvdctl import output
from fvdctl.commands.online import daemon_options


@click.command()
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--past", is_flag=True, help="Begin with the last events that fvdd remembers.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@daemon_options
def events(
    name: str | None, past: bool, count: int | None, socket: str | None, as_json: bool, quiet: bool
) -> None:
    """Print what happens to devices (or to NAME), as it comes: with --json, an object a line.

    Ends with fvdd, or when it is interrupted."""
    shown = 0
    with Client(socket) as client:
        if name is not None and not past:  # of one that is gone there may be past ones
            name = client.find(name).name
        for event in client.events(past=past):
            if name is not None and event.name != name:
                continue
            click.echo(event.model_dump_json() if as_json else event_line(event))
            shown += 1
            if shown == count:
                return


def event_line(event: Event) -> str:
    """Time, level unless it is info, name, what happened, the rest."""
    when = datetime.datetime.fromtimestamp(event.time).astimezone()
    level = "" if event.level == "info" else f"{event.level}: "
    values = " ".join(f"{key}={value}" for key, value in event.values.items())
    text = f"{when:%Y-%m-%d %H:%M:%S} {event.name or '-'}: {level}{event.message} {values}"
    return output.printable(text.rstrip())
