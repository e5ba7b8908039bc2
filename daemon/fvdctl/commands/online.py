# SPDX-License-Identifier: Apache-2.0
"""What the verbs that talk to fvdd have in common: options, and how a device is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from fvdapi.models import DeviceState, DeviceStatus, PrefetchState, PrefetchStatus
from fvdctl.output import size_text

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

MINUTE = 60
HOUR = 3600
DAY = 86400


def daemon_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--socket, --json, -q: options of every verb that talks to fvdd."""
    options = (
        click.option(
            "--socket",
            metavar="PATH",
            help="The daemon's socket (default: FVDD_SOCKET, or /run/fvd/fvdd.sock).",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("-q", "--quiet", is_flag=True, help="Print no notes, warnings and progress."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def allowing_options(changed_base: str) -> Decorator:
    """--allow-dir, --allow-uri, --accept-changed-base (with this help): what an image may use."""
    options = (
        click.option(
            "--allow-dir",
            "allow_dirs",
            multiple=True,
            metavar="DIR",
            help="Allow bases in DIR, besides the image's own directory. "
            "May be given several times.",
        ),
        click.option(
            "--allow-uri",
            "allow_uris",
            multiple=True,
            metavar="PATTERN",
            help="Allow URIs in images to lead to SCHEME://HOST[:PORT][/PATH]; HOST may be "
            "*.DOMAIN or *. May be given several times.",
        ),
        click.option("--accept-changed-base", is_flag=True, help=changed_base),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def duration_text(seconds: float | None) -> str:
    """A time span for people: 42s, 3m10s, 2h05m, 4d; "-" when nobody knows."""
    if seconds is None or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole}s"
    if whole < HOUR:
        return f"{whole // MINUTE}m{whole % MINUTE:02d}s"
    if whole < DAY:
        return f"{whole // HOUR}h{whole % HOUR // MINUTE:02d}m"
    return f"{whole // DAY}d"


def local_percent(status: DeviceStatus) -> float:
    """How much of the device no longer needs the base."""
    if status.base_bytes_left == 0:
        return 100.0
    total = status.local_bytes + status.base_bytes_left
    return 100.0 * status.local_bytes / total if total else 100.0


def percent_text(status: DeviceStatus) -> str:
    """The percentage, never rounded up to 100 while something is left."""
    if status.state in (DeviceState.ORPHANED, DeviceState.OPENING):
        return "-"
    value = local_percent(status)
    return "100%" if value == 100.0 else f"{min(value, 99.9):.1f}%"


def prefetch_text(prefetch: PrefetchStatus) -> str:
    """The state of the background copy in a few words."""
    if prefetch.state is PrefetchState.RUNNING:
        rate = f"{size_text(prefetch.rate_bytes_per_second)}/s"
        eta = prefetch.eta_seconds
        return f"running, {rate}" + ("" if eta is None else f", {duration_text(eta)} left")
    if prefetch.state is PrefetchState.WAITING and prefetch.paused_reason == "base":
        return "waiting for the base"
    if prefetch.state is PrefetchState.PAUSED and prefetch.paused_reason is not None:
        return f"paused ({prefetch.paused_reason})"
    return prefetch.state.value
