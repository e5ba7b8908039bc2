# SPDX-License-Identifier: Apache-2.0
"""The verb of the host: doctor."""

from __future__ import annotations

import subprocess
import sys

import click

from fvdapi.client import Client
from fvdapi.errors import EXIT_UNSUPPORTED, ApiError
from fvdapi.models import DoctorReport, Finding
from fvdctl import fvdtab, output
from fvdctl.commands.online import daemon_options

EXAMINE_LIMIT_SECONDS = 60
_MARKS = {"ok": "ok", "warning": "!!", "problem": "no"}


@click.command()
@click.option(
    "--reclaim",
    is_flag=True,
    help="Give kernel devices back, and remove files, that are fvd's and nobody's any more.",
)
@click.option(
    "--fvdtab",
    "table",
    metavar="FILE",
    default=fvdtab.DEFAULT_PATH,
    show_default=True,
    help="The table of devices, which is compared with those that are attached.",
)
@daemon_options
def doctor(reclaim: bool, table: str, socket: str | None, as_json: bool, quiet: bool) -> int:
    """Say what this kernel and host can do, and what to install.

    Ends with status 6 when something prevents attaching.
    """
    if reclaim:
        with Client(socket) as client:
            answer = client.reclaim()
        for device in answer.reclaimed:
            click.echo(f"reclaimed {device}", err=True)
        for path in answer.removed:
            click.echo(output.printable(f"removed {path}"), err=True)
    report = _report(socket, table)
    if as_json:
        output.emit_json({**report.model_dump(mode="json"), "problems": report.problems})
    else:
        for finding in report.findings:
            if finding.level == "ok" and quiet:
                continue
            mark = _MARKS[finding.level]
            click.echo(output.printable(f"[{mark}] {finding.topic}: {finding.message}"))
            if finding.remedy:
                click.echo(output.printable(f"     remedy: {finding.remedy}"))
    return EXIT_UNSUPPORTED if report.problems else 0


def _report(socket: str | None, table: str) -> DoctorReport:
    """The daemon's report; without a daemon, that of a process of its own."""
    with Client(socket) as client:
        try:
            report = client.doctor()
        except ApiError as error:
            if error.code not in ("daemon_not_running", "daemon_no_permission"):
                raise
            daemon = Finding(
                topic="fvdd", level="warning", message=error.message, remedy=error.hint
            )
            local = _examine_alone()
            return DoctorReport(findings=(daemon, *local.findings))
        health = client.health()
        moved = _moved_on(client, table)
    daemon = Finding(
        topic="fvdd", level="ok", message=f"fvdd {health.version} runs as process {health.pid}"
    )
    return DoctorReport(findings=(daemon, *report.findings, *moved))


def _moved_on(client: Client, table: str) -> list[Finding]:
    """What the next boot would do to attached devices, as the table is."""
    return [
        Finding(topic="fvdtab", level="warning", message=one.text, remedy=one.remedy)
        for status in client.devices()
        if status.image
        for one in fvdtab.stale(status.name, status.image, table)
    ]


def _examine_alone() -> DoctorReport:
    command = [sys.executable, "-P", "-m", "fvdd.devices.doctor"]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=EXAMINE_LIMIT_SECONDS, check=True
        )
        return DoctorReport.model_validate_json(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ApiError(
            "internal_error",
            "the host could not be examined",
            hint=f"run it by hand: {' '.join(command)}",
        ) from error
