# SPDX-License-Identifier: Apache-2.0
"""The verbs that keep attached devices alive: boot, recover, snapshot, backup, upgrade.

Each is one call to fvdd; the device stays attached throughout, and whoever uses it sees a pause.
"""

from __future__ import annotations

import os
import time
from typing import Final

import click

from fvdapi.client import Client, is_image
from fvdapi.errors import ApiError
from fvdapi.models import (
    CONNECTIONS_MAX,
    BackupRequest,
    DeviceState,
    DeviceStatus,
    ReadOnlyRequest,
    RecoverRequest,
    SnapshotRequest,
    UpgradeAnswer,
)
from fvdctl import fvdtab, output
from fvdctl.commands.online import allowing_options, daemon_options

# How long a device that is about to be served, or to fail, is waited for at boot.
SETTLE_SECONDS: Final = 30.0
SETTLE_PERIOD_SECONDS: Final = 0.2
_PASSING: Final = (DeviceState.OPENING, DeviceState.READY, DeviceState.RECOVERING)


@click.command()
@click.argument("name")
@click.option(
    "--file",
    "path",
    metavar="FILE",
    default=fvdtab.DEFAULT_PATH,
    show_default=True,
    help="The table of devices.",
)
@daemon_options
def boot(name: str, path: str, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Attach the device NAME as the table says; fine when that is so already.

    fvd@NAME.service does this at boot.
    """
    request, faults = fvdtab.find(name, path)
    output.warn(faults, quiet=quiet)
    with Client(socket) as client:
        try:
            status = client.attach(request)
        except ApiError as error:
            if error.code not in ("device_exists", "image_in_use"):
                raise
            status = _settled(client, name, error)
            _require_served(status)
            if not is_image(status, request.image):
                raise _on_another(status, request.image, path) from error
            if status.read_only != request.read_only:
                raise _in_another_mode(status, path) from error
    output.warn(status.warnings, quiet=quiet)
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        click.echo(status.device)


def _on_another(status: DeviceStatus, image: str, path: str) -> ApiError:
    return ApiError(
        "device_exists",
        f"device {status.name} is attached already, with {status.image}; {path} has it on {image}",
        hint=f"if it continues on {status.image} since a snapshot, name that in {path}: {image} "
        f"must not be changed any more; else: fvdctl detach {status.name}",
    )


def _in_another_mode(status: DeviceStatus, path: str) -> ApiError:
    own, other = ("read-only", "writable") if status.read_only else ("writable", "read-only")
    return ApiError(
        "device_exists",
        f"device {status.name} is attached already, {own}; {path} has it {other}",
        hint=f"fvdctl set-read-only {status.name} {'off' if status.read_only else 'on'}",
    )


def _settled(client: Client, name: str, refusal: ApiError) -> DeviceStatus:
    """The device `name`, which stood in the way, once it is known whether it is served."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            status = client.device(name)
        except ApiError as error:
            # It is the image that is in use, and the refusal says by whom.
            raise (refusal if error.code == "device_not_found" else error) from error
        # An orphan without a reason is one that fvdd is about to adopt.
        is_passing = status.state in _PASSING or (
            status.state is DeviceState.ORPHANED and not status.reason
        )
        if not is_passing or time.monotonic() > deadline:
            return status
        time.sleep(SETTLE_PERIOD_SECONDS)


def _require_served(status: DeviceStatus) -> None:
    """ApiError where nobody serves the device: whoever mounts it then would hang."""
    if status.state is DeviceState.ATTACHED:
        return
    if status.state not in (DeviceState.FAILED, DeviceState.ORPHANED):
        raise ApiError(
            "device_state",
            f"device {status.name} is {status.state.value} now",
            hint="try again when fvdctl list shows it as attached",
        )
    is_failed = status.state is DeviceState.FAILED
    raise ApiError(
        "device_failed" if is_failed else "device_orphaned",
        f"device {status.name} is attached, but "
        + (f"has failed: {status.reason}" if is_failed else f"is orphaned: {status.reason}"),
        hint=f"remove the cause, then: fvdctl recover {status.name}"
        + ("" if is_failed else "; fvdctl doctor says more"),
    )


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.option(
    "--image", metavar="FILE", type=click.Path(readable=False), help="Where the image was moved to."
)
@click.option(
    "--discard-unflushed",
    is_flag=True,
    help="Give up what was written after the last flush that succeeded.",
)
@allowing_options("Go on although a base has changed.")
@click.option(
    "--connections",
    type=click.IntRange(1, CONNECTIONS_MAX),
    help="How many the device was attached with, where its record is lost and its worker is dead.",
)
@daemon_options
def recover(
    device: str, image: str | None, discard_unflushed: bool, allow_dirs: tuple[str, ...],
    allow_uris: tuple[str, ...], accept_changed_base: bool, connections: int | None,
    socket: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Bring a failed device back, once the cause is removed; no acknowledged write is lost.

    An image that has stopped at an I/O error of its storage goes on only with
    --discard-unflushed, as after a power cut: end what uses the device first, and check its file
    system afterwards. A device that is listed as orphaned, since its record is damaged, comes back
    with the settings of fvdd.toml in place of those of its attach: what that allowed is given
    again by the options here.
    """
    request = RecoverRequest(
        image=os.path.abspath(image) if image is not None else None,
        discard_unflushed=discard_unflushed,
        allow_dirs=tuple(os.path.abspath(entry) for entry in allow_dirs),
        allow_uris=allow_uris,
        accept_changed_base=accept_changed_base,
        connections=connections,
    )
    with Client(socket) as client:
        status = client.recover(client.find(device).name, request)
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        words = f"{status.device} is served again"
        if status.state is DeviceState.CLOSED:
            words = "the kernel has no device of it any more; its image was closed clean"
        click.echo(f"{status.name}: {words}", err=True)


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("target", metavar="NEW", type=click.Path(readable=False))
@click.option(
    "--fvdtab",
    "table",
    metavar="FILE",
    default=fvdtab.DEFAULT_PATH,
    show_default=True,
    help="The table of devices, which may have to name NEW.",
)
@daemon_options
def snapshot(
    device: str, target: str, table: str, socket: str | None, as_json: bool, quiet: bool
) -> None:
    """Keep the device's image as it is now; the device continues on NEW, a clone of it.

    The old image may then be copied away or cloned, but not changed for as long as NEW needs it.
    A device that is attached at boot needs another line in /etc/fvd/fvdtab then, which is told.
    A file system that is mounted is caught as a power cut would leave it; sync or freeze it first.
    """
    request = SnapshotRequest(target=os.path.abspath(target))
    with Client(socket) as client:
        answer = client.snapshot(client.find(device).name, request)
    warnings = [str(one) for one in fvdtab.moved_on(
        answer.name, answer.base, answer.image, table
    )]  # fmt: skip
    # Of what is to be done now even those are told who want to hear nothing else.
    output.warn(warnings, quiet=False)
    if as_json:
        output.emit_json({**answer.model_dump(mode="json"), "warnings": warnings})
    elif not quiet:
        click.echo(
            f"{answer.name}: continues on {answer.image}, {answer.base} stays as it is "
            f"(paused {answer.pause_seconds * 1000:.0f} ms)",
            err=True,
        )


@click.command()
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("target", metavar="FILE", type=click.Path(readable=False))
@daemon_options
def backup(device: str, target: str, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Copy the device's disk as it is now to the new raw image FILE, while it stays in use.

    Writing goes on meanwhile, into an image that takes the place of the device's own; at the end
    both are put together. So the device pauses twice, at last for as long as that takes. A file
    system that is mounted is caught as a power cut would leave it; sync or freeze it first.
    """
    request = BackupRequest(target=os.path.abspath(target))
    with Client(socket) as client:
        answer = client.backup(client.find(device).name, request)
    if as_json:
        output.emit_json(answer.model_dump(mode="json"))
    elif not quiet:
        pauses = " and ".join(f"{seconds * 1000:.0f} ms" for seconds in answer.pause_seconds)
        click.echo(
            f"{answer.name}: {output.size_text(answer.written_bytes)} copied to {answer.target}"
            + (f" (paused {pauses})" if pauses else ""),
            err=True,
        )


@click.command("set-read-only")
@click.argument("device", metavar="NAME|DEVICE|IMAGE")
@click.argument("mode", metavar="on|off", type=click.Choice(["on", "off"]))
@daemon_options
def set_read_only(device: str, mode: str, socket: str | None, as_json: bool, quiet: bool) -> None:
    """Make a device read-only while it stays attached (on), or writable again (off).

    Refused while the device is mounted or open, like a detach. It stays so over restarts of worker
    and fvdd, until it is detached.
    """
    with Client(socket) as client:
        name = client.find(device).name
        status = client.set_read_only(name, ReadOnlyRequest(read_only=mode == "on"))
    if as_json:
        output.emit_json(status.model_dump(mode="json"))
    elif not quiet:
        what = "read-only" if status.read_only else "writable"
        click.echo(f"{status.name}: {status.device} is {what} now", err=True)


@click.command()
@click.argument("device", metavar="[NAME|DEVICE|IMAGE]", required=False)
@click.option("--all", "all_devices", is_flag=True, help="All devices, one after another.")
@daemon_options
def upgrade(
    device: str | None, all_devices: bool, socket: str | None, as_json: bool, quiet: bool
) -> int:
    """Replace the worker of a device by the installed version, while the device is in use.

    Connections are handed over between two requests: nothing fails, and nothing is sent twice.
    fvdd itself takes the installed version when it is restarted, which touches no device.
    With --all the first device that the installed version cannot serve is the last one.
    """
    if (device is None) != all_devices:
        raise click.UsageError("give a device, or --all")
    done: list[UpgradeAnswer] = []
    failures: list[tuple[str, ApiError]] = []
    left: list[str] = []
    with Client(socket) as client:
        if device is not None:
            names = [client.find(device).name]
        else:
            names = [status.name for status in client.devices()]
        for at, name in enumerate(names):
            try:
                done.append(client.upgrade(name))
            except ApiError as error:
                if device is not None:
                    raise
                failures.append((name, error))
                if error.code == "device_failed":  # so would the next
                    left = names[at + 1 :]
                    break
                continue
            if not as_json and not quiet:
                click.echo(_upgrade_text(done[-1]), err=True)
    if as_json:
        output.emit_json(
            {
                "upgraded": [answer.model_dump(mode="json") for answer in done],
                "failed": [{"name": name, "message": str(why)} for name, why in failures],
                "left": left,
            }
        )
    for name, failure in failures:
        click.echo(f"fvdctl: {name}: {failure.message}", err=True)
    if left:
        click.echo(f"hint: not replaced after that: {', '.join(left)}", err=True)
    return failures[0][1].exit_status if failures else 0


def _upgrade_text(answer: UpgradeAnswer) -> str:
    versions = f"{answer.version_before} by {answer.version}"
    return (
        f"{answer.name}: worker {versions}, {answer.method}, "
        f"paused {answer.pause_seconds * 1000:.0f} ms"
    )
