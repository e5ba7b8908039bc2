# SPDX-License-Identifier: Apache-2.0
"""The verb prefetch: start, pause, wait for, or pace the copy of the rest of the base."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

import click

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import (
    RATE_MAX,
    DeviceState,
    DeviceStatus,
    PrefetchRequest,
    PrefetchState,
)
from fvdctl import output
from fvdctl.commands.online import daemon_options, duration_text, prefetch_text
from fvdctl.output import SIZE, SecondsParam, at_most, size_text

POLL_SECONDS = 0.25
POLICIES = ("polite", "eager", "fixed")

Show = Callable[[DeviceStatus], None]


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("action", type=click.Choice(["start", "pause", "resume", "rate", "policy", "wait"]))
@click.argument("value", required=False, metavar="[polite|eager|fixed]")
@click.option(
    "--min", "least", type=SIZE, metavar="SIZE", callback=at_most(RATE_MAX),
    help="With rate: pause now and then below SIZE a second; 0 never.",
)
@click.option(
    "--max", "most", type=SIZE, metavar="SIZE", callback=at_most(RATE_MAX),
    help="With rate: never more than SIZE a second; 0 for no limit.",
)
@click.option(
    "--timeout", type=SecondsParam(min=0), metavar="S", help="Wait no longer than S seconds."
)
@daemon_options
def prefetch(
    device: str,
    action: str,
    value: str | None,
    least: int | None,
    most: int | None,
    timeout: float | None,
    socket: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Control the copy of the rest of the base into the image.

    wait returns when nothing of the base is needed any more; with --json it prints a line of
    progress for each look, and at the end the device's whole status as one line. rate changes
    the image's bounds, for reading and writing alike. policy says how it behaves beside guests:
    polite steps aside for them, fixed knows only the bounds, eager only the upper ones.
    """
    if timeout is not None and action != "wait":
        raise click.UsageError("--timeout belongs to wait")
    if (action == "rate") != ((least, most) != (None, None)):
        raise click.UsageError("rate, and nothing else, takes --min and --max")
    if (action == "policy") != (value is not None) or value not in (None, *POLICIES):
        raise click.UsageError(f"policy, and nothing else, takes one of {', '.join(POLICIES)}")
    with Client(socket) as client:
        status = client.find(device)
        if action == "wait":
            status = wait(client, status, timeout, quiet=quiet, as_json=as_json)
        else:
            request = PrefetchRequest.model_validate({
                "action": "start" if action == "resume" else action, "policy": value,
                "min_bytes_per_second": least, "max_bytes_per_second": most,
            })  # fmt: skip
            status = _control(client, status.name, request)
    if as_json and action == "wait":
        click.echo(json.dumps(status.model_dump(mode="json")))
    elif as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        click.echo(f"{status.name}: prefetch is {prefetch_text(status.prefetch)}", err=True)


def _control(client: Client, name: str, request: PrefetchRequest) -> DeviceStatus:
    """Ask for it; one bound alone may not fit to the other one, which the image has."""
    try:
        return client.prefetch(name, request)
    except ApiError as error:
        bounds = (request.min_bytes_per_second, request.max_bytes_per_second)
        if None in bounds and "prefetch_min" in error.message and "prefetch_max" in error.message:
            other = "--min" if bounds[0] is None else "--max"
            error.hint = f"The image has the other bound: give {other} as well (0 for none)."
        raise


def wait(
    client: Client,
    status: DeviceStatus,
    timeout: float | None,
    *,
    quiet: bool,
    as_json: bool = False,
) -> DeviceStatus:
    """Poll until everything is local; ApiError when that cannot come."""
    deadline = time.monotonic() + timeout if timeout is not None else None
    with _lines() if as_json else _progress(status, quiet=quiet) as show:
        while not _is_done(status):
            show(status)
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
    return status


def _is_done(status: DeviceStatus) -> bool:
    """Nothing left, and the worker has said so (not merely said nothing yet).

    A prefetch that runs still makes durable that the base is needed no more (I5).
    """
    state = status.prefetch.state
    if state in (PrefetchState.DONE, PrefetchState.RUNNING):
        return state is PrefetchState.DONE
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
    is_paused = status.prefetch.state is PrefetchState.PAUSED
    # Paused for a while, because it was too slow: it goes on by itself.
    is_held = is_paused and status.prefetch.paused_reason == "manual"
    if status.state is DeviceState.ATTACHED and (
        is_held or status.prefetch.state is PrefetchState.DISABLED
    ):
        word = status.prefetch.state.value
        raise ApiError(
            "prefetch_unavailable",
            f"the prefetch of {name} is {word}: waiting for it would not end",
            hint=f"start it with: fvdctl prefetch {name} start",
        )


@contextlib.contextmanager
def _lines() -> Iterator[Show]:
    """A line of JSON for each look; the device's whole status follows at the end."""

    def show(now: DeviceStatus) -> None:
        words = {"name": now.name, "base_bytes_left": now.base_bytes_left}
        click.echo(json.dumps(words | now.prefetch.model_dump(mode="json")))

    yield show


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
        TextColumn("{task.fields[why]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(status.name, total=total, rate="-", eta="-", why="")

        def show(now: DeviceStatus) -> None:
            bar.update(
                task,
                completed=total - now.base_bytes_left,
                rate=size_text(now.prefetch.rate_bytes_per_second),
                eta=duration_text(now.prefetch.eta_seconds),
                why=prefetch_text(now.prefetch) if now.prefetch.paused_reason else "",
            )

        yield show
