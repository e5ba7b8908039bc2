# SPDX-License-Identifier: Apache-2.0
"""The verb prefetch: start, pause, or wait for the copy of the rest of the base."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import DeviceState, DeviceStatus, PrefetchRequest, PrefetchState
from fvdctl import output
from fvdctl.commands.online import daemon_options, duration_text, prefetch_text
from fvdctl.output import size_text

POLL_SECONDS = 0.25

Show = Callable[[DeviceStatus], None]


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("action", type=click.Choice(["start", "pause", "wait"]))
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="S", help="Wait no longer than S seconds."
)
@daemon_options
def prefetch(
    device: str,
    action: str,
    timeout: float | None,
    socket: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Control the copy of the rest of the base into the image.

    wait returns when nothing of the base is needed any more.
    """
    if timeout is not None and action != "wait":
        raise click.UsageError("--timeout belongs to wait")
    with Client(socket) as client:
        status = client.find(device)
        if action == "wait":
            status = wait(client, status, timeout, quiet=quiet or as_json)
        else:
            request = PrefetchRequest.model_validate({"action": action})
            status = client.prefetch(status.name, request)
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        click.echo(f"{status.name}: prefetch is {prefetch_text(status.prefetch)}", err=True)


def wait(
    client: Client, status: DeviceStatus, timeout: float | None, *, quiet: bool
) -> DeviceStatus:
    """Poll until everything is local; ApiError when that cannot come."""
    deadline = time.monotonic() + timeout if timeout is not None else None
    with _progress(status, quiet=quiet) as show:
        while not _is_done(status):
            _refuse_hopeless(status)
            if deadline is not None and time.monotonic() >= deadline:
                raise ApiError(
                    "timed_out",
                    f"{status.name} still needs {size_text(status.base_bytes_left)} of its base "
                    f"after {timeout:g} s",
                    hint="prefetch goes on; wait again, or look at it with fvdctl status",
                )
            time.sleep(POLL_SECONDS)
            status = client.device(status.name)
            show(status)
    return status


def _is_done(status: DeviceStatus) -> bool:
    """Nothing left, and the worker has said so (not merely said nothing yet)."""
    if status.prefetch.state is PrefetchState.DONE:
        return True
    return status.state is DeviceState.ATTACHED and status.base_bytes_left == 0


def _refuse_hopeless(status: DeviceStatus) -> None:
    """Waiting makes no sense in these states."""
    name = status.name
    if status.state in (DeviceState.FAILED, DeviceState.ORPHANED, DeviceState.CLOSED):
        raise ApiError("device_failed", f"device {name} is {status.state.value}: {status.reason}")
    if status.prefetch.state is PrefetchState.FAILED:
        raise ApiError(
            "prefetch_failed",
            f"the prefetch of {name} has failed",
            hint=f"fvdd's log says why; try again with: fvdctl prefetch {name} start",
        )
    if status.state is DeviceState.ATTACHED and status.prefetch.state in (
        PrefetchState.PAUSED,
        PrefetchState.DISABLED,
    ):
        word = status.prefetch.state.value
        raise ApiError(
            "prefetch_unavailable",
            f"the prefetch of {name} is {word}: waiting for it would not end",
            hint=f"start it with: fvdctl prefetch {name} start",
        )


@contextlib.contextmanager
def _progress(status: DeviceStatus, *, quiet: bool) -> Iterator[Show]:
    """A bar with percentage, rate and the remaining time, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _status: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    total = max(status.local_bytes + status.base_bytes_left, 1)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TextColumn("{task.fields[rate]}/s"),
        TextColumn("{task.fields[eta]} left"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(status.name, total=total, rate="-", eta="-")

        def show(now: DeviceStatus) -> None:
            bar.update(
                task,
                completed=total - now.base_bytes_left,
                rate=size_text(now.prefetch.rate_bytes_per_second),
                eta=duration_text(now.prefetch.eta_seconds),
            )

        show(status)
        yield show
