# SPDX-License-Identifier: Apache-2.0
"""The verbs of attached devices: attach, detach, list, status.

They are calls to fvdd and nothing more. `attach` prints the device's path alone on stdout, so that
scripts can write DEVICE=$(fvdctl attach IMAGE); everything else goes to stderr.
"""

from __future__ import annotations

import datetime
import os
import re

import click

from fvdapi.client import Client
from fvdapi.errors import ApiError
from fvdapi.models import (
    CONNECTIONS_MAX,
    DEVICE_PATTERN,
    AttachRequest,
    DeviceState,
    DeviceStatus,
    is_device_name,
)
from fvdctl import output
from fvdctl.commands.online import (
    allowing_options,
    daemon_options,
    duration_text,
    percent_text,
    prefetch_text,
)
from fvdctl.copying import copying_options
from fvdctl.output import DELAY, size_text

# What is left of 80 columns beside the names.
MAP_CELLS = 58


@click.command()
@click.argument("image", type=click.Path(readable=False))
@click.option("--name", metavar="NAME", help="The device's name (default: the image's).")
@click.option("--device", metavar="/dev/nbdX", help="Use this device (default: a free one).")
@click.option("-r", "--read-only", is_flag=True, help="Allow no writes; the image is not changed.")
@click.option(
    "--connections",
    type=click.IntRange(1, CONNECTIONS_MAX),
    default=1,
    show_default=True,
    help="Connections between the kernel and the worker. More than one is for hosts with many "
    "processors; the kernel then cuts off requests that take longer than the base may, and only "
    "after that time sends those again that a dying worker left unanswered.",
)
@click.option(
    "--transport", type=click.Choice(["nbd"]), default="nbd", show_default=True, help="The driver."
)
@click.option(
    "--sector-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="The device's logical sector size. Images with partitions need the one they were made "
    "with, usually 512.",
)
@click.option(
    "--wait",
    type=click.Choice(["node", "partitions", "none"]),
    default="partitions",
    show_default=True,
    help="What must be there when the command returns.",
)
@allowing_options("Attach although a base has changed.")
@click.option(
    "--copy-on-read/--no-copy-on-read",
    default=None,
    help="Store what is read from the base, whatever the image says.",
)
@click.option(
    "--prefetch-delay",
    type=DELAY,
    metavar="S|off",
    help="When to begin copying the rest of the base, whatever the image says.",
)
@copying_options(None)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "writethrough", "none"]),
    help="When writes are durable and whether the host caches, whatever the configuration says.",
)
@click.option(
    "--on-full",
    type=click.Choice(["error", "wait"]),
    help="What writes do when the image's storage is full, whatever the configuration says.",
)
@daemon_options
def attach(
    image: str,
    name: str | None,
    device: str | None,
    read_only: bool,
    connections: int,
    transport: str,
    sector_size: str,
    wait: str,
    allow_dirs: tuple[str, ...],
    allow_uris: tuple[str, ...],
    accept_changed_base: bool,
    copy_on_read: bool | None,
    prefetch_delay: int | None,
    cache: str | None,
    on_full: str | None,
    prefetch_policy: str | None,
    fetch_size: int | None,
    profile: tuple[tuple[str, str], ...],
    socket: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Attach IMAGE as a block device and print the device's path.

    Returns when the device and its partitions can be used.
    """
    _check_names(name, device)
    request = AttachRequest.model_validate(
        {
            "image": os.path.abspath(image),
            "name": name,
            "device": device,
            "read_only": read_only,
            "connections": connections,
            "transport": transport,
            "sector_size": int(sector_size),
            "wait": wait,
            "allow_dirs": tuple(os.path.abspath(entry) for entry in allow_dirs),
            "allow_uris": allow_uris,
            "accept_changed_base": accept_changed_base,
            "copy_on_read": copy_on_read,
            "prefetch_delay": prefetch_delay,
            "cache": cache,
            "on_full": on_full,
            "prefetch_policy": prefetch_policy,
            "fetch_size": fetch_size,
            **{f"{what}_profile": os.path.abspath(path) for what, path in profile},
        }
    )
    with Client(socket) as client:
        status = client.attach(request)
    output.warn(status.warnings, quiet=quiet)
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    else:
        click.echo(status.device)


def _check_names(name: str | None, device: str | None) -> None:
    if name is not None and not is_device_name(name):
        raise click.UsageError(
            f"'{name}' cannot be a name: use letters, digits, '.', '_' and '-', 64 at most"
        )
    if device is not None and re.fullmatch(DEVICE_PATTERN, device) is None:
        raise click.UsageError(f"'{device}' is not a device like /dev/nbd0")


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.option(
    "--discard-unflushed",
    is_flag=True,
    help="Give up a failed device that cannot be brought back, with what was not flushed.",
)
@daemon_options
def detach(
    device: str, discard_unflushed: bool, socket: str | None, as_json: bool, quiet: bool
) -> None:
    """Detach a device: flush it, close its image clean, free the kernel's device.

    Refused while the device is mounted or open; the message names who holds it. A device whose
    worker is dead and whose image or base is gone for good can be detached only with
    --discard-unflushed: its image, if there is one, stays as it was last flushed, and is attached
    again as after a power cut. A device that works is detached as ever with it.
    """
    with Client(socket) as client:
        name = client.find(device).name
        answer = client.detach(name, discard_unflushed=discard_unflushed)
    if as_json:
        output.emit_json(answer.model_dump(mode="json"))
    elif not quiet:
        rest = "; what was not flushed is given up" if answer.discarded_unflushed else ""
        click.echo(f"detached {answer.name} from {answer.device}{rest}", err=True)


@click.command(name="list")
@daemon_options
def list_(socket: str | None, as_json: bool, quiet: bool) -> None:
    """List the attached devices."""
    with Client(socket) as client:
        devices = client.devices()
    if as_json:
        output.emit_json({"devices": [status.model_dump(mode="json") for status in devices]})
        return
    if not devices:
        if not quiet:
            click.echo("no device is attached", err=True)
        return
    output.table(
        ("NAME", "DEVICE", "STATE", "SIZE", "LOCAL", "PREFETCH", "IMAGE"),
        (
            (
                status.name,
                status.device or "-",
                _state_text(status),
                size_text(status.size_bytes),
                percent_text(status),
                status.prefetch.state.value,
                status.image or "-",
            )
            for status in devices
        ),
    )


def _state_text(status: DeviceStatus) -> str:
    """The state, whether it may be written, and what is the matter in a word."""
    acute = [one.word for one in status.troubles if one.word]
    words = [f"{status.state.value} (ro)" if status.read_only else status.state.value]
    if acute and status.state is DeviceState.ATTACHED:
        words.append(acute[0])
    return ", ".join(words)


@click.command()
@click.argument("device", metavar="[NAME|DEVICE|IMAGE]", required=False)
@daemon_options
def status(device: str | None, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Show one device, or all of them."""
    with Client(socket) as client:
        found = [client.find(device)] if device is not None else list(client.devices())
        strip = "" if device is None or as_json else map_strip(client, found[0].name)
    if as_json:
        values = [entry.model_dump(mode="json") for entry in found]
        output.emit_json(values[0] if device is not None else {"devices": values})
        return
    if not found and not quiet:
        click.echo("no device is attached", err=True)
    for number, entry in enumerate(found):
        if number:
            click.echo()
        _show(entry, strip)


def map_strip(client: Client, name: str) -> str:
    """Where the parts of the disk are, in a line; nothing where nobody can tell."""
    try:
        return f"[{client.map(name, MAP_CELLS).strip()}]"
    except ApiError:
        return ""


def _show(status: DeviceStatus, strip: str = "") -> None:
    times = status.timeouts
    state = status.state.value + (f": {status.reason}" if status.reason is not None else "")
    local = f"{size_text(status.local_bytes)} ({percent_text(status)})"
    mode = "read-only" if status.read_only else "read-write"
    rows: list[tuple[str, object]] = [
        ("name", status.name),
        ("device", status.device or "-"),
        ("image", status.image or "-"),
        ("state", state),
        ("mode", f"{mode}, {status.sector_size}-byte sectors, blocks of {status.block_size}"),
        ("cache", status.cache),
        ("size", size_text(status.size_bytes)),
        ("local", local),
        ("left in the base", size_text(status.base_bytes_left)),
        ("prefetch", prefetch_text(status.prefetch)),
        (
            "journal",
            f"{size_text(status.journal.used_bytes)} of "
            f"{size_text(status.journal.size_bytes)} used",
        ),
        ("connections", f"{status.connections_alive} of {status.connections} ({status.transport})"),
        ("worker", _worker_text(status)),
        ("attached", _when(status.attached_at)),
        (
            "timeouts",
            f"resend {times.resend_timeout:g}s, base {times.base_timeout:g}s, kernel "
            f"{_off(times.kernel_timeout)}, dead {duration_text(times.dead_timeout)}",
        ),
    ]
    if status.growing_bytes:
        more = size_text(status.growing_bytes)
        rows.append(("storage", f"{more} more are being asked for"))
    rows.extend(("TROUBLE", f"{one.topic}: {one.text}") for one in status.troubles)
    rows.extend(("warning", text) for text in status.warnings)
    if strip:
        rows.append(("map", strip))
    output.pairs(rows)


def _worker_text(status: DeviceStatus) -> str:
    process = f"process {status.worker_pid}" if status.worker_pid is not None else "none"
    return f"{process}, restarted {status.restarts} times"


def _off(seconds: float) -> str:
    return f"{seconds:g}s" if seconds else "off"


def _when(stamp: float | None) -> str:
    if not stamp:
        return "-"
    return datetime.datetime.fromtimestamp(stamp).astimezone().isoformat(" ", "seconds")
