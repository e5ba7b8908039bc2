# SPDX-License-Identifier: Apache-2.0
"""The verbs that keep attached devices alive: recover.

Each is one call to fvdd; the device stays attached throughout, and whoever uses it sees a pause.
"""

from __future__ import annotations

import os

import click

from fvdapi.client import Client
from fvdapi.models import RecoverRequest
from fvdctl import output
from fvdctl.commands.online import daemon_options


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.option("--image", metavar="FILE", type=click.Path(), help="Where the image was moved to.")
@daemon_options
def recover(device: str, image: str | None, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Bring a failed device back, once its cause is removed; no acknowledged write is lost."""
    request = RecoverRequest(image=os.path.abspath(image) if image is not None else None)
    with Client(socket) as client:
        status = client.recover(client.find(device).name, request)
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        click.echo(f"{status.name}: {status.device} is served again", err=True)
